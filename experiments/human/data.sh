#!/bin/sh
# Makes labelled/pairs.jsonl, the judges and prompts.jsonl in the working folder. run.sh calls it.
# UNIARM_HH is a folder with hh-helpful.jsonl and hh-harmless.jsonl, as convert.py writes them (README.md).
set -eu

: "${UNIARM_HH:?set it to a folder with hh-helpful.jsonl and hh-harmless.jsonl; experiments/human/README.md says how to get them}"
[ ! -f labelled/pairs.jsonl ] || exit 0

mkdir -p labelled
for objective in helpful harmless; do
    pairs=$UNIARM_HH/hh-$objective.jsonl
    [ -f "$pairs" ] || { echo "there is no $pairs; experiments/human/README.md says how to get it" >&2; exit 1; }
    "$UNIARM" oracle split --pairs "$pairs" --parts fit=0.4,train=0.5,eval=0.1 --output "$objective"
    "$UNIARM" oracle fit --pairs "$objective/fit.jsonl" --objective "$objective" --output "$objective.safetensors"
done
# People judged one objective of each pair. A judge that saw neither part says the other.
"$UNIARM" oracle label --pairs helpful/train.jsonl --oracle ngram:harmless.safetensors --objective harmless --output helpful/labelled.jsonl
"$UNIARM" oracle label --pairs harmless/train.jsonl --oracle ngram:helpful.safetensors --objective helpful --output harmless/labelled.jsonl

# Prompts of the evaluation: as many of each kind, the first ones of at most 600 bytes, about 140 tokens.
for objective in helpful harmless; do
    awk 'match($0, /"preferred"/) && RSTART <= 600' "$objective/eval.jsonl" | head -n 40
done >prompts.jsonl

# Last, and whole at once: where it stands, everything above is there.
cat helpful/labelled.jsonl harmless/labelled.jsonl >labelled/pairs.part
mv labelled/pairs.part labelled/pairs.jsonl

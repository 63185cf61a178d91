#!/bin/sh
# Rebuilds an experiment from nothing: data, adapters, report. Interrupted anywhere, the same command goes on from there.
# Usage: experiments/run.sh exact      UNIARM names the binary, UNIARM_WORK the folder for what is made (many megabytes).
set -eu

name=${1:?name an experiment: a folder beside this script, such as exact}
root=$(cd "$(dirname "$0")/.." && pwd)
source=$root/experiments/$name
uniarm=${UNIARM:-${CARGO_TARGET_DIR:-$root/target}/release/uniarm}
work=${UNIARM_WORK:-$root/target/experiments}/$name

say() { echo "experiment $name: $*" >&2; }
fail() { say "$*"; exit 1; }

[ -f "$source/eval.toml" ] || fail "there is no experiment in $source"
[ -x "$uniarm" ] || fail "there is no $uniarm; run make build"
model=$("$root/scripts/fetch-demo-model.sh")
export UNIARM_DEMO_MODEL="$model"
# A router that happens to be named in the environment serves other models than this experiment's.
unset UNIARM_ENDPOINT

mkdir -p "$work/runs"
# The configurations stand beside what they name.
cp "$source"/*.toml "$source"/*.jsonl "$work"

say "1/4 data: sampling and labelling answers"
"$uniarm" label "$work/label.toml" --out "$work/labelled"

for config in "$work"/train-*.toml; do
    adapter=$(basename "$config" .toml)
    adapter=${adapter#train-}
    say "2/4 training $adapter"
    "$uniarm" train "$config" --resume --model "$model" --pairs "$work/labelled/pairs.jsonl" --out "$work/runs/$adapter"
done

say "3/4 mixing the plain adapters for Rewarded Soups"
if [ ! -f "$work/runs/soup/adapter_model.safetensors" ]; then
    set --
    for objective in positive concise; do
        set -- "$@" "$objective=$work/runs/genarm-$objective/adapter"
    done
    "$uniarm" adapters soup --output "$work/runs/soup" "$@"
fi

say "4/4 evaluation"
"$uniarm" eval "$work/eval.toml" --out "$work/report"

report=$root/docs/experiments/$name
mkdir -p "$report"
cp "$work"/report/report.* "$work"/report/*.svg "$work"/report/*.png "$work/labelled/summary.json" "$report"
say "the report is $report/report.html"

#!/bin/sh
# Rebuilds an experiment from nothing: data, adapters, report. Interrupted anywhere, the same command goes on from there.
# Usage: experiments/run.sh NAME       UNIARM names the binary, UNIARM_WORK the folder for what is made (many megabytes).
# NAME is a folder beside this script: data.sh makes labelled/pairs.jsonl, train-ADAPTER.toml trains runs/ADAPTER, and
# eval.toml compares them. A line "ADAPTER N" of seeds trains it again with seed N, as runs/ADAPTER-seed-N. Adapters named
# genarm-OBJECTIVE are mixed into runs/soup.
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
export UNIARM="$uniarm" UNIARM_DEMO_MODEL="$model"
# A router that happens to be named in the environment serves other models than this experiment's.
unset UNIARM_ENDPOINT

mkdir -p "$work/runs"
# The configurations stand beside what they name.
for file in "$source"/*.toml "$source"/*.jsonl; do
    [ ! -f "$file" ] || cp "$file" "$work"
done

say "1/4 data"
(cd "$work" && "$source/data.sh")

# train CONFIG RUN FLAG...
train() {
    config=$1 run=$2
    shift 2
    say "2/4 training $run"
    "$uniarm" train "$config" --resume --model "$model" --pairs "$work/labelled/pairs.jsonl" --out "$work/runs/$run" "$@"
}
for config in "$work"/train-*.toml; do
    run=$(basename "$config" .toml)
    train "$config" "${run#train-}"
done
if [ -f "$source/seeds" ]; then
    while read -r adapter seed; do
        train "$work/train-$adapter.toml" "$adapter-seed-$seed" --seed "$seed" </dev/null
    done <"$source/seeds"
fi

say "3/4 mixing the plain adapters for Rewarded Soups"
if [ ! -f "$work/runs/soup/adapter_model.safetensors" ]; then
    set --
    for run in "$work"/runs/genarm-*; do
        set -- "$@" "${run##*/genarm-}=$run/adapter"
    done
    "$uniarm" adapters soup --output "$work/runs/soup" "$@"
fi

say "4/4 evaluation"
"$uniarm" eval "$work/eval.toml" --out "$work/report"

report=$root/docs/experiments/$name
mkdir -p "$report"
cp "$work"/report/report.* "$work"/report/*.svg "$work"/report/*.png "$report"
[ ! -f "$work/labelled/summary.json" ] || cp "$work/labelled/summary.json" "$report"
say "the report is $report/report.html"

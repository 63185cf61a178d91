#!/bin/sh
# `uniarm batch` beside `uniarm bench load` at its peak: far more requests than the cluster can take, within two seconds. The same
# requests, in turns, on one cluster.
# Usage: benches/batch.sh [UNIARM]      ROUNDS in the environment: 5 by default
set -eu
cd "$(dirname "$0")/.."

uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
[ -x "$uniarm" ] || { echo "benches/batch.sh: build first: make build" >&2; exit 1; }
UNIARM_DEMO_MODEL=$(scripts/fetch-demo-model.sh)
export UNIARM_DEMO_MODEL

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
# The second of each pair would find the prompts of the first.
"$uniarm" up --no-prefix-cache --grpc 127.0.0.1:0 --http-listen none --log-filter error >"$work/said" &
cluster=$!
trap 'kill $cluster; wait $cluster; rm -rf "$work"' EXIT
until router=$(sed -n 's|^uniarm is ready at \(http://[^:]*:[0-9]*\).*|\1|p' "$work/said") && [ -n "$router" ]; do
    kill -0 $cluster || exit 1
    sleep 1
done

rate() { sed -n 's/.*"tokens_per_second":\([0-9.]*\).*/\1/p' | tail -n 1; }

printf '%-6s %22s %22s %8s\n' round 'bench load, tokens/s' 'batch, tokens/s' ratio
round=1
while [ $round -le "${ROUNDS:-5}" ]; do
    load=$("$uniarm" bench load --endpoint "$router" --rate 80 --seconds 2 --seed $round --write-lines "$work/lines.jsonl" --json | rate)
    batch=$("$uniarm" batch "$work/lines.jsonl" --endpoint "$router" --output "$work/out-$round.jsonl" --json | rate)
    echo "$round $load $batch" | awk '{ printf "%-6s %22.1f %22.1f %8.2f\n", $1, $2, $3, $3 / $2 }'
    echo "$load $batch" >>"$work/rates"
    round=$((round + 1))
done
awk '{ print $2 / $1 }' "$work/rates" | sort -n | awk '{ r[NR] = $1 } END { printf "ratio: median %.2f, %.2f to %.2f\n", r[int((NR + 1) / 2)], r[1], r[NR] }'

#!/bin/sh
# The HTTP front door against its own document: schemathesis draws requests that the document allows and forbids, and every
# answer has to be one that it describes. No 5xx, no field of another kind, no key ignored.
# Usage: tests/clients/schema.sh [UNIARM [EXAMPLES]]      EXAMPLES of each call, besides the edges of every field
set -u
cd "$(dirname "$0")/../.." || exit 1

uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
examples=${2:-15}
READY_S=120
skip() { echo "skipped: schema, because $1" && exit 0; }

[ -x "$uniarm" ] || skip "$uniarm is not built"
model=$(scripts/fetch-demo-model.sh) || skip "the demo model cannot be had (see above)"
python=$(scripts/python-env.sh schemathesis schemathesis==4.32.5) || skip "schemathesis cannot be installed (see above)"

scratch=$(mktemp -d)
"$uniarm" keys new --json >"$scratch/key"
value() { sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/" "$scratch/key"; }
printf '[[tenants]]\nname = "schema"\nkeys = ["%s"]\n' "$(value hash)" >"$scratch/tenants.toml"
"$uniarm" up --base "$model" --grpc 127.0.0.1:0 --http-listen 127.0.0.1:0 --log-filter error \
    --tenants "$scratch/tenants.toml" --batch-dir "$scratch/batches" \
    --prompted "positive=You are an extremely cheerful, positive and encouraging AI assistant." \
    --prompted "concise=Answer in one short sentence." >"$scratch/said" &
cluster=$!
trap 'kill $cluster; wait $cluster; rm -rf "$scratch"' EXIT
trap 'exit 130' HUP INT TERM
url=
waited=0
while [ -z "$url" ]; do
    kill -0 $cluster 2>/dev/null || { echo "FAILED  schema: uniarm up ended before it was ready" && exit 1; }
    [ $waited -lt $READY_S ] || { echo "FAILED  schema: uniarm up is not ready after $READY_S s" && exit 1; }
    sleep 1
    waited=$((waited + 1))
    url=$(sed -n 's|^the playground is at \(http://[^/]*\)/.*|\1|p' "$scratch/said")
done

# positive_data_acceptance is left out: what a model may be called, and which objectives it has, no schema knows.
config=$PWD/tests/clients/schemathesis.toml
cd "$scratch" || exit 1 # it leaves what it learnt where it stands
if "$python" -m schemathesis.cli --config-file "$config" run "$url/openapi.json" --header "Authorization: Bearer $(value key)" \
    --exclude-checks positive_data_acceptance --max-examples "$examples" --request-timeout 60 \
    --workers 1 --no-color --seed "${SEED:-1}" >"$scratch/report" 2>&1; then
    echo "ok      schema: $(sed -n 's/^ *\([0-9]* generated\), .*/\1/p' "$scratch/report") requests, and each answer is as documented"
    echo "schema: 1 passed, 0 failed"
else
    cut -c1-400 "$scratch/report" | sed 's/^/        /'
    echo "FAILED  schema: an answer is not as documented"
    echo "schema: 0 passed, 1 failed"
    exit 1
fi

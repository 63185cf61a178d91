#!/bin/sh
# The HTTP front door against its own document: schemathesis draws requests that the document allows and forbids, and every
# answer has to be one that it describes. No 5xx, no field of another kind, no key ignored.
# Usage: tests/clients/schema.sh [UNIARM [EXAMPLES]]      EXAMPLES of each call, besides the edges of every field
set -u
cd "$(dirname "$0")/../.." || exit 1

what=schema
uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
examples=${2:-15}
. tests/served.sh

python=$(scripts/python-env.sh schemathesis schemathesis==4.32.5) || skip "schemathesis cannot be installed (see above)"

serve --batch-dir "$scratch/batches"

# positive_data_acceptance is left out: what a model may be called, and which objectives it has, no schema knows.
config=$PWD/tests/clients/schemathesis.toml
cd "$scratch" || exit 1 # it leaves what it learnt where it stands
if "$python" -m schemathesis.cli --config-file "$config" run "$url/openapi.json" --header "Authorization: Bearer $UNIARM_API_KEY" \
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

# For scripts that ask a cluster by HTTP: one of their own, with a tenant. Sourced, not run.
# Wants $what (who asks, for messages) and $uniarm; gives $scratch, a folder that ends with the script. `serve FLAG...` sets
# $url and UNIARM_API_KEY; its cluster ends with the script too.

# Loading the model on a busy machine.
READY_S=120

skip() { echo "skipped: $what, because $1" && exit 0; }

[ -x "$uniarm" ] || skip "$uniarm is not built"
model=$(scripts/fetch-demo-model.sh) || skip "the demo model cannot be had (see above)"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' HUP INT TERM

serve() {
    "$uniarm" keys new --json >"$scratch/key"
    printf '[[tenants]]\nname = "%s"\nkeys = ["%s"]\n' "$what" "$(of_key hash)" >"$scratch/tenants.toml"
    UNIARM_API_KEY=$(of_key key)
    export UNIARM_API_KEY
    "$uniarm" up --base "$model" --grpc 127.0.0.1:0 --http-listen 127.0.0.1:0 --log-filter error \
        --tenants "$scratch/tenants.toml" \
        --prompted "positive=You are an extremely cheerful, positive and encouraging AI assistant. Answer in very simple words." \
        --prompted "concise=Answer in one short sentence. Be as brief as possible." "$@" >"$scratch/said" &
    cluster=$!
    trap 'kill $cluster; wait $cluster; rm -rf "$scratch"' EXIT
    url=
    waited=0
    while [ -z "$url" ]; do
        kill -0 $cluster 2>/dev/null || { echo "FAILED  $what: uniarm up ended before it was ready" && exit 1; }
        [ $waited -lt $READY_S ] || { echo "FAILED  $what: uniarm up is not ready after $READY_S s" && exit 1; }
        sleep 1
        waited=$((waited + 1))
        url=$(sed -n 's|^the playground is at \(http://[^/]*\)/.*|\1|p' "$scratch/said")
    done
}

# A field of the key that was drawn.
of_key() { sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/" "$scratch/key"; }

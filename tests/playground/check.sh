#!/bin/sh
# The playground in headless Chromium, against a cluster of its own.
# Usage: tests/playground/check.sh [UNIARM]      UNIARM: the binary that serves it
# With PICTURE=FILE.png in the environment it takes the README's picture instead.
set -u
cd "$(dirname "$0")/../.." || exit 1

uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
# Loading the model on a busy machine.
READY_S=120
skip() { echo "skipped: playground, because $1" && exit 0; }

[ -x "$uniarm" ] || skip "$uniarm is not built"
model=$(scripts/fetch-demo-model.sh) || skip "the demo model cannot be had (see above)"
python=$(scripts/python-env.sh playwright playwright==1.65.2) || skip "playwright cannot be installed (see above)"
browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome && return
    "$python" -m playwright install chromium >&2 &&
        "$python" -c 'from playwright.sync_api import sync_playwright as play; print(play().start().chromium.executable_path)'
}
chromium=$(browser) || skip "no Chromium is installed or to be fetched"

scratch=$(mktemp -d)
"$uniarm" keys new --json >"$scratch/key"
value() { sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/" "$scratch/key"; }
printf '[[tenants]]\nname = "page"\nkeys = ["%s"]\n' "$(value hash)" >"$scratch/tenants.toml"
UNIARM_API_KEY=$(value key)
export UNIARM_API_KEY
"$uniarm" up --base "$model" --grpc 127.0.0.1:0 --http-listen 127.0.0.1:0 --log-filter error \
    --tenants "$scratch/tenants.toml" \
    --prompted "positive=You are an extremely cheerful, positive and encouraging AI assistant. Answer in very simple words." \
    --prompted "concise=Answer in one short sentence. Be as brief as possible." \
    --prompted "harmless=You are a careful assistant. Be gentle and safe, and never suggest anything risky." \
    >"$scratch/said" &
cluster=$!
trap 'kill $cluster; rm -rf "$scratch"' EXIT
trap 'exit 130' HUP INT TERM
url=
waited=0
while [ -z "$url" ]; do
    kill -0 $cluster 2>/dev/null || { echo "FAILED  playground: uniarm up ended before it was ready" && exit 1; }
    [ $waited -lt $READY_S ] || { echo "FAILED  playground: uniarm up is not ready after $READY_S s" && exit 1; }
    sleep 1
    waited=$((waited + 1))
    url=$(sed -n 's|^the playground is at \(http://[^/]*\)/.*|\1|p' "$scratch/said")
done
# shellcheck disable=SC2086 # a word or none
"$python" tests/playground/check.py "$url" "$chromium" ${PICTURE:-}

#!/bin/sh
# The playground in headless Chromium, against a cluster of its own.
# Usage: tests/playground/check.sh [UNIARM]      UNIARM: the binary that serves it
# With PICTURE=FILE.png in the environment it takes the README's picture instead.
set -u
cd "$(dirname "$0")/../.." || exit 1

what=playground
uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
. tests/served.sh

python=$(scripts/python-env.sh playwright playwright==1.65.2) || skip "playwright cannot be installed (see above)"
browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome && return
    "$python" -m playwright install chromium >&2 &&
        "$python" -c 'from playwright.sync_api import sync_playwright as play; print(play().start().chromium.executable_path)'
}
chromium=$(browser) || skip "no Chromium is installed or to be fetched"

serve --prompted "harmless=You are a careful assistant. Be gentle and safe, and never suggest anything risky."
# shellcheck disable=SC2086 # a word or none
"$python" tests/playground/check.py "$url" "$chromium" ${PICTURE:-}

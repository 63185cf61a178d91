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
# The system's, as root one that apt installs, or Playwright's own.
browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "playground: installing Debian's Chromium" >&2
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 &&
            command -v chromium && return
    fi
    "$python" -m playwright install chromium >&2 &&
        "$python" -c 'from playwright.sync_api import sync_playwright as play; print(play().start().chromium.executable_path)'
}
chromium=$(browser) || skip "no Chromium is installed or to be fetched"

serve --prompted "harmless=You are a careful assistant. Be gentle and safe, and never suggest anything risky."
# shellcheck disable=SC2086 # a word or none
"$python" tests/playground/check.py "$url" "$chromium" ${PICTURE:-}

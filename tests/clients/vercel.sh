#!/bin/sh
# Tries the HTTP front door of a running cluster with Vercel's AI SDK, which is fetched once and kept in the cache folder.
# Usage: tests/clients/vercel.sh URL      URL: http://HOST:PORT
set -u
here=$(cd "$(dirname "$0")" && pwd)

SDK='ai@5.0.277 @ai-sdk/openai-compatible@1.0.61'
skip() { echo "skipped: vercel, because $1" && exit 0; }

command -v node >/dev/null && command -v npm >/dev/null || skip "node and npm are not installed"
folder=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/node/$(echo "$SDK" | cksum | cut -d' ' -f1)
if [ ! -d "$folder" ]; then
    mkdir -p "${folder%/*}"
    making=$(mktemp -d "${folder%/*}/.XXXXXX")
    trap 'rm -rf "$making"' EXIT
    trap 'exit 1' HUP INT TERM
    echo '{"private": true}' >"$making/package.json"
    # shellcheck disable=SC2086 # two words
    (cd "$making" && npm install --silent --no-audit --no-fund --ignore-scripts $SDK >&2) || skip "its SDK cannot be installed (see above)"
    # A rename onto a folder that is not empty fails: then somebody else was first, and theirs is as good.
    mv -T "$making" "$folder" 2>/dev/null || [ -d "$folder" ] || skip "$folder cannot be written"
fi
node "$here/vercel.mjs" "$1" "$folder"

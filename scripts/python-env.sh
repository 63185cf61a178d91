#!/bin/sh
# Prints the path of a Python that has the given packages: a private environment, made once and kept.
# Usage: scripts/python-env.sh NAME REQUIREMENT...        e.g. scripts/python-env.sh clients -r requirements.txt
# Several builds may ask at the same moment: each makes its own, the first to finish is kept.
set -eu

name=$1
shift
python=${PYTHON:-python3}
fail() {
    echo "scripts/python-env.sh: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "no $python on the PATH. Install Python 3.10 or later with venv (scripts/prerequisites.sh does)."

# Another Python or another requirement is another environment: nothing is ever upgraded in place.
key=$({
    "$python" -c 'import sys; print(sys.implementation.cache_tag, sys.base_prefix)'
    for word; do
        printf '%s\n' "$word"
        if [ -f "$word" ]; then cat "$word"; fi
    done
} | cksum | cut -d' ' -f1)
cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/python
environment=$cache/$name-$key

if [ ! -x "$environment/bin/python" ]; then
    mkdir -p "$cache"
    making=$(mktemp -d "$cache/.$name-XXXXXX")
    trap 'rm -rf "$making"' EXIT
    trap 'exit 1' HUP INT TERM
    {
        "$python" -m venv "$making" && "$making/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    } >&2 || fail "cannot install: $*"
    # A rename onto a folder that is not empty fails: then somebody else was first, and theirs is as good.
    "$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$making" "$environment" 2>/dev/null ||
        [ -x "$environment/bin/python" ] || fail "cannot write $environment"
fi
echo "$environment/bin/python"

#!/bin/sh
# Installs the Python client as a stranger would, into a folder that is thrown away, and tries it against a cluster.
# Usage: tests/clients/package.sh ROUTER OTHER_ROUTER PID_OF_ROUTER        prints the answers as one JSON object
set -eu
here=$(cd "$(dirname "$0")" && pwd)
client=$here/../../clients/python
[ $# = 3 ] || { sed -n '2,3s/^# //p' "$0" >&2 && exit 2; }

# The oldest grpcio and protobuf that it takes: newer ones are tried by whoever installs it.
python=$("$here/../../scripts/python-env.sh" package grpcio==1.73.1 protobuf==6.31.0 'setuptools>=77') || {
    echo "skipped: the Python client, because grpcio cannot be installed (see above)"
    exit 0
}
if stale=$("$client/generate.sh" --check); then :; else
    [ $? = 3 ] || { echo "$stale" >&2 && echo "the stubs are out of date: run clients/python/generate.sh" >&2 && exit 1; }
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r "$client" "$folder/source"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --target "$folder/installed" "$folder/source" >&2
PYTHONPATH=$folder/installed "$python" "$folder/source/examples/stream.py" "$1" >&2
PYTHONPATH=$folder/installed "$python" "$here/package/check.py" "$@"

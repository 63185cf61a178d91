#!/bin/sh
# Tries a running cluster with clients that are not ours: Python's grpcio, and grpcurl by reflection.
# Usage: tests/clients/run.sh ENDPOINT        ENDPOINT: http://HOST:PORT of a router or of `uniarm up`
set -u
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] || { sed -n '2,3s/^# //p' "$0" >&2 && exit 2; }

status=0
if python=$("$here/../../scripts/python-env.sh" clients -r "$here/python/requirements.txt"); then
    "$python" "$here/python/check.py" "$1" || status=1
else
    echo "skipped: python, because grpcio cannot be installed (see above)"
fi
"$here/grpcurl.sh" "$1" || status=1
exit $status

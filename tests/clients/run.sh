#!/bin/sh
# Tries a running cluster with clients that are not ours: Python's grpcio, grpcurl by reflection, OpenAI's for Python, Vercel's AI SDK.
# Usage: tests/clients/run.sh ENDPOINT [HTTP]        ENDPOINT, HTTP: http://HOST:PORT of a router's two front doors
set -u
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] || [ $# = 2 ] || { sed -n '2,3s/^# //p' "$0" >&2 && exit 2; }

status=0
if python=$("$here/../../scripts/python-env.sh" clients -r "$here/python/requirements.txt"); then
    "$python" "$here/python/check.py" "$1" || status=1
else
    echo "skipped: python, because grpcio cannot be installed (see above)"
fi
"$here/grpcurl.sh" "$1" || status=1
if [ $# = 2 ]; then
    if python=$("$here/../../scripts/python-env.sh" openai openai==3.57.0); then
        "$python" "$here/python/openai_check.py" "$2" || status=1
    else
        echo "skipped: openai, because its client cannot be installed (see above)"
    fi
    "$here/vercel.sh" "$2" || status=1
fi
exit $status

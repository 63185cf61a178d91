#!/bin/sh
# Writes the stubs in src/uniarm/v1 anew from the contract, or says whether they are up to date.
# Usage: clients/python/generate.sh [--check]
set -eu
here=$(cd "$(dirname "$0")" && pwd)

# Stubs want a protobuf of their own generation or the next one: this one writes those of protobuf 6, good for 6 and 7.
python=$("$here/../../scripts/python-env.sh" stubs grpcio-tools==1.73.1 'setuptools<81') || exit 3
target=$here/src
if [ "${1:-}" = --check ]; then
    target=$(mktemp -d)
    trap 'rm -rf "$target"' EXIT
fi
"$python" -W ignore -m grpc_tools.protoc -I"$here/../../proto" -I"$here/protos" \
    --python_out="$target" --pyi_out="$target" \
    uniarm/v1/types.proto uniarm/v1/inference.proto uniarm/v1/details.proto
"$python" -W ignore -m grpc_tools.protoc -I"$here/../../proto" --grpc_python_out="$target" uniarm/v1/inference.proto
touch "$target/uniarm/v1/__init__.py"
[ "$target" = "$here/src" ] || diff -r -x __pycache__ "$target/uniarm/v1" "$here/src/uniarm/v1"

#!/bin/sh
# Sets up the peers and compares them with `uniarm bench`, in turns, on this machine.
# Usage: benches/peers/run.sh [--without-papers] [--repeats N] [--tokens N] [--json]
# Once: llama.cpp is compiled for this machine (minutes; a C++ compiler is needed), and PyTorch is fetched (5.6 GB on
# disk, most of it for GPUs: its registry has no smaller build; --without-papers leaves it out).
set -eu
cd "$(dirname "$0")/../.."

papers=yes
if [ "${1:-}" = --without-papers ]; then
    papers=no
    shift
fi
uniarm=${CARGO_TARGET_DIR:-target}/release/uniarm
[ -x "$uniarm" ] || { echo "benches/peers/run.sh: build first: make build" >&2; exit 1; }
model=$(scripts/fetch-demo-model.sh)

# For this processor, as a practitioner would build it; without the parts for images.
llama=$(CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF' \
    scripts/python-env.sh peers-llama -r benches/peers/requirements-llama.txt)
torch=
if [ "$papers" = yes ]; then
    torch=$(scripts/python-env.sh peers-papers -r benches/peers/requirements-papers.txt)
fi
exec "$llama" benches/peers/compare.py --uniarm "$uniarm" --model "$model" \
    --llama-python "$llama" --papers-python "$torch" "$@"

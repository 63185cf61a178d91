#!/bin/sh
# How much later a first token shows on the page than a gRPC client has it: the same two requests, taken in turns, on a cluster of its own.
# Usage: benches/first_token.sh [UNIARM]      ROUNDS in the environment: 20 of each by default
set -u
cd "$(dirname "$0")/.." || exit 1

what=first-token
uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
. tests/served.sh

python=$(scripts/python-env.sh first-token playwright==1.65.2 grpcio protobuf) || skip "playwright or grpcio cannot be installed (see above)"
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || skip "no Chromium is installed"

serve
PYTHONPATH=clients/python/src "$python" benches/first_token.py "$url" "$(sed -n 's|^uniarm is ready at \(http://[^:]*:[0-9]*\).*|\1|p' "$scratch/said")" "$chromium" "${ROUNDS:-20}"

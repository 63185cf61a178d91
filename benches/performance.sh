#!/bin/sh
# Measures this machine and writes docs/performance.md: each table with the command that made it.
# Usage: benches/performance.sh [--without-papers]      (an argument goes to benches/peers/run.sh)
# About twenty minutes on two cores, in which nothing else should run; minutes more where peers are not set up yet.
set -eu
cd "$(dirname "$0")/.."

uniarm=${CARGO_TARGET_DIR:-target}/release/uniarm
[ -x "$uniarm" ] || { echo "benches/performance.sh: build first: make build" >&2; exit 1; }
UNIARM_DEMO_MODEL=$(scripts/fetch-demo-model.sh)
export UNIARM_DEMO_MODEL

work=$(mktemp -d)
page=$work/page
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM

say() { printf '%s\n' "$@" >>"$page"; }

# section TITLE INTRODUCTION COMMAND...: the command's own table, under the command.
section() {
    echo "== $1" >&2
    say '' "## $1" '' "$2" '' '```console'
    shift 2
    say "\$ $*" ''
    case $1 in
    uniarm)
        shift
        set -- "$uniarm" "$@"
        ;;
    esac
    # Not through a pipe: its status would be that of the last command.
    "$@" >"$work/table"
    sed 's/ *$//' "$work/table" >>"$page"
    say '```'
}

processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
vectors=$(grep -o -m 1 -w -e avx2 -e avx512f -e avx512_vnni -e avx512_bf16 /proc/cpuinfo | sort -u | tr '\n' ' ')
memory=$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)

say '# Performance' '' \
    'Every number on this page was measured by `make performance`, which writes the page. Nothing is typed by hand;' \
    'other machines give other numbers, and the same machine gives others on another day: mind the ranges.' '' \
    '| | |' '|---|---|' \
    "| processor | $(nproc) × ${processor:-unknown} ($vectors) |" \
    "| memory | $memory GiB |" \
    "| system | $(uname -sr), $(rustc --version | cut -d' ' -f1,2) |" \
    "| revision | $(git describe --always --dirty) of $(git log -1 --format=%cs) |" \
    '| model | SmolLM2-135M-Instruct, Q4_1, as base and as reward model |'

section 'A step' \
    'Decode steps at T = 1, base and reward worker in one process with a thread each (fused: one pass on both threads). The
floor is what the machine could do at most. Drafts change the number of base passes, never a token: the bench compares them.' \
    uniarm bench step --batch 1,4,16,32 --rows unguided,prompted,mixed --roles separate --tokens 64 --repeats 7

section 'Roles in one pass' \
    'Base and reward worker over one copy of the weights, beside workers of their own; without and with drafts.' \
    uniarm bench step --batch 1,16 --rows mixed --roles separate,fused --tokens 64 --repeats 5

section 'Base passes, drafts from the reward row' \
    'With a fixed window the base model rests as much as it can, whether that is faster or not.' \
    uniarm bench step --batch 1 --rows prompted,mixed --draft-window 8 --draft-rows single

section 'Base passes, drafts from two rows' \
    'The second row is the reward worker’s own backbone; here it is the base model itself, and all drafts are right.' \
    uniarm bench step --batch 1 --rows prompted,mixed --draft-window 16 --draft-rows dual

section 'Drafts ahead of a large model' \
    'A reward model of a tenth of the base, random weights of these shapes; a script decides how often drafts are right.' \
    uniarm bench draft

section 'Length of the context' \
    'One unguided answer on one thread: prefill, and what each further token costs.' \
    uniarm bench context

section 'Length of the context, on two threads' \
    'The same, where two threads share each step.' \
    uniarm bench context --threads 2

section 'Exchange' \
    'What reward rows cost on their way, by how they travel: lists with a certificate, or whole rows.' \
    uniarm bench exchange

section 'Choosing a token' \
    'What the base worker pays for a token, and the reward worker for a list.' \
    uniarm bench choose

section 'The front door' \
    'The router alone, on a core of its own, before a worker whose tokens are the time: how long a token is under way straight
from the worker, and through the router over gRPC and HTTP.' \
    uniarm bench front

section 'Load' \
    'A cluster in one process of its own, asked over gRPC in an open loop: requests come when they come.' \
    uniarm bench load --rate 1,2,4 --seconds 15

section 'Peers' \
    'The same file of weights, the same prompts, greedy, in turns on this machine: llama.cpp alone, llama.cpp with two
contexts and a sum of logits written by hand, and the loop of the papers in PyTorch.' \
    benches/peers/run.sh "$@"

cp "$page" docs/performance.md
echo 'docs/performance.md is written' >&2

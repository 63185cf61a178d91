#!/bin/sh
# Everything that is checked before a change is accepted: `make test`. A step that fails does not hide the next one.
# Usage: scripts/test.sh [STEP...]      steps: format, lint, rust, schema, playground, chart, deploy; all of them by default
set -u
cd "$(dirname "$0")/.." || exit 1

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' HUP INT TERM
began=$(date +%s)

# The steps. Each prints what it does; lines "ok …", "FAILED …", "skipped: …" and Cargo's own results are counted.

step_format() {
    cargo fmt --version >/dev/null 2>&1 || { echo "skipped: formatting, because cargo fmt is not installed (rustup component add rustfmt)" && return; }
    cargo fmt --all --check -- --color never && echo "ok      formatted"
}

step_lint() {
    cargo clippy --version >/dev/null 2>&1 || { echo "skipped: lints, because cargo clippy is not installed (rustup component add clippy)" && return; }
    cargo clippy --release --locked --workspace --all-targets --quiet -- -D warnings && echo "ok      no lint"
}

# The binary comes with it: the cluster tests start it, and the steps below try their command lines with it.
# The model is fetched first: tests that need it at the same moment would each wait for the download.
step_rust() {
    if model=$(scripts/fetch-demo-model.sh); then
        export UNIARM_DEMO_MODEL="$model"
    else
        echo "FAILED  the demo model cannot be fetched, and tests on real weights need it (see above)"
    fi
    cargo test --release --locked --workspace --no-fail-fast -- --show-output
}

step_schema() { tests/clients/schema.sh; }

step_playground() { tests/playground/check.sh; }

step_chart() { tests/helm/check.sh; }

step_deploy() { tests/deploy/check.sh; }

# run STEP: shows its output as it comes, and counts what it says.
run() {
    name=$1
    echo "== $name"
    step_began=$(date +%s)
    { "step_$name" 2>&1 && echo 0 >"$logs/$name.status" || echo 1 >"$logs/$name.status"; } | tee "$logs/$name"
    # Cargo: "test result: ok. 12 passed; 0 failed; 1 ignored; …", once for each test binary.
    counts=$(awk '
        /^test result:/ { passed += $4; failed += $6; skipped += $8 }
        /^ok / { passed++ }
        /^FAILED / { failed++ }
        /^ *skipped:/ { skipped++ }
        END { print passed + 0, failed + 0, skipped + 0 }' "$logs/$name")
    # shellcheck disable=SC2086 # three numbers
    set -- $counts "$(cat "$logs/$name.status")"
    # A step can fail as a whole, without a failed test: what does not compile has none.
    [ "$4" = 0 ] || [ "$2" -gt 0 ] || set -- "$1" 1 "$3" "$4"
    printf '%-10s %5d passed %5d failed %5d skipped %6d s\n' "$name" "$1" "$2" "$3" "$(($(date +%s) - step_began))" >"$logs/$name.counts"
}

[ $# -gt 0 ] || set -- format lint rust schema playground chart deploy

# What compiles comes first, and has all cores. "chart" and "deploy" then run beside the steps that ask a cluster, one
# core each, and are shown when they are done.
asking='' beside=''
for step; do
    case $step in
    chart | deploy) beside="$beside $step" ;;
    schema | playground) asking="$asking $step" ;;
    *) run "$step" ;;
    esac
done
for step in $beside; do run "$step"; done >"$logs/beside" 2>&1 &
for step in $asking; do run "$step"; done
wait
cat "$logs/beside"

echo "== summary"
for step; do cat "$logs/$step"; done | grep '^ *skipped:' | sed 's/^ *//' | sort -u
for step; do cat "$logs/$step"; done | grep -e '^FAILED ' -e '^test .* FAILED$' | sort -u
for step; do cat "$logs/$step.counts"; done | tee "$logs/summary"
awk -v minutes="$((($(date +%s) - began) / 60))" '
    { passed += $2; failed += $4; skipped += $6 }
    END { printf "%d passed, %d failed, %d skipped in %d min\n", passed, failed, skipped, minutes; exit failed > 0 }' "$logs/summary"

#!/bin/sh
# The chart in a real Kubernetes API server, object by object, and by the commands of docs/kubernetes.md.
# Usage: tests/helm/apiserver.sh [UNIARM]      UNIARM: the binary that the pods run
# It runs where the server is built already, or UNIARM_KUBE_APISERVER=build says that it should be.
set -u
cd "$(dirname "$0")/../.." || exit 1

uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
skip() { echo "skipped: chart: $1, because $2" && exit 0; }

servers=$(scripts/kube-apiserver.sh path) ||
    skip "a real API server" "none is built: scripts/kube-apiserver.sh build (four minutes of one core)"
{ helm=$(scripts/k8s-tools.sh helm) && kubectl=$(scripts/k8s-tools.sh kubectl) && python=$(scripts/k8s-tools.sh python) &&
    etcd=$(scripts/etcd.sh path); } || skip "a real API server" "its tools cannot be had (see above)"
command -v openssl >/dev/null || skip "a real API server" "openssl is not installed"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

# check WHAT COMMAND...: the command says itself what it finds, or skips.
check() {
    what=$1
    shift
    if "$@" >"$scratch/output" 2>&1; then
        sed '/^skipped:/!s/^/        /' "$scratch/output"
        grep -q '^skipped:' "$scratch/output" || echo "ok      chart: $what"
    else
        sed 's/^/        /' "$scratch/output"
        failed=$((failed + 1)) && echo "FAILED  chart: $what"
    fi
}

for values in helm/uniarm/values*.yaml tests/helm/values/*.yaml; do
    "$helm" template trial helm/uniarm --namespace steering --values "$values" >"$scratch/$(basename "$values")"
done
check "a real API server takes what is rendered" "$python" tests/helm/dry_run.py "$servers" "$etcd" "$scratch"/*.yaml
if [ ! -x "$uniarm" ]; then
    echo "skipped: chart: what a real API server starts, because $uniarm is not built"
elif model=$(scripts/fetch-demo-model.sh); then
    check "the page's commands install, scale, upgrade, roll back and remove a release that answers" \
        "$python" tests/helm/install.py "$servers" "$etcd" "$uniarm" "$model" "$helm" "$kubectl"
else
    echo "skipped: chart: what a real API server starts, because the demo model cannot be had (see above)"
fi
[ "$failed" = 0 ]

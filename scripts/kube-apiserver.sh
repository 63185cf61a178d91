#!/bin/sh
# A real Kubernetes API server and its controllers, to install the chart into: built once from Debian's source, without root.
# Usage: scripts/kube-apiserver.sh path     prints the folder that holds kube-apiserver and kube-controller-manager
#        scripts/kube-apiserver.sh build    builds them first where they are not there yet: four minutes of one core
# UNIARM_KUBE_APISERVER=build makes `path` build too; UNIARM_CACHE names the cache folder. Exit 3: it cannot be had here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/debian-lib.sh"

SUITE=bookworm  # the last one whose source of Kubernetes is whole: later ones hold kubectl alone
VERSION=1.20.2  # what that source is, whatever its package is called
GO=1.19         # of the same suite
BUILD_S=3600    # a build that takes longer than this hangs
PROGRAMS="kube-apiserver kube-controller-manager"
# Modules that Kubernetes brings, and that crash when built by a Go this new: Debian's own are newer.
REPLACED=github.com/modern-go/reflect2 REPLACEMENT=golang-github-modern-go-reflect2-dev

cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/kubernetes-$VERSION
absent() {
    echo "scripts/kube-apiserver.sh: $*" >&2
    exit 3
}

fetch() {
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || absent "there is no $tool to fetch the source with"
    done
    { mirror_of deb $SUITE && mirror_of deb-src $SUITE; } >sources.list
    [ -s sources.list ] || absent "this machine knows no mirror of Debian's to fetch the source from"
    private_apt "$work" update &&
        private_apt "$work" download golang-$GO-go golang-$GO-src $REPLACEMENT &&
        private_apt "$work" source --download-only kubernetes || absent "this machine cannot download Kubernetes' source, and the Go to build it"
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    mkdir -p "$source"
    tar -xzf kubernetes_*.orig.tar.gz --strip-components 1 -C "$source"
    rm -rf "${source:?}/vendor/$REPLACED"
    cp -RL "unpacked/usr/share/gocode/src/$REPLACED" "$source/vendor/$REPLACED"
    rm -f "$source/vendor/$REPLACED"/*_test.go
}

# The descriptions of the API's types are generated code, which the tarball lacks.
describe() {
    go build -o "$work/openapi-gen" k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen
    described=$(grep -rl --include='*.go' '^// *+k8s:openapi-gen=' staging/src/k8s.io pkg cmd |
        grep -vE '/test|_test\.go|/examples?/|code-generator|sample-' | xargs -n 1 dirname | sort -u |
        sed -e 's#^staging/src/#vendor/#' -e 's#^#k8s.io/kubernetes/#' | paste -sd , -)
    "$work/openapi-gen" --logtostderr -i "$described" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
        -h hack/boilerplate/boilerplate.generatego.txt -r "$work/violations" --output-base "$work/go/src"
}

compile() {
    # The module file is older than this Go's rules: everything is in vendor, as it was before there were modules.
    export GOROOT="$work/unpacked/usr/lib/go-$GO" GOPATH="$work/go" GOCACHE="$work/compiled" GO111MODULE=off GOFLAGS= CGO_ENABLED=0
    export PATH="$GOROOT/bin:$PATH"
    cd "$source"
    describe
    stamp=k8s.io/kubernetes/vendor/k8s.io/component-base/version
    for program in $PROGRAMS; do
        # Without the clouds' own libraries, which nothing here speaks to.
        go build -tags providerless -o "$work/$program" \
            -ldflags "-s -w -X $stamp.gitVersion=v$VERSION -X $stamp.gitMajor=1 -X $stamp.gitMinor=20" "k8s.io/kubernetes/cmd/$program"
    done
}

is_built() {
    for program in $PROGRAMS; do
        [ -x "$cache/$program" ] || return 1
    done
}

build() {
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.build-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    source=$work/go/src/k8s.io/kubernetes
    cd "$work"
    fetch
    (compile) >&2 || absent "Kubernetes' source does not build on this machine (see above)"
    for program in $PROGRAMS; do mv -f "$work/$program" "$cache/$program"; done
}

case ${1:-} in
path) is_built || [ "${UNIARM_KUBE_APISERVER:-}" = build ] || absent "there is none yet: scripts/kube-apiserver.sh build takes four minutes of one core" ;;
build) ;;
within) build && exit ;; # of a time limit, below
*)
    sed -n '3,5s/^# //p' "$0" >&2
    exit 2
    ;;
esac
is_built || timeout "$BUILD_S" nice "$0" within || absent "it was not built within $BUILD_S s (see above)"
echo "$cache"

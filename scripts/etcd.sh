#!/bin/sh
# A real etcd for tests and trials, without root: the system's, or Debian's package unpacked into a cache folder.
# Usage: scripts/etcd.sh path        prints the path of an etcd binary, fetching it if needed
#        scripts/etcd.sh run [PORT]  starts one node on 127.0.0.1:PORT (2379) with throw-away data, until it is stopped
# UNIARM_ETCD names a binary to use instead; UNIARM_CACHE the cache folder.
set -eu

cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/etcd
fail() {
    echo "scripts/etcd.sh: $*" >&2
    exit 1
}

# Debian's package, from the machine's own mirrors. Lists and downloads go to a private folder, so neither
# root nor a fresh `apt-get update` of the machine is needed.
fetch() {
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || fail "no etcd on the PATH, and no $tool to fetch one. Install etcd 3.4 or later (https://etcd.io/docs/latest/install/) or name one in UNIARM_ETCD."
    done
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    mkdir -p "$work/lists/partial" "$work/archives/partial"
    cd "$work"
    apt() {
        apt-get -qq -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Dir::State::lists="$work/lists" \
            -o Dir::Cache="$work" -o Dir::Cache::archives="$work/archives" "$@" >&2
    }
    apt-get -qq download etcd-server >/dev/null 2>&1 || { apt update || true; apt download etcd-server; } ||
        fail 'no etcd on the PATH, and this machine cannot download the package etcd-server. Install etcd 3.4 or later, or name one in UNIARM_ETCD.'
    dpkg-deb -x etcd-server_*.deb unpacked
    # Two may fetch at once: the rename is atomic, and both bring the same.
    mv -f unpacked/usr/bin/etcd "$cache/etcd"
    cd /
}

path() {
    for candidate in "${UNIARM_ETCD:-$(command -v etcd || true)}" "$cache/etcd"; do
        if [ -n "$candidate" ] && "$candidate" --version >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        [ -z "${UNIARM_ETCD:-}" ] || fail "UNIARM_ETCD=$UNIARM_ETCD does not run"
    done
    (fetch)
    "$cache/etcd" --version >/dev/null || fail "$cache/etcd does not run on this machine"
    echo "$cache/etcd"
}

run() {
    client=http://127.0.0.1:${1:-2379}
    # Nobody joins a cluster of one, but etcd binds a peer port all the same.
    peer=http://127.0.0.1:$((${1:-2379} + 1))
    etcd=$(path)
    data=$(mktemp -d)
    trap 'kill "$node" 2>/dev/null && wait "$node" || true; rm -rf "$data"' EXIT
    trap 'exit 0' HUP INT TERM
    "$etcd" --data-dir "$data" --listen-client-urls "$client" --advertise-client-urls "$client" \
        --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "default=$peer" &
    node=$!
    wait "$node"
}

case ${1:-} in
path) path ;;
run) run "${2:-}" ;;
*) fail 'usage: scripts/etcd.sh path | run [PORT]' ;;
esac

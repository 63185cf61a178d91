#!/bin/sh
# A real etcd for tests and trials, without root: the system's, or Debian's package unpacked into a cache folder.
# Usage: scripts/etcd.sh path        prints the path of an etcd binary, fetching it if needed
#        scripts/etcd.sh run [PORT]  starts one node on 127.0.0.1:PORT (2379) with throw-away data, until it is stopped
# UNIARM_ETCD names a binary to use instead; UNIARM_CACHE the cache folder.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
fail() {
    echo "scripts/etcd.sh: $*" >&2
    exit 1
}

path() {
    etcd=${UNIARM_ETCD:-$(command -v etcd || true)}
    if [ -n "$etcd" ] && "$etcd" --version >/dev/null 2>&1; then
        echo "$etcd"
        return
    fi
    [ -z "${UNIARM_ETCD:-}" ] || fail "UNIARM_ETCD=$UNIARM_ETCD does not run"
    "$here/debian-binary.sh" etcd-server etcd ||
        fail 'no etcd on the PATH, and none to be had. Install etcd 3.4 or later (https://etcd.io/docs/latest/install/), or name one in UNIARM_ETCD.'
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

#!/bin/sh
# Prints the path of a program of one of Debian's packages, unpacked into the cache folder once: without root.
# Usage: scripts/debian-binary.sh PACKAGE PROGRAM [SUITE]       SUITE: another release of Debian's than this machine's
# UNIARM_CACHE names the cache folder. Exit 3: it cannot be had here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/debian-lib.sh"

package=$1 program=$2 suite=${3:-}
cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/$package
absent() {
    echo "scripts/debian-binary.sh: $*" >&2
    exit 3
}

fetch() {
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || absent "there is no $tool to fetch $program with"
    done
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    cd "$work"
    if [ -n "$suite" ]; then
        mirror_of deb "$suite" >sources.list
        [ -s sources.list ] || absent "this machine knows no mirror of Debian's to fetch $program from"
        private_apt "$work" update && private_apt "$work" download "$package"
    else
        apt-get -qq download "$package" >/dev/null 2>&1 || { private_apt "$work" update || true; private_apt "$work" download "$package"; }
    fi || absent "this machine cannot download the package $package"
    dpkg-deb -x "$package"_*.deb unpacked
    # What lies in bin may be a link into the package.
    cp -L "unpacked/usr/bin/$program" "$program"
    # Two may fetch at once: the rename is atomic, and both bring the same.
    mv -f "$program" "$cache/$program"
}

[ -x "$cache/$program" ] || (fetch)
"$cache/$program" --version >/dev/null 2>&1 || absent "$cache/$program does not run on this machine"
echo "$cache/$program"

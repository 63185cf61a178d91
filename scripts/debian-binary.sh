#!/bin/sh
# Prints the path of a program of one of Debian's packages, unpacked into the cache folder once: without root.
# Usage: scripts/debian-binary.sh PACKAGE PROGRAM       UNIARM_CACHE names the cache folder. Exit 3: it cannot be had here.
set -eu

package=$1 program=$2
cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/$package
absent() {
    echo "scripts/debian-binary.sh: $*" >&2
    exit 3
}

# From the machine's own mirrors. Lists and downloads go to a private folder, so neither root nor a fresh
# `apt-get update` of the machine is needed.
fetch() {
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || absent "there is no $tool to fetch $program with"
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
    apt-get -qq download "$package" >/dev/null 2>&1 || { apt update || true; apt download "$package"; } ||
        absent "this machine cannot download the package $package"
    dpkg-deb -x "$package"_*.deb unpacked
    # Two may fetch at once: the rename is atomic, and both bring the same.
    mv -f "unpacked/usr/bin/$program" "$cache/$program"
}

[ -x "$cache/$program" ] || (fetch)
"$cache/$program" --version >/dev/null 2>&1 || absent "$cache/$program does not run on this machine"
echo "$cache/$program"

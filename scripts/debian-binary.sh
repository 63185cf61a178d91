#!/bin/sh
# Prints the path of a program of one of Debian's packages, unpacked into the cache folder once: without root.
# Usage: scripts/debian-binary.sh PACKAGE PROGRAM [SUITE]       SUITE: another release of Debian's than this machine's
# UNIARM_CACHE names the cache folder. Exit 3: it cannot be had here.
set -eu

package=$1 program=$2 suite=${3:-}
cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uniarm}/$package
absent() {
    echo "scripts/debian-binary.sh: $*" >&2
    exit 3
}

# One of the machine's own mirrors, as a source of that suite.
mirror_of() {
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(COMPONENT) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$1" '$1 $2 $3 == "DebianDebianmain" && $4 !~ /-/ { print "deb", $5, suite, "main"; exit }'
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
    if [ -n "$suite" ]; then
        mirror_of "$suite" >sources.list
        [ -s sources.list ] || absent "this machine knows no mirror of Debian's to fetch $program from"
        from_suite() { apt -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null "$@"; }
        from_suite update && from_suite download "$package"
    else
        apt-get -qq download "$package" >/dev/null 2>&1 || { apt update || true; apt download "$package"; }
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

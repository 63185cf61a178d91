#!/bin/sh
# Checks what a build needs that Cargo cannot fetch: a C compiler, Rust, and Python 3 with venv and pip.
# What is missing it installs where it may (apt, as root; rustup for Rust's own components);
# otherwise it says exactly what to install, and fails. Nothing is changed when all is there.
set -eu

RUST_MINOR_MIN=95   # Cargo.toml: rust-version
PYTHON_MINOR_MIN=10 # the oldest Python that grpcio's wheels are made for

missing=""
need() { # need DEBIAN-PACKAGES WHAT
    packages="${packages:-} $1"
    missing="$missing
  - $2"
}

compiles() {
    probe=$(mktemp -d)
    printf '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n' >"$probe/probe.c"
    "${CC:-cc}" -o "$probe/probe" "$probe/probe.c" 2>/dev/null && status=0 || status=1
    rm -rf "$probe"
    return "$status"
}

survey() {
    packages="" missing=""
    compiles || need "gcc libc6-dev" "a C compiler with its headers: gcc and libc6-dev (Debian), gcc and glibc-devel (Fedora), xcode-select --install (macOS)"
    if ! python3 -c "import sys; sys.exit(sys.version_info < (3, $PYTHON_MINOR_MIN))" 2>/dev/null; then
        need "python3 python3-venv python3-pip" "Python 3.$PYTHON_MINOR_MIN or later with venv and pip: python3, python3-venv and python3-pip (Debian), python3 and python3-pip (Fedora)"
    elif ! python3 -c 'import ensurepip, venv, pip' 2>/dev/null; then
        need "python3-venv python3-pip" "Python's venv and pip: python3-venv and python3-pip (Debian)"
    fi
}

survey
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "prerequisites: installing$packages" >&2
    log=$(mktemp)
    # shellcheck disable=SC2086 # a list of words
    if ! { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "prerequisites: apt-get could not install them (its last words are above)" >&2
    fi
    rm -f "$log"
    survey
fi

# Rust is a matter of taste (rustup, a distribution, a container): it is never installed unasked.
minor=$(rustc --version 2>/dev/null | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
if [ -z "$minor" ] || ! command -v cargo >/dev/null; then
    need "" "Rust 1.$RUST_MINOR_MIN or later: https://rustup.rs, then open a new shell"
elif [ "$minor" -lt "$RUST_MINOR_MIN" ]; then
    need "" "Rust 1.$RUST_MINOR_MIN or later, not 1.$minor: rustup update stable"
fi

if [ -n "$missing" ]; then
    echo "prerequisites: missing on this machine:$missing" >&2
    exit 1
fi

# Only `make test` wants these, and it says so where they stay absent.
for component in rustfmt clippy; do
    if ! cargo "${component#rust}" --version >/dev/null 2>&1 && command -v rustup >/dev/null; then
        rustup --quiet component add "$component" >&2 || echo "prerequisites: rustup could not add $component" >&2
    fi
done

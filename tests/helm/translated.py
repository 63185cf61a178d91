"""helm for an older API server: what an installation or an upgrade renders is put into words that the server knows, and sent.

Usage: python translated.py HELM ARGUMENT...        needs PyYAML
The arguments are helm's own. `install` and `upgrade` render the chart that they name, and give helm a chart of the same name whose
only template is the outcome; what is left out is said. All other commands are passed on.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import yaml
from apiserver import STRANGERS, converted

CHART = "helm/uniarm"
# Flags of an installation that rendering does not know; True: a value follows.
NOT_RENDERED = {"--reuse-values": False, "--wait": False, "--timeout": True}


def rendering(helm, arguments):
    """`helm template` with the values that the command would install."""
    verb, release, *_ = arguments
    command, words = [helm, "template"], iter(arguments[1:])
    for word in words:
        if word in NOT_RENDERED:
            if NOT_RENDERED[word]:
                next(words)
        else:
            command.append(word)
    if verb == "upgrade" and "--reuse-values" in arguments:
        before = subprocess.run([helm, "get", "values", release], capture_output=True, text=True, check=True).stdout
        values = before.partition("\n")[2]  # below a headline
        command[4:4] = ["--values", "/dev/stdin"]
        return subprocess.run(command, input=values, stdout=subprocess.PIPE, text=True, check=True).stdout
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def translated(text):
    for manifest in filter(None, yaml.safe_load_all(text)):
        if manifest["kind"] in STRANGERS:
            print(f"left out {manifest['kind']} {manifest['metadata']['name']}: {STRANGERS[manifest['kind']]}", file=sys.stderr)
            continue
        yield converted(manifest)[0]


def write_chart(folder, manifests):
    (folder / "templates").mkdir()
    (folder / "Chart.yaml").write_text("{apiVersion: v2, name: uniarm, version: 0.1.0}", encoding="utf-8")
    (folder / "manifests.yaml").write_text(yaml.safe_dump_all(manifests), encoding="utf-8")
    # A file's text is no template: what looks like one in it stays as it is.
    (folder / "templates/all.yaml").write_text('{{ .Files.Get "manifests.yaml" }}', encoding="utf-8")


def main():
    helm, *arguments = sys.argv[1:]
    if arguments[0] not in ("install", "upgrade") or CHART not in arguments:
        os.execv(helm, [helm, *arguments])
    manifests = list(translated(rendering(helm, arguments)))
    with tempfile.TemporaryDirectory() as folder:
        write_chart(pathlib.Path(folder), manifests)
        command = [folder if word == CHART else word for word in arguments]
        return subprocess.run([helm, *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""helm for an older API server: what an installation or an upgrade renders is put into words that the server knows, and sent.

Usage: python translated.py HELM ARGUMENT...        needs PyYAML
The arguments are helm's own. `install` and `upgrade` render the chart that they name, and give helm a chart of the same name
whose only template is the outcome; what is left out is said. All other commands are passed on.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import yaml
from apiserver import STRANGERS, converted
from commands import CHART, REUSED, is_release, values_of


def rendering(helm, arguments):
    """`helm template` with the values that the command would install."""
    release = arguments[1]
    command = [helm, "template", release, CHART]
    values = ""
    if any(flag in arguments for flag in REUSED):
        before = subprocess.run([helm, "get", "values", release], capture_output=True, text=True, check=True).stdout
        values = before.partition("\n")[2]  # below a headline
        command += ["--values", "/dev/stdin"]
    command += values_of(["helm", *arguments])
    return subprocess.run(command, input=values, stdout=subprocess.PIPE, text=True, check=True).stdout


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
    if not is_release(["helm", *arguments]):
        os.execv(helm, [helm, *arguments])
    manifests = list(translated(rendering(helm, arguments)))
    with tempfile.TemporaryDirectory() as folder:
        write_chart(pathlib.Path(folder), manifests)
        command = [folder if word == CHART else word for word in arguments]
        return subprocess.run([helm, *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

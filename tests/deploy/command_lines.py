"""Runs every UniARM command line of a rendered chart or a compose file through the binary's own `--check`.

Usage: python command_lines.py UNIARM (pods|compose) FILE        needs PyYAML
"""

import functools
import os
import re
import subprocess
import sys
import tempfile

import yaml

ROLES = {"router", "base", "reward"}
# Commands that end by themselves: they know no --check, and a usage error is told by its own exit status.
JOBS = {"batch", "train", "test"}
USAGE_ERROR = 2
# What a cluster would put in place of a variable's source.
SOURCES = {
    "metadata.name": "uniarm-base-0",
    "status.podIP": "10.1.2.3",
    "requests.cpu": "2",
    "metadata.labels['apps.kubernetes.io/pod-index']": "1",
    "metadata.annotations['batch.kubernetes.io/job-completion-index']": "0",
}
CHECK_SECONDS = 20
# Files of secrets, which no machine but the cluster's has: others of their kind stand in for them.
SECRETS = re.compile(r"(?<==)/(?:tls|store/tls|store/password|front/tls|front/clients|front/tenants)/.+")
TENANTS = f'[[tenants]]\nname = "a"\nkeys = ["sha256:{"0" * 64}"]\n'


def expanded(text, variables):
    """`text` as Kubernetes passes it: $$ is a dollar sign, $(NAME) is replaced where NAME is known."""

    def replacement(match):
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replacement, text)


def pods(text):
    """(name, arguments, variables) of each UniARM container in rendered manifests."""
    for manifest in filter(None, yaml.safe_load_all(text)):
        pod = manifest if manifest["kind"] == "Pod" else manifest.get("spec", {}).get("template", {})
        for container in pod.get("spec", {}).get("containers", []):
            if container["name"] not in ROLES | JOBS:
                continue
            variables = {}
            for variable in container.get("env", []):
                [source] = variable.get("valueFrom", {"value": {}}).values()
                named = source.get("fieldPath") or source.get("resource")
                # What a secret holds is nobody's business here: any value will do.
                variables[variable["name"]] = variable.get("value") or SOURCES.get(named, "secret")
            arguments = [expanded(argument, variables) for argument in container["args"]]
            yield f"{manifest['kind']} {manifest['metadata']['name']}", arguments, variables


def compose(text):
    """(name, arguments, variables) of each UniARM service in a compose file, with the file's own defaults."""
    text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)
    for name, service in yaml.safe_load(text)["services"].items():
        if service["image"].startswith("uniarm:"):
            variables = {key: value for key, value in service["environment"].items() if value is not None}
            yield f"service {name}", service["command"], variables


def stand_ins(folder):
    """A certificate with its key, which is its own authority, and a file of tenants."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=stand-in", "-keyout", f"{folder}/key", "-out", f"{folder}/certificate"]
    subprocess.run(command, capture_output=True, check=True)
    with open(f"{folder}/tenants", "w", encoding="utf-8") as file:
        file.write(TENANTS)


def with_stand_ins(argument, folder):
    def stand_in(match):
        ending = match[0].rpartition(".")[2]
        return f"{folder}/" + {"key": "key", "toml": "tenants"}.get(ending, "certificate")

    return SECRETS.sub(stand_in, argument)


def check(uniarm, arguments, variables):
    """Whether the binary takes ARGUMENTS, in an environment that holds none of our variables but these, and its words."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UNIARM_")}
    is_role = arguments[0] in ROLES
    if not is_role:
        # What it works on is not here, and at this port nobody listens: it ends at once.
        arguments = [re.sub("^--endpoint=.*", "--endpoint=http://127.0.0.1:1", argument) for argument in arguments]
    outcome = subprocess.run(
        [uniarm, *arguments, *(["--check"] if is_role else [])],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=CHECK_SECONDS,
        check=False,
    )
    return outcome.returncode == 0 if is_role else outcome.returncode != USAGE_ERROR, outcome.stderr.strip()


@functools.cache
def known_variables(uniarm, command):
    """The variables that stand for flags of a command."""
    shown = subprocess.run([uniarm, command, "--help"], capture_output=True, text=True, timeout=CHECK_SECONDS, check=True)
    return set(re.findall(r"\[env: (\w+)", shown.stdout))


def main():
    uniarm, kind, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        command_lines = list({"pods": pods, "compose": compose}[kind](file.read()))
    assert command_lines, f"{path} starts no UniARM process"
    with tempfile.TemporaryDirectory() as folder:
        stand_ins(folder)
        found = list(problems(uniarm, command_lines, folder))
    for problem in found:
        print(problem)
    return 1 if found else 0


def problems(uniarm, command_lines, folder):
    for name, arguments, variables in command_lines:
        arguments = [with_stand_ins(argument, folder) for argument in arguments]
        if unknown := {name for name in variables if name.startswith("UNIARM_")} - known_variables(uniarm, arguments[0]):
            yield f"{name}: uniarm {arguments[0]} knows nothing of {sorted(unknown)}"
        taken, words = check(uniarm, arguments, variables)
        if not taken:
            yield f"{name}: uniarm {' '.join(arguments)}: {words}"
        # The control: a check that takes everything would prove nothing.
        if check(uniarm, [arguments[0], "--no-such-flag", *arguments[1:]], variables)[0]:
            yield f"{name}: {uniarm} takes a flag that does not exist"


if __name__ == "__main__":
    sys.exit(main())

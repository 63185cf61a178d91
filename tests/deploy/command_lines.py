"""Runs every UniARM command line of a rendered chart or a compose file through the binary's own `--check`.

Usage: python command_lines.py UNIARM (pods|compose) FILE        needs PyYAML
"""

import os
import re
import subprocess
import sys

import yaml

ROLES = {"router", "base", "reward"}
# What a cluster would put in place of a variable's source.
SOURCES = {"metadata.name": "uniarm-base-0", "status.podIP": "10.1.2.3", "requests.cpu": "2"}
CHECK_SECONDS = 20


def expanded(text, variables):
    """`text` as Kubernetes passes it: $$ is a dollar sign, $(NAME) is replaced where NAME is known."""

    def replacement(match):
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replacement, text)


def pods(text):
    """(name, arguments, variables) of each UniARM container in rendered manifests."""
    for manifest in filter(None, yaml.safe_load_all(text)):
        pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
        for container in pod.get("containers", []):
            if container["name"] not in ROLES:
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


def check(uniarm, arguments, variables):
    """The outcome of `uniarm ARGUMENTS --check` in an environment that holds none of our variables but these."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UNIARM_")}
    return subprocess.run(
        [uniarm, *arguments, "--check"],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=CHECK_SECONDS,
        check=False,
    )


def main():
    uniarm, kind, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        command_lines = list({"pods": pods, "compose": compose}[kind](file.read()))
    assert command_lines, f"{path} starts no UniARM process"
    found = []
    for name, arguments, variables in command_lines:
        outcome = check(uniarm, arguments, variables)
        if outcome.returncode != 0:
            found.append(f"{name}: uniarm {' '.join(arguments)} --check: {outcome.stderr.strip()}")
        # The control: a check that takes everything would prove nothing.
        if check(uniarm, [*arguments, "--no-such-flag"], variables).returncode == 0:
            found.append(f"{name}: {uniarm} --check takes a flag that does not exist")
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

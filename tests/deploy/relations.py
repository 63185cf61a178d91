"""Checks that the deployment files and the chart agree with each other: services, ports, mounted files, versions.

Usage: python relations.py, in the repository's root        needs PyYAML
"""

import pathlib
import re
import sys

import yaml
from command_lines import compose

COMPOSE = pathlib.Path("deploy/compose.yaml").read_text(encoding="utf-8")
SERVICES = yaml.safe_load(COMPOSE)["services"]


def read(path):
    return pathlib.Path(path).read_text(encoding="utf-8")


def processes():
    """(name, flags, prompted objectives, variables) of each UniARM service."""
    for name, arguments, variables in compose(COMPOSE):
        flags = [argument.split("=", 1) for argument in arguments[1:]]
        prompted = {text for flag, text in flags if flag == "--prompted"}
        yield name.removeprefix("service "), dict(flags), prompted, variables


def port(address):
    return int(address.rsplit(":", 1)[1])


def process_problems():
    """A process advertises where it listens, knows a store that exists, and is given the time to drain."""
    for name, flags, _, variables in processes():
        if variables["UNIARM_ADVERTISE"] != f"{name}:{port(flags['--listen'])}":
            yield f"{name} listens at {flags['--listen']} and advertises {variables['UNIARM_ADVERTISE']}"
        store = re.fullmatch(r"etcd://([\w-]+):\d+", variables["UNIARM_STORE"])
        if not store or store[1] not in SERVICES:
            yield f"{name} looks for its store at {variables['UNIARM_STORE']}"
        grace = SERVICES[name]["stop_grace_period"]
        if int(grace.removesuffix("s")) <= int(variables["UNIARM_DRAIN_TIMEOUT"]):
            yield f"{name} is killed after {grace}, before it has drained"
        doors = {port(flags[flag]) for flag in ("--listen", "--http-listen") if flag in flags}
        published = {port(address) for address in SERVICES[name].get("ports", [])}
        if published and published != doors:
            yield f"{name} listens at {sorted(doors)} and publishes {sorted(published)}"


def mount_problems():
    """What is mounted is a volume of the file or a file of the repository."""
    volumes = yaml.safe_load(COMPOSE)["volumes"]
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")[0]
            exists = pathlib.Path("deploy", source).exists() if source.startswith(".") else source in volumes
            if not exists:
                yield f"{name} mounts {source}, which does not exist"


def observer_problems():
    """Prometheus scrapes every process, and the collector's pipelines are made of parts that it has."""
    targets = {
        target
        for job in yaml.safe_load(read("deploy/prometheus.yml"))["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    admin = {f"{name}:{port(flags['--admin'])}" for name, flags, _, _ in processes()}
    if targets != admin:
        yield f"Prometheus scrapes {sorted(targets)}, and the admin ports are {sorted(admin)}"
    collector = yaml.safe_load(read("deploy/otel-collector.yaml"))
    for name, pipeline in collector["service"]["pipelines"].items():
        for kind, parts in pipeline.items():
            for part in set(parts) - set(collector[kind]):
                yield f"the collector's pipeline {name} wants {part}, which is not among its {kind}"


def runbook_problems():
    """The runbook explains every alert, and no other."""
    groups = yaml.safe_load(read("deploy/alerts.yaml"))["groups"]
    rules = {rule["alert"] for group in groups for rule in group["rules"]}
    explained = set(re.findall(r"`(Uniarm\w+)`", read("deploy/runbook.md")))
    if rules != explained:
        yield f"the rules raise {sorted(rules)}, and the runbook explains {sorted(explained)}"


def agreement_problems():
    """The example of an environment, the chart and Cargo.toml say what the compose file says."""
    offered = set(re.findall(r"^#?([A-Z_]+)=", read("deploy/config/compose.env"), re.MULTILINE))
    passed_on = {key for key, value in yaml.safe_load(COMPOSE)["x-environment"].items() if value is None}
    taken = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE)) | passed_on
    if offered != taken:
        yield f"compose.env offers {sorted(offered)}, and compose.yaml takes {sorted(taken)}"

    values = yaml.safe_load(read("helm/uniarm/values.yaml"))
    in_chart = {f"{objective['name']}={objective['text']}" for objective in values["reward"]["prompted"]}
    in_compose = [prompted for name, _, prompted, _ in processes() if name.startswith("reward")]
    if any(prompted != in_chart for prompted in in_compose):
        yield f"compose.yaml prompts {in_compose}, and the chart {sorted(in_chart)}"

    version = re.search(r'^version = "(.+)"', read("Cargo.toml"), re.MULTILINE)[1]
    gpu = yaml.safe_load(read("helm/uniarm/values-gpu.yaml"))["train"]["image"]["tag"]
    if gpu != f"{version}-cuda" or f"-t uniarm:{gpu} --target cuda ." not in read("deploy/Dockerfile"):
        yield f"Cargo.toml says {version}, values-gpu.yaml wants {gpu}, and the Dockerfile has to say how to build it"
    chart = yaml.safe_load(read("helm/uniarm/Chart.yaml"))["appVersion"]
    images = {SERVICES[name]["image"] for name, _, _, _ in processes()}
    if chart != version or images != {f"uniarm:{version}"}:
        yield f"Cargo.toml says {version}, the chart {chart}, and compose.yaml {sorted(images)}"


def main():
    found = [
        *process_problems(),
        *mount_problems(),
        *observer_problems(),
        *runbook_problems(),
        *agreement_problems(),
    ]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks that the deployment files and the chart agree with each other: services, ports, mounted files, versions.

Usage: python relations.py, in the repository's root        needs PyYAML
"""

import pathlib
import re
import sys

import yaml

sys.path.append(str(pathlib.Path(__file__).parent))
from command_lines import compose  # noqa: E402 (the path above leads to it)

DEPLOY = pathlib.Path("deploy")


def problems():
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    file = yaml.safe_load(text)
    services = file["services"]
    ports = {name: set() for name in services}
    for name, arguments, variables in compose(text):
        service = name.removeprefix("service ")
        flags = dict(argument.split("=", 1) for argument in arguments[1:])
        ports[service] = {int(flags[flag].rsplit(":", 1)[1]) for flag in ("--listen", "--admin")}
        listen = flags["--listen"].rsplit(":", 1)[1]
        if variables["UNIARM_ADVERTISE"] != f"{service}:{listen}":
            yield f"{service} advertises {variables['UNIARM_ADVERTISE']}"
        grace = int(services[service]["stop_grace_period"].removesuffix("s"))
        if grace <= int(variables["UNIARM_DRAIN_TIMEOUT"]):
            yield f"{service} is killed after {grace} s, before it has drained"
        store = re.fullmatch(r"etcd://([\w-]+):\d+", variables["UNIARM_STORE"])
        if not store or store[1] not in services:
            yield f"{service} looks for its store at {variables['UNIARM_STORE']}"

    for name, service in services.items():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            exists = (DEPLOY / source).exists() if source.startswith(".") else source in file["volumes"]
            if not exists:
                yield f"{name} mounts {source}, which does not exist"
        for port in service.get("ports", []) if ports[name] else []:
            if int(port.rsplit(":", 1)[1]) not in ports[name]:
                yield f"{name} publishes {port}"

    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    scraped = {
        target for job in prometheus["scrape_configs"] for some in job["static_configs"] for target in some["targets"]
    }
    admin = {f"{name}:{max(some)}" for name, some in ports.items() if some}
    if scraped != admin:
        yield f"Prometheus scrapes {sorted(scraped)}; the admin ports are {sorted(admin)}"

    collector = yaml.safe_load((DEPLOY / "otel-collector.yaml").read_text(encoding="utf-8"))
    for name, pipeline in collector["service"]["pipelines"].items():
        for kind in ("receivers", "processors", "exporters"):
            for part in pipeline[kind]:
                if part not in collector[kind]:
                    yield f"the collector's pipeline {name} wants {part}, which is not among its {kind}"

    example = (DEPLOY / "config" / "compose.env").read_text(encoding="utf-8")
    offered = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    taken = set(re.findall(r"\$\{([A-Z_]+)", text)) | {
        key for key, value in file["x-environment"].items() if value is None
    }
    if offered != taken:
        yield f"compose.env offers {sorted(offered)}, compose.yaml takes {sorted(taken)}"

    values = yaml.safe_load(pathlib.Path("helm/uniarm/values.yaml").read_text(encoding="utf-8"))
    in_chart = {f"{objective['name']}={objective['text']}" for objective in values["reward"]["prompted"]}
    for name, arguments, _ in compose(text):
        prompted = {argument.removeprefix("--prompted=") for argument in arguments if argument.startswith("--prompted=")}
        if arguments[0] == "reward" and prompted != in_chart:
            yield f"{name} prompts {sorted(prompted)}, the chart {sorted(in_chart)}"

    version = re.search(r'^version = "(.+)"', pathlib.Path("Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    chart = yaml.safe_load(pathlib.Path("helm/uniarm/Chart.yaml").read_text(encoding="utf-8"))
    images = {service["image"] for service in services.values() if service["image"].startswith("uniarm:")}
    if chart["appVersion"] != version or images != {f"uniarm:{version}"}:
        yield f"Cargo.toml says {version}, the chart {chart['appVersion']}, compose {sorted(images)}"


def main():
    found = list(problems())
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

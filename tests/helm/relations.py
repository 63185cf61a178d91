"""Checks what no schema can see in rendered manifests: that names which refer to each other do so.

Usage: python relations.py FILE        needs PyYAML
"""

import re
import sys

import yaml

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
FLAG_PORTS = (("--listen", "grpc"), ("--advertise", "grpc"), ("--http-listen", "http"), ("--admin", "admin"))


def of_kind(manifests, *kinds):
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def name_of(manifest):
    return manifest["metadata"]["name"]


def containers(workload):
    return workload["spec"]["template"]["spec"]["containers"]


def port(address):
    return int(address.rsplit(":", 1)[1])


def selects(selector, workload):
    return selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()


def service_problems(service, workloads):
    """Each Service leads to one workload, at ports that it has."""
    behind = [workload for workload in workloads if selects(service["spec"]["selector"], workload)]
    if len(behind) != 1:
        yield f"it selects {[name_of(workload) for workload in behind]}, and one is meant"
        return
    named = {port["name"] for container in containers(behind[0]) for port in container["ports"]}
    for target in (port["targetPort"] for port in service["spec"]["ports"]):
        if target not in named:
            yield f"it leads to port {target}, which {name_of(behind[0])} does not have"


def workload_problems(workload, manifests):
    """A workload owns its pods, belongs to a Service and an account that exist, and confines what it runs."""
    spec, pod = workload["spec"], workload["spec"]["template"]["spec"]
    accounts = {name_of(account) for account in of_kind(manifests, "ServiceAccount")}
    services = {name_of(service) for service in of_kind(manifests, "Service")}
    if not selects(spec["selector"]["matchLabels"], workload):
        yield "it does not select its own pods"
    if accounts and pod["serviceAccountName"] not in accounts:
        yield f"it runs as {pod['serviceAccountName']}, and the accounts are {accounts}"
    if workload["kind"] == "StatefulSet" and spec["serviceName"] not in services:
        yield f"it belongs to Service {spec['serviceName']}, which does not exist"
    if not pod["securityContext"]["runAsNonRoot"]:
        yield "it may run as root"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    volumes |= {name_of(claim) for claim in spec.get("volumeClaimTemplates", [])}
    for container in containers(workload):
        yield from container_problems(container, volumes)
        yield from flag_problems(container, pod, manifests)


def container_problems(container, volumes):
    """A container mounts volumes that exist, is probed at ports that it has, and is confined."""
    ports = {port["name"] for port in container["ports"]}
    for kind in PROBES:
        probed = container.get(kind, {}).get("httpGet", {}).get("port")
        if probed is not None and probed not in ports:
            yield f"its {kind} asks port {probed}, which it does not have"
    for mount in container["volumeMounts"]:
        if mount["name"] not in volumes:
            yield f"it mounts {mount['name']}, which is no volume"
    security = container["securityContext"]
    if not security["readOnlyRootFilesystem"] or security["allowPrivilegeEscalation"]:
        yield f"its container {container['name']} is not confined"


def flag_problems(container, pod, manifests):
    """The flags say what the manifest says: ports, the bundled store, and the time to drain."""
    flags = dict(argument.split("=", 1) for argument in container.get("args", []) if "=" in argument)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for flag, name in FLAG_PORTS:
        if flag in flags and port(flags[flag]) != ports.get(name):
            yield f"{flag}={flags[flag]}, and its port {name} is {ports.get(name)}"
    if "http" in ports and "--http-listen" not in flags:
        yield f"nobody listens at its port http, {ports['http']}"
    served = {
        f"{name_of(service)}:{port['port']}"
        for service in of_kind(manifests, "Service")
        for port in service["spec"]["ports"]
    }
    for store in re.findall(r"[\w.-]+-etcd:\d+", flags.get("--store", "")):
        if store not in served:
            yield f"its store is {store}, and the services are {sorted(served)}"
    if "--drain-timeout" in flags and pod["terminationGracePeriodSeconds"] <= int(flags["--drain-timeout"]):
        yield f"it is killed after {pod['terminationGracePeriodSeconds']} s, before it has drained"


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        manifests = [manifest for manifest in yaml.safe_load_all(file) if manifest]
    workloads = of_kind(manifests, "Deployment", "StatefulSet")
    found = [
        f"Service {name_of(service)}: {problem}"
        for service in of_kind(manifests, "Service")
        for problem in service_problems(service, workloads)
    ]
    found += [
        f"{workload['kind']} {name_of(workload)}: {problem}"
        for workload in workloads
        for problem in workload_problems(workload, manifests)
    ]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

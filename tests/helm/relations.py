"""Checks what no schema can see in rendered manifests: that names which refer to each other do so.

Usage: python relations.py FILE        needs PyYAML
"""

import re
import sys

import yaml


def containers(workload):
    return workload["spec"]["template"]["spec"]["containers"]


def selected(selector, labels):
    return selector.items() <= labels.items()


def problems(manifests):
    services = [m for m in manifests if m["kind"] == "Service"]
    workloads = [m for m in manifests if m["kind"] in ("Deployment", "StatefulSet")]
    accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
    ports_of = {}

    for service in services:
        name, selector = service["metadata"]["name"], service["spec"]["selector"]
        ports_of[name] = {port["port"] for port in service["spec"]["ports"]}
        behind = [w for w in workloads if selected(selector, w["spec"]["template"]["metadata"]["labels"])]
        if len(behind) != 1:
            yield f"Service {name} selects {[w['metadata']['name'] for w in behind]}: one workload is meant"
            continue
        named = {port["name"] for container in containers(behind[0]) for port in container["ports"]}
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in named:
                yield f"Service {name} leads to port {port['targetPort']}, which {behind[0]['metadata']['name']} does not have"

    for workload in workloads:
        name, spec = workload["metadata"]["name"], workload["spec"]
        pod = spec["template"]["spec"]
        if not selected(spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]):
            yield f"{name} does not select its own pods"
        if accounts and pod["serviceAccountName"] not in accounts:
            yield f"{name} runs as {pod['serviceAccountName']}, which is not among {accounts}"
        if workload["kind"] == "StatefulSet" and spec["serviceName"] not in ports_of:
            yield f"{name} belongs to Service {spec['serviceName']}, which does not exist"
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
        for container in containers(workload):
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind)
                if probe and probe["httpGet"]["port"] not in ports:
                    yield f"{name}: {kind} asks port {probe['httpGet']['port']}"
            for mount in container["volumeMounts"]:
                if mount["name"] not in volumes:
                    yield f"{name} mounts {mount['name']}, which is no volume"
            security = container["securityContext"]
            if not security["readOnlyRootFilesystem"] or security["allowPrivilegeEscalation"]:
                yield f"{name}: {container['name']} is not confined"
            if not pod["securityContext"]["runAsNonRoot"]:
                yield f"{name} may run as root"
            flags = dict(argument.split("=", 1) for argument in container.get("args", []) if "=" in argument)
            for flag, port in (("--listen", "grpc"), ("--advertise", "grpc"), ("--admin", "admin")):
                if flag in flags and int(flags[flag].rsplit(":", 1)[1]) != ports[port]:
                    yield f"{name}: {flag}={flags[flag]} and port {port} is {ports[port]}"
            # A bundled store is a Service of this release, at a port that it has.
            for host, port in re.findall(r"([\w.-]+-etcd):(\d+)", flags.get("--store", "")):
                if int(port) not in ports_of.get(host, ()):
                    yield f"{name}: no Service {host} with port {port}"
            grace = pod["terminationGracePeriodSeconds"] if "--drain-timeout" in flags else None
            if grace is not None and grace <= int(flags["--drain-timeout"]):
                yield f"{name} is killed after {grace} s, before it has drained"


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        found = list(problems([m for m in yaml.safe_load_all(file) if m]))
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks what no schema can see in rendered manifests: that names which refer to each other do so.

Usage: python relations.py FILE        needs PyYAML
"""

import re
import sys

import yaml

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
FILE_FLAGS = ("--tls-", "--front-", "--admin-", "--tenants", "--store-")
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
# Kinds of routes, and what the port that they lead to may speak.
ROUTES = {"GRPCRoute": {"kubernetes.io/h2c", "https"}, "HTTPRoute": {"http", "https"}}
POD_INDEX = "apps.kubernetes.io/pod-index"  # a label that Kubernetes gives the pods of a StatefulSet
GROUP = "uniarm.internal/group"
# Characters of a label, and those that a StatefulSet's name gets behind it in one.
LABEL_MAX, REVISION = 63, len("-") + 10
NAMESPACE = "steering"  # that check.sh renders for
# Containers that open models, and where the image puts those of the hub.
WITH_MODELS, HUB = ("base", "reward", "train"), "/cache/huggingface"
FLAG_PORTS = (("--listen", "grpc"), ("--advertise", "grpc"), ("--admin", "admin"), ("--http-listen", "http"))


def of_kind(manifests, *kinds):
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def name_of(manifest):
    return manifest["metadata"]["name"]


def pod_of(workload):
    """The pod that a workload makes, or that it is."""
    return workload if workload["kind"] == "Pod" else workload["spec"]["template"]


def containers(workload):
    return pod_of(workload)["spec"]["containers"]


def port(address):
    return int(address.rsplit(":", 1)[1])


def labels_of(workload):
    return pod_of(workload)["metadata"]["labels"]


def role_of(workload):
    return labels_of(workload)["app.kubernetes.io/component"]


def selects(selector, workload):
    """Whether some pod of a workload is selected."""
    index = {POD_INDEX: "0"} if workload["kind"] == "StatefulSet" else {}
    return selector.items() <= {**labels_of(workload), **index}.items()


def pool_problem(behind):
    """What is wrong with `behind` as one workload, or as all the groups of one role."""
    if len({role_of(workload) for workload in behind}) == 1 and (len(behind) == 1 or all(map(is_group, behind))):
        return None
    return f"{[name_of(workload) for workload in behind]}, and one is meant"


def is_group(workload):
    return GROUP in labels_of(workload)


def arguments(workload):
    """The flags with a value of a workload's only container."""
    [container] = containers(workload)
    return dict(argument.split("=", 1) for argument in container.get("args", []) if "=" in argument)


def port_names(workload):
    return {port["name"] for container in containers(workload) for port in container.get("ports", [])}


def policy_problems(policy, workloads):
    """Each policy guards one pool, at all of its ports, and lets in pods that exist; or a group, from itself alone."""
    guarded = policy["spec"]["podSelector"]["matchLabels"]
    behind = [workload for workload in workloads if selects(guarded, workload)]
    if problem := pool_problem(behind):
        yield f"it guards {problem}"
        return
    rules = policy["spec"]["ingress"]
    if GROUP in guarded:
        if rules != [{"from": [{"podSelector": {"matchLabels": guarded}}]}]:
            yield f"it lets {rules} into the group {guarded[GROUP]}, and its own ranks are meant"
        return
    opened = {port["port"] for rule in rules for port in rule["ports"]}
    if opened != port_names(behind[0]):
        yield f"it opens {sorted(opened)}, and {name_of(behind[0])} has {sorted(port_names(behind[0]))}"
    for peer in (peer for rule in rules for peer in rule.get("from", [])):
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        ours = "app.kubernetes.io/instance" in labels
        if ours and not any(selects(labels, workload) for workload in workloads):
            yield f"it lets in {labels}, and no pod is that"


def budget_problems(budget, workloads):
    """Each budget is that of one pool: of a pool of groups, all of them share it, and ranks that are not ready may leave."""
    labels = budget["spec"]["selector"]["matchLabels"]
    if problem := pool_problem([workload for workload in workloads if selects(labels, workload)]):
        yield f"it is of {problem}"
    if budget["spec"]["unhealthyPodEvictionPolicy"] != "AlwaysAllow":
        yield "it keeps pods that serve nobody"


def service_problems(service, workloads):
    """Each Service leads to one pool, at ports that it has; of a group, rank 0 alone answers calls."""
    selector = service["spec"]["selector"]
    behind = [workload for workload in workloads if selects(selector, workload)]
    if problem := pool_problem(behind):
        yield f"it selects {problem}"
        return
    calls = any(port["targetPort"] == "grpc" for port in service["spec"]["ports"])
    if is_group(behind[0]) and calls != (selector.get(POD_INDEX) == "0"):
        yield f"it selects {selector}, and leads to {service['spec']['ports']}"
    named = port_names(behind[0])
    for target in (port["targetPort"] for port in service["spec"]["ports"]):
        if target not in named:
            yield f"it leads to port {target}, which {name_of(behind[0])} does not have"


def workload_problems(workload, manifests):
    """A workload owns its pods, belongs to a Service and an account that exist, and confines what it runs."""
    spec, pod = workload["spec"], pod_of(workload)["spec"]
    accounts = {name_of(account) for account in of_kind(manifests, "ServiceAccount")}
    services = {name_of(service) for service in of_kind(manifests, "Service")}
    if "selector" in spec and not selects(spec["selector"]["matchLabels"], workload):
        yield "it does not select its own pods"
    if accounts and pod["serviceAccountName"] not in accounts:
        yield f"it runs as {pod['serviceAccountName']}, and the accounts are {accounts}"
    if workload["kind"] == "StatefulSet" and spec["serviceName"] not in services:
        yield f"it belongs to Service {spec['serviceName']}, which does not exist"
    longest = re.sub(r"-g\d+$", "-g999", name_of(workload))
    if workload["kind"] == "StatefulSet" and len(longest) + REVISION > LABEL_MAX:
        yield f"Kubernetes makes a label of its name and {REVISION} characters more, and takes {LABEL_MAX}"
    if not pod["securityContext"]["runAsNonRoot"] or pod["securityContext"]["seccompProfile"]["type"] != "RuntimeDefault":
        yield "it may run as root, or call what it likes"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    for container in containers(workload):
        yield from container_problems(container, volumes)
        yield from flag_problems(container, pod, manifests)


def certificate_problems(certificate, workloads):
    """A certificate says the role of the one pool that mounts its secret."""
    secret = certificate["spec"]["secretName"]
    mounted = [
        workload
        for workload in workloads
        if any(secret == volume.get("secret", {}).get("secretName") for volume in pod_of(workload)["spec"].get("volumes", []))
    ]
    if problem := pool_problem(mounted):
        yield f"its secret is mounted by {problem}"
        return
    role = role_of(mounted[0])
    if certificate["spec"]["dnsNames"] != [f"{role}.uniarm.internal"]:
        yield f"it is for {certificate['spec']['dnsNames']}, and {name_of(mounted[0])} is a {role}"


def scaler_problems(scaler, workloads):
    """A scaler is that of one workload, which says no number of pods itself, and lets one pod leave before the next."""
    spec = scaler["spec"]
    target = spec["scaleTargetRef"]
    scaled = [workload for workload in workloads if (workload["kind"], name_of(workload)) == (target["kind"], target["name"])]
    if len(scaled) != 1:
        yield f"it scales {target['kind']} {target['name']}, which does not exist"
        return
    if "replicas" in scaled[0]["spec"]:
        yield f"{name_of(scaled[0])} says {scaled[0]['spec']['replicas']} replicas: every upgrade would set them"
    behavior = spec["behavior"] if "behavior" in spec else spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    [down] = behavior["scaleDown"]["policies"]
    grace = pod_of(scaled[0])["spec"]["terminationGracePeriodSeconds"]
    if (down["type"], down["value"]) != ("Pods", 1) or down["periodSeconds"] < grace:
        yield f"its pool shrinks by {down}, and a pod takes up to {grace} s to leave"


def scaled_problems(manifests):
    """A workload without replicas has a scaler, and external metrics have a rule."""
    targets = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in of_kind(manifests, *SCALERS)}
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        if "replicas" not in workload["spec"] and name_of(workload) not in targets:
            yield f"{name_of(workload)} has no replicas, and nothing scales it"
    wanted = {
        metric["external"]["metric"]["name"]
        for scaler in of_kind(manifests, "HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
        if metric["type"] == "External"
    }
    rules = [
        rule["name"]["as"]
        for rendered in of_kind(manifests, "ConfigMap")
        for rule in yaml.safe_load(rendered["data"]["values.yaml"])["rules"]["external"]
    ]
    if sorted(wanted) != sorted(rules):
        yield f"the scalers read {sorted(wanted)}, and the rules make {sorted(rules)}"


def group_problems(workload, manifests):
    """A group is as many ranks as it says, under a name of its own; they start at once, and let each other in."""
    name, spec, flags = name_of(workload), workload["spec"], arguments(workload)
    if (flags["--group"], int(flags["--size"])) != (name, spec["replicas"]) or labels_of(workload)[GROUP] != name:
        yield f"its ranks are {flags['--size']} of {flags['--group']}, and it has {spec['replicas']} pods"
    [rank] = [variable for variable in containers(workload)[0]["env"] if f"$({variable['name']})" == flags["--rank"]]
    if rank["valueFrom"]["fieldRef"]["fieldPath"] != f"metadata.labels['{POD_INDEX}']":
        yield f"the rank of a pod comes from {rank['valueFrom']}"
    if spec["podManagementPolicy"] != "Parallel" or spec["updateStrategy"] != {"type": "OnDelete"}:
        yield "its ranks would wait for each other to be ready, which none is alone"
    [service] = [service for service in of_kind(manifests, "Service") if name_of(service) == spec["serviceName"]]
    if service["spec"]["clusterIP"] != "None" or not service["spec"]["publishNotReadyAddresses"]:
        yield f"its Service {name_of(service)} does not name ranks that are not ready"
    policies = of_kind(manifests, "NetworkPolicy")
    if policies and name not in map(name_of, policies):
        yield "no policy lets its ranks reach each other"


def groups_problems(manifests):
    """Each group is of a StatefulSet, and the store knows it by one name."""
    workloads = of_kind(manifests, "Deployment", "StatefulSet")
    for workload in workloads:
        if "--group" in arguments(workload) and workload["kind"] != "StatefulSet":
            yield f"{name_of(workload)} is a group, and its pods have no ranks"
        elif "--group" in arguments(workload):
            yield from (f"{name_of(workload)}: {problem}" for problem in group_problems(workload, manifests))
    names = [arguments(workload).get("--group") for workload in workloads if is_group(workload)]
    if len(set(names)) != len(names):
        yield f"groups share a name: {sorted(names)}"


def route_problems(route, manifests):
    """A route leads from Gateways that may reach the routers to a port of a Service that speaks its protocol."""
    spec = route["spec"]
    if route["apiVersion"] != "gateway.networking.k8s.io/v1" or not spec["parentRefs"]:
        yield f"it is of {route['apiVersion']}, with parents {spec['parentRefs']}"
    [backend] = [backend for rule in spec["rules"] for backend in rule["backendRefs"]]
    spoken = [
        port["appProtocol"]
        for service in of_kind(manifests, "Service")
        for port in service["spec"]["ports"]
        if (name_of(service), port["port"]) == (backend["name"], backend["port"])
    ]
    if len(spoken) != 1 or spoken[0] not in ROUTES[route["kind"]]:
        yield f"it leads to {backend}, where {spoken} is spoken"
    port_name = route["kind"].removesuffix("Route").lower()
    for policy in of_kind(manifests, "NetworkPolicy"):
        if policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] != "router":
            continue
        [rule] = [rule for rule in policy["spec"]["ingress"] if rule["ports"][0]["port"] == port_name]
        let_in = [peer.get("namespaceSelector", {}).get("matchLabels", {}) for peer in rule.get("from", [])]
        for parent in spec["parentRefs"]:
            namespace = parent.get("namespace", NAMESPACE)
            if let_in and {"kubernetes.io/metadata.name": namespace} not in let_in:
                yield f"its Gateway {parent['name']} is of {namespace}, and {name_of(policy)} lets in {let_in}"


def container_problems(container, volumes):
    """A container mounts volumes that exist, is probed at ports that it has, and is confined."""
    ports = {port["name"] for port in container.get("ports", [])}
    for kind in PROBES:
        probed = container.get(kind, {}).get("httpGet", {}).get("port")
        if probed is not None and probed not in ports:
            yield f"its {kind} asks port {probed}, which it does not have"
        certified = any(argument.startswith("--admin-cert=") for argument in container.get("args", []))
        scheme = container.get(kind, {}).get("httpGet", {}).get("scheme", "HTTP")
        spoken = "HTTPS" if certified else "HTTP"
        if probed == "admin" and scheme != spoken:
            yield f"its {kind} speaks {scheme}, and its admin port {spoken}"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"it mounts {mount['name']}, which is no volume"
    mounts = tuple(mount["mountPath"] + "/" for mount in container.get("volumeMounts", []))
    for argument in container.get("args", []):
        flag, _, path = argument.partition("=")
        if flag.startswith(FILE_FLAGS) and path.startswith("/") and not path.startswith(mounts):
            yield f"{argument} is in no volume"
    hub = {variable["name"]: variable.get("value") for variable in container.get("env", [])}.get("HF_HOME", HUB)
    if container["name"] in WITH_MODELS and not hub.startswith(mounts):
        yield f"models of the hub would go to {hub}, which is in no volume"
    security = container["securityContext"]
    capabilities = security["capabilities"] == {"drop": ["ALL"]}
    if not security["readOnlyRootFilesystem"] or security["allowPrivilegeEscalation"] or not capabilities:
        yield f"its container {container['name']} is not confined"


def flag_problems(container, pod, manifests):
    """The flags say what the manifest says: ports, the bundled store, and the time to drain."""
    flags = dict(argument.split("=", 1) for argument in container.get("args", []) if "=" in argument)
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    for flag, name in FLAG_PORTS:
        if flag in flags and port(flags[flag]) != ports[name]:
            yield f"{flag}={flags[flag]}, and its port {name} is {ports[name]}"
    served = {
        f"{name_of(service)}:{port['port']}"
        for service in of_kind(manifests, "Service")
        for port in service["spec"]["ports"]
    }
    for store in re.findall(r"[\w.-]+-etcd:\d+", flags.get("--store", "")):
        if store not in served:
            yield f"its store is {store}, and the services are {sorted(served)}"
    for endpoint in re.findall(r"https?://([\w.-]+:\d+)", flags.get("--endpoint", "")):
        if endpoint not in served:
            yield f"it asks {endpoint}, and the services are {sorted(served)}"
    if "--drain-timeout" in flags and pod["terminationGracePeriodSeconds"] <= int(flags["--drain-timeout"]):
        yield f"it is killed after {pod['terminationGracePeriodSeconds']} s, before it has drained"


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        manifests = [manifest for manifest in yaml.safe_load_all(file) if manifest]
    workloads = of_kind(manifests, "Deployment", "StatefulSet", "Job", "Pod")
    checks = {
        "Service": service_problems,
        "NetworkPolicy": policy_problems,
        "Certificate": certificate_problems,
        "PodDisruptionBudget": budget_problems,
        **dict.fromkeys(SCALERS, scaler_problems),
    }
    found = [
        f"{kind} {name_of(manifest)}: {problem}"
        for kind, problems in checks.items()
        for manifest in of_kind(manifests, kind)
        for problem in problems(manifest, workloads)
    ]
    found += [
        f"{workload['kind']} {name_of(workload)}: {problem}"
        for workload in workloads
        for problem in workload_problems(workload, manifests)
    ]
    found += scaled_problems(manifests)
    found += groups_problems(manifests)
    found += [
        f"{route['kind']} {name_of(route)}: {problem}"
        for route in of_kind(manifests, *ROUTES)
        for problem in route_problems(route, manifests)
    ]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

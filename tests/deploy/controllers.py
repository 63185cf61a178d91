"""The pods that Kubernetes' controllers would make of rendered manifests, with the names and labels that they would give them.

Needs PyYAML.
"""

import copy
import hashlib
import json

import yaml

POD_INDEX = "apps.kubernetes.io/pod-index"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"


def manifests_of(text, *kinds):
    return [manifest for manifest in yaml.safe_load_all(text) if manifest and manifest["kind"] in kinds]


def digest(template):
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]


def pod(template, name, labels=(), annotations=()):
    made = copy.deepcopy(template)
    metadata = made["metadata"]
    metadata["name"] = name
    metadata["labels"] = {**metadata["labels"], **dict(labels)}
    metadata["annotations"] = {**metadata.get("annotations", {}), **dict(annotations)}
    return made


def pods_of(workload):
    """The pods of a Deployment, a StatefulSet or an Indexed Job; a Job without indices has one."""
    kind, name, spec = workload["kind"], workload["metadata"]["name"], workload["spec"]
    template = spec["template"]
    if kind == "StatefulSet":
        for index in range(spec["replicas"]):
            yield pod(template, f"{name}-{index}", labels={POD_INDEX: str(index)})
    elif kind == "Deployment":
        for index in range(spec["replicas"]):
            yield pod(template, f"{name}-{digest(template)}-{index}")
    else:
        for index in range(spec.get("completions", 1)):
            yield pod(template, f"{name}-{index}", annotations={COMPLETION_INDEX: str(index)})


def served(text):
    """{name: pod} of everything that goes on until it is told to end."""
    workloads = manifests_of(text, "Deployment", "StatefulSet")
    return {made["metadata"]["name"]: made for workload in workloads for made in pods_of(workload)}


def jobs(text, component):
    """The pods of a job of this component."""
    found = [job for job in manifests_of(text, "Job") if job["metadata"]["labels"]["app.kubernetes.io/component"] == component]
    assert len(found) == 1, f"{len(found)} jobs are {component}"
    return list(pods_of(found[0]))

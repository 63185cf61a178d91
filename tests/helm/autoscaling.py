"""Checks that the simulator's autoscaler has the chart's numbers, by default and of a release, and a rendered scaler too.

Usage: python autoscaling.py UNIARM RENDERED        RENDERED: of tests/helm/values/autoscaled-keda.yaml; needs PyYAML
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import yaml

SIMULATE = ["simulate", "--requests", "1", "--json"]


def followed(uniarm, flag):
    """The values that `uniarm simulate` follows."""
    outcome = subprocess.run([uniarm, *SIMULATE, flag], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(outcome.stdout)["values"]


def shrunk(like, values):
    """`values` with no more keys than `like` has."""
    if not isinstance(like, dict):
        return values
    return {key: shrunk(like[key], values[key]) for key in like}


def scaler(values, pool):
    """What a ScaledObject says, from the values that the simulator follows."""
    scaling = values["autoscaling"]
    targets = scaling[pool]
    up, down = scaling["scaleUp"], scaling["scaleDown"]
    period = up["periodSeconds"]
    return {
        "least": targets["minReplicas"],
        "most": targets["maxReplicas"],
        "thresholds": {
            name: target
            for name, target in targets.items()
            if target is not None and name not in ("enabled", "minReplicas", "maxReplicas")
        },
        "up": (up["stabilizationSeconds"], [("Percent", up["percent"], period), ("Pods", up["pods"], period)]),
        "down": (down["stabilizationSeconds"], [("Pods", 1, values["drainTimeoutSeconds"] + 10)]),
    }


def rendered_scaler(manifest):
    spec = manifest["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    policies = lambda rules: [(policy["type"], policy["value"], policy["periodSeconds"]) for policy in rules["policies"]]
    direction = lambda rules: (rules["stabilizationWindowSeconds"], policies(rules))
    return {
        "least": spec["minReplicaCount"],
        "most": spec["maxReplicaCount"],
        "thresholds": {trigger["name"]: float(trigger["metadata"]["threshold"]) for trigger in spec["triggers"]},
        "up": direction(behavior["scaleUp"]),
        "down": direction(behavior["scaleDown"]),
    }


def merged(values, over):
    if not isinstance(over, dict):
        return over
    return {**values, **{key: merged(values.get(key, {}), value) for key, value in over.items()}}


def main():
    uniarm, rendered = sys.argv[1:3]
    read = lambda path: yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    chart = read("helm/uniarm/values.yaml")
    own = followed(uniarm, "--autoscale")
    found = []
    if own != shrunk(own, chart):
        found.append(f"by default the simulator follows {own}, and the chart says {shrunk(own, chart)}")
    release = merged(chart, read("tests/helm/values/autoscaled-keda.yaml"))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(release, file)
        file.flush()
        followed_release = followed(uniarm, f"--autoscale={file.name}")
    for manifest in filter(None, yaml.safe_load_all(pathlib.Path(rendered).read_text(encoding="utf-8"))):
        if manifest["kind"] == "ScaledObject":
            pool = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
            wanted, said = scaler(followed_release, pool), rendered_scaler(manifest)
            if wanted != said:
                found.append(f"for {pool} the simulator follows {wanted}, and the chart renders {said}")
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

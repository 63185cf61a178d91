"""Takes the expressions that scale pools out of the rendered chart, where KEDA and prometheus-adapter read them.

Usage: python signals.py HPA KEDA RULES        HPA, KEDA: rendered manifests; needs PyYAML
Writes RULES, recording rules for promtool to parse; exit 1 where the two ways to scale do not ask the same.
"""

import pathlib
import re
import sys

import yaml

LABELS = ("namespace", "pod")  # the chart's defaults


def manifests(path):
    return filter(None, yaml.safe_load_all(pathlib.Path(path).read_text(encoding="utf-8")))


def of_keda(path):
    """{(pool, signal): expression} of the ScaledObjects."""
    return {
        (manifest["metadata"]["labels"]["app.kubernetes.io/component"], trigger["name"]): trigger["metadata"]["query"]
        for manifest in manifests(path)
        if manifest["kind"] == "ScaledObject"
        for trigger in manifest["spec"]["triggers"]
    }


def of_adapter(path):
    """The same of the adapter's rules; a series that says when the metric is there counts as an expression too."""
    [config] = [manifest for manifest in manifests(path) if manifest["kind"] == "ConfigMap"]
    found, series = {}, {}
    for rule in yaml.safe_load(config["data"]["values.yaml"])["rules"]["external"]:
        pool, signal = re.fullmatch(r"steering_trial_uniarm_(\w+?)_(\w+)", rule["name"]["as"]).groups()
        found[pool, signal] = rule["metricsQuery"]
        series[pool, signal] = rule["seriesQuery"]
    return found, series


def read(path):
    """{(pool, signal): expression} of a file that this program wrote."""
    [group] = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))["groups"]
    return {tuple(rule["record"].split(":")): rule["expr"] for rule in group["rules"]}


def main():
    hpa, keda, rules = sys.argv[1:4]
    asked = of_keda(keda)
    made, series = of_adapter(hpa)
    if asked != made:
        print(f"KEDA asks {asked}, and the adapter {made}")
        return 1
    for key, expression in asked.items():
        if series[key] not in expression:
            print(f"the adapter looks for {series[key]}, which {expression} does not read")
            return 1
    recorded = [{"record": ":".join(key), "expr": expression} for key, expression in asked.items()]
    pathlib.Path(rules).write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": recorded}]}), encoding="utf-8")
    return 0 if recorded else 1


if __name__ == "__main__":
    sys.exit(main())

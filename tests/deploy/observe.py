"""A real Prometheus watches the compose file's cluster: every panel and every signal that scales a pool has data, and a
killed worker raises its alert.

Usage: python observe.py UNIARM ETCD MODEL PROMETHEUS SCALING        needs PyYAML; SCALING: a file of signals.py
"""

import json
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import yaml
from cluster import Addresses, Cluster, page, start, told
from signals import LABELS, read

QUESTION = [
    "--preference=positive=0.7,concise=0.3",
    "--max-tokens=64",
    "--on-reward-loss=unguided",
    "--json",
    "Tell me about the sea.",
]
STREAMS = 6
LOAD_S = 25  # long enough for two scrapes around everything that happens
DATA_S = 60
ALERT_S = 60
READY_S = 30
WORKERS = 3  # more than there are of a pool: no signal is more than each of them full


def configuration(cluster, folder):
    """deploy/prometheus.yml and deploy/alerts.yaml, with this machine's addresses and without their patience."""
    config = yaml.safe_load(pathlib.Path("deploy/prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / "alerts.yaml"), str(pathlib.Path("deploy/recording.yaml").resolve())]
    for job in config["scrape_configs"]:
        job["static_configs"] = [
            {"targets": [cluster.addresses.translate("", target)], "labels": pod_labels(job["job_name"], number)}
            for static in job["static_configs"]
            for number, target in enumerate(static["targets"])
        ]
    rules = yaml.safe_load(pathlib.Path("deploy/alerts.yaml").read_text(encoding="utf-8"))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["for"] = "0s"
    (folder / "alerts.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")


def pod_labels(role, number):
    """What a scrape of the pods would add: the chart's expressions ask for it."""
    namespace, pod = LABELS
    return {namespace: "steering", pod: f"trial-uniarm-{role}-{number}"}


class Prometheus:
    def __init__(self, stack, binary, cluster, folder):
        configuration(cluster, folder)
        self.address = Addresses().here("prometheus", "0.0.0.0:9090")
        command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={self.address}"]
        start(stack, command, {}, folder / "prometheus.log")
        deadline = time.monotonic() + READY_S
        while page(self.address, "/-/ready")[0] != 200:
            assert time.monotonic() < deadline, "Prometheus is not ready"
            time.sleep(0.2)

    def ask(self, path, **query):
        with urllib.request.urlopen(f"http://{self.address}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def has(self, expression):
        """Whether it is a number, somewhere."""
        found = self.ask("/api/v1/query", query=expression)["result"]
        return any(series["value"][1] != "NaN" for series in found)

    def number(self, expression):
        """The one number that it is; nothing where it is none, or several."""
        found = self.ask("/api/v1/query", query=expression)["result"]
        return float(found[0]["value"][1]) if len(found) == 1 else None

    def firing(self, name):
        """The labels of what this alert says now."""
        return [
            alert["labels"]
            for alert in self.ask("/api/v1/alerts")["alerts"]
            if alert["labels"]["alertname"] == name and alert["state"] == "firing"
        ]


def panels():
    """(title, expression) of everything that the dashboard draws."""
    dashboard = json.loads(pathlib.Path("deploy/grafana/uniarm.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$__rate_interval", "60s")


def alert_metrics():
    """(alert, metric) of everything that the rules read."""
    rules = yaml.safe_load(pathlib.Path("deploy/alerts.yaml").read_text(encoding="utf-8"))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        for metric in sorted(set(re.findall(r"\buniarm_\w+|\bup\b", rule["expr"]))):
            yield rule["alert"], metric


def stream(uniarm, router):
    command = [uniarm, "generate", "--endpoint", f"http://{router}", *QUESTION]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120, check=False)


def load(uniarm, router, until):
    while time.monotonic() < until:
        stream(uniarm, router)


def busiest(cluster, role):
    """The member of this pool with the most sequences at this moment, as long as there are any."""
    running = {}
    for name, admin in cluster.admins.items():
        if name.startswith(f"{role}-"):
            count = re.search(rf"^uniarm_{role}_sequences_running\S* (\S+)$", page(admin, "/metrics")[1], re.MULTILINE)
            running[name] = float(count[1]) if count else 0.0
    name = max(running, key=running.get)
    return name if running[name] else None


def wait_for(what, seconds, ask):
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return answer


def look_at_scaling(prometheus, signals, until):
    """Each signal is one number of a size that it can have, and one that the load raises."""
    most = dict.fromkeys(signals, -1.0)
    while time.monotonic() < until:
        for (pool, name), query in signals.items():
            value = prometheus.number(query)
            if value is not None:
                assert 0.0 <= value < WORKERS, f"{pool}'s {name} is {value}: {query}"
                most[pool, name] = max(most[pool, name], value)
        time.sleep(1)
    for (pool, name), value in most.items():
        assert value > 0.0, f"under load {pool}'s {name} is never above 0 (at most {value}): {signals[pool, name]}"
    return most


def recorded():
    """(name, pool) of everything that is recorded under a name of others."""
    groups = yaml.safe_load(pathlib.Path("deploy/recording.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        yield rule["record"], rule["labels"]["name"]


def run(stack, uniarm, etcd, model, binary, scaling, folder):
    cluster = Cluster(stack, (uniarm, etcd, model), folder)
    prometheus = Prometheus(stack, binary, cluster, folder)
    wait_for("nobody is scraped", READY_S, lambda: prometheus.has("up == 1"))
    assert not prometheus.firing("UniarmMemberDown"), prometheus.firing("UniarmMemberDown")

    until = time.monotonic() + LOAD_S
    clients = [threading.Thread(target=load, args=(uniarm, cluster.router, until)) for _ in range(STREAMS)]
    for client in clients:
        client.start()
    signals = read(scaling)
    under_load = look_at_scaling(prometheus, signals, until - LOAD_S / 2)
    # In the middle of streams: some move to the other base worker.
    cluster.processes[wait_for("no base worker has a stream", READY_S, lambda: busiest(cluster, "base"))].kill()
    for client in clients:
        client.join()
    # One alone: how much is drafted beside others is the worker's to decide, and may be nothing.
    stream(uniarm, cluster.router)
    for title, expression in panels():
        wait_for(f"the panel {title!r} has no data: {expression}", DATA_S, lambda e=expression: prometheus.has(e))
    for name, pool in recorded():
        assert prometheus.has(f'{name}{{name="{pool}"}}'), f"nothing is recorded as {name} of {pool}"
    for alert, metric in alert_metrics():
        assert prometheus.has(metric), f"the alert {alert} reads {metric}, which nobody exports"

    for (pool, name), query in signals.items():
        # The stall is that of the last two minutes; what is counted at one moment falls at once.
        most = WORKERS if name == "stall" else under_load[pool, name] / 2
        rests = lambda q=query, m=most: (value := prometheus.number(q)) is not None and value <= m
        wait_for(f"without load {pool}'s {name} does not fall to {most}: {query}", READY_S, rests)

    cluster.processes["reward-1"].kill()
    address = cluster.admins["reward-1"]
    down = lambda: [labels for labels in prometheus.firing("UniarmMemberDown") if labels["instance"] == address]
    wait_for("the alert of a killed reward worker does not fire", ALERT_S, down)
    assert not prometheus.firing("UniarmPoolGone"), prometheus.firing("UniarmPoolGone")


if __name__ == "__main__":
    sys.exit(told(run, *sys.argv[1:6]))

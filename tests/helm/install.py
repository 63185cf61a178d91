"""Installs the chart into a real API server with real controllers, whose pods run as processes: it answers, is tested, scaled,
upgraded under load, goes over to groups, and is gone once it is uninstalled.

Usage: python install.py SERVERS ETCD UNIARM MODEL HELM KUBECTL        needs PyYAML and openssl, and Linux
SERVERS: a folder of scripts/kube-apiserver.sh.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import time

from apiserver import PLACES, Server, converted  # noqa: F401 (the import finds tests/deploy)
from kubelet import Kubelet
import node
from chart import Load, TWO_OF_EACH
from cluster import ask, told

COMMAND_S = 300
GONE_S = 60
VALUES = "--values helm/uniarm/values-cpu-demo.yaml --set drainTimeoutSeconds=2"
QUESTION = ["--preference=positive=0.7,concise=0.3", "--temperature=0", "--max-tokens=32", "Tell me about the sea."]
STREAMS = 2


class Shell:
    """Commands as a person types them, with `helm` translated and `kubectl` as it is."""

    def __init__(self, server, helm, kubectl, folder):
        programs = folder / "bin"
        programs.mkdir()
        here = pathlib.Path(__file__).parent
        self.write(programs / "helm", [sys.executable, here / "translated.py", helm])
        self.write(programs / "kubectl", [kubectl])
        # Nothing that a person has configured for another cluster is read.
        own = {"KUBECONFIG": str(server.kubeconfig), "HELM_NAMESPACE": server.namespace, "HOME": str(folder)}
        self.environment = {**os.environ, **own, "PATH": f"{programs}:{os.environ['PATH']}"}

    @staticmethod
    def write(path, command):
        path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n', encoding="utf-8")
        path.chmod(0o755)

    def run(self, line):
        outcome = subprocess.run(
            line, shell=True, capture_output=True, text=True, timeout=COMMAND_S, check=False, env=self.environment
        )
        print(f"$ {line}", *outcome.stderr.splitlines()[-3:], sep="\n")
        assert outcome.returncode == 0, f"{line}: {outcome.stdout}{outcome.stderr}"
        return outcome.stdout


class Installed:
    """What a Load asks: the routers' Service."""

    def __init__(self, uniarm, where):
        self.uniarm, self.node = uniarm, where

    def answer(self):
        endpoint = f"{self.node.address_of('service steering-uniarm')}:7000"
        return ask(self.uniarm, endpoint, "generate", *QUESTION)["tokens"]


def names(server, kind):
    return sorted(item["metadata"]["name"] for item in server.items(kind))


def images(server, kind, role):
    """The pods of a role, by their names, with what makes them what they are."""
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in server.items(kind)
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == role
    }


def upgraded_under_load(shell, server, release, tokens):
    before = images(server, "Pod", "base") | images(server, "Pod", "router")
    with Load(release, tokens, STREAMS):
        shell.run("helm upgrade steering helm/uniarm --reuse-values --set log=text --wait --timeout 10m")
        shell.run("kubectl rollout status statefulset/steering-uniarm-base --timeout=5m")
        shell.run("kubectl rollout status deployment/steering-uniarm-reward --timeout=5m")
    after = images(server, "Pod", "base") | images(server, "Pod", "router")
    assert not set(before.values()) & set(after.values()), f"the upgrade left pods as they were: {before} {after}"


def gone(server):
    """Nothing of the release is left, however long its pods take to leave."""
    deadline = time.monotonic() + GONE_S
    while left := [(kind, name) for kind in PLACES for name in names(server, kind) if "uniarm" in name]:
        assert time.monotonic() < deadline, f"uninstalled, and there are still {left}"
        time.sleep(0.5)


def run(stack, servers, etcd, uniarm, model, helm, kubectl, folder):
    server = Server(stack, servers, etcd, folder)
    server.start_controllers()
    where = node.Node(stack, {"uniarm": uniarm, "etcd": etcd}, model, folder)
    kubelet = Kubelet(stack, server, where)
    shell, release = Shell(server, helm, kubectl, folder), Installed(uniarm, where)
    shell.run(f"helm install steering helm/uniarm {VALUES} --wait --timeout 10m")
    shell.run("helm test steering")
    tokens = release.answer()
    shell.run("kubectl scale deployment/steering-uniarm-reward --replicas=2")
    shell.run("kubectl rollout status deployment/steering-uniarm-reward --timeout=5m")
    shell.run(f"helm upgrade steering helm/uniarm --reuse-values {TWO_OF_EACH} --wait --timeout 10m")
    upgraded_under_load(shell, server, release, tokens)
    assert release.answer() == tokens
    shell.run("helm uninstall steering --wait")
    gone(server)
    assert not kubelet.problems, "\n".join(kubelet.problems)


if __name__ == "__main__":
    sys.exit(told(run, *sys.argv[1:]))

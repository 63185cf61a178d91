"""Installs the chart into a real API server with real controllers, whose pods run as processes, by the very commands of
docs/kubernetes.md: it answers, is tested, scaled, upgraded and rolled back under load, goes over to groups, and is gone at last.

Usage: python install.py SERVERS ETCD UNIARM MODEL HELM KUBECTL        needs PyYAML and openssl, and Linux
SERVERS: a folder of scripts/kube-apiserver.sh. What cannot run here is named, with the reason.
"""

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

from apiserver import PLACES, Server
from chart import LINES, TWO_OF_EACH, Load
from cluster import ask
from command_lines import TENANTS
from commands import PAGE, blocks, commands
from kubelet import Kubelet
from node import Node, told_where_it_can

COMMAND_S = 300
GONE_S = 90  # the grace of a pod, and more
QUESTION = ["--preference=positive=0.7,concise=0.3", "--temperature=0", "--max-tokens=32", "Tell me about the sea."]
STREAMS = 2
RELEASE = "helm upgrade steering helm/uniarm --set image.repository=registry.example.com/uniarm --wait --timeout 10m"
AGAIN = f"{RELEASE} --install --reset-values"
UNDER_LOAD = "Upgrading"  # the section that promises that no stream fails
# What some command of the page has, and why it does not run.
UNABLE = {
    "port-forward": "it goes through a kubelet's own port",
    "logs": "it goes through a kubelet's own port",
    "prometheus-community/prometheus-adapter": "it is another chart, and nowhere here",
    "tls.enabled=true,tls.issuerRef.name=uniarm-ca": "it takes cert-manager",
}


class Shell:
    """Commands as a person types them, with `helm` translated and `kubectl` as it is."""

    def __init__(self, server, helm, kubectl, folder):
        programs, self.place = folder / "bin", folder / "work"
        here = pathlib.Path(__file__).resolve().parent
        for made in (programs, self.place):
            made.mkdir()
        for name in ("helm", "deploy"):  # what the commands name of the repository
            (self.place / name).symlink_to(here.parents[1] / name)
        (self.place / "tenants.toml").write_text(TENANTS, encoding="utf-8")
        self.write(programs / "helm", [sys.executable, here / "translated.py", helm])
        self.write(programs / "kubectl", [kubectl])
        # Nothing that a person has configured for another cluster is read.
        own = {"KUBECONFIG": str(server.kubeconfig), "HOME": str(folder)}
        self.environment = {**os.environ, **own, "PATH": f"{programs}:{os.environ['PATH']}"}

    @staticmethod
    def write(path, command):
        path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n', encoding="utf-8")
        path.chmod(0o755)

    def run(self, line):
        outcome = subprocess.run(
            line, shell=True, capture_output=True, text=True, timeout=COMMAND_S, env=self.environment, cwd=self.place, check=False
        )
        print(f"$ {line}", *outcome.stderr.splitlines()[-3:], sep="\n")
        assert outcome.returncode == 0, f"{line}: {outcome.stdout}{outcome.stderr}"
        return outcome.stdout


def by_hand(place):
    """Certificates as docs/tls.md makes them by hand, for the secrets that the page makes of them."""
    [lines] = [lines for section, lines in blocks(pathlib.Path("docs/tls.md").read_text(encoding="utf-8")) if section == "By hand"]
    subprocess.run(["sh", "-e"], input="\n".join(lines), text=True, cwd=place, capture_output=True, check=True)


class Installed:
    """What a Load asks: the routers' Service."""

    def __init__(self, uniarm, where):
        self.uniarm, self.node = uniarm, where

    def answer(self):
        endpoint = f"{self.node.address_of('service steering-uniarm')}:7000"
        return ask(self.uniarm, endpoint, "generate", *QUESTION)["tokens"]


def of_release(server):
    """(kind, name) of everything that the release brought."""
    instance = "app.kubernetes.io/instance"
    for kind in PLACES:
        for metadata in (item["metadata"] for item in server.items(kind)):
            if metadata.get("labels", {}).get(instance) == "steering":
                yield kind, metadata["name"]


def serving(server):
    """What makes the pods of the release the ones that they are, but for etcd's."""
    return {pod["metadata"]["uid"] for pod in server.items("Pod") if "-etcd-" not in pod["metadata"]["name"]}


def gone(server):
    """Nothing of the release is left, however long its pods take to leave."""
    deadline = time.monotonic() + GONE_S
    while left := list(of_release(server)):
        assert time.monotonic() < deadline, f"uninstalled, and there are still {left}"
        time.sleep(0.5)


class Page:
    """The page's commands, section by section: each begins with a release as the page first installs it."""

    def __init__(self, shell, server, release):
        self.shell, self.server, self.release = shell, server, release
        self.tokens, self.unable = None, []

    def run(self, line, words):
        if reason := next((reason for word, reason in UNABLE.items() if word in words), None):
            self.unable.append(line)
            print(f"$ {line}: not run: {reason}")
            return
        self.shell.run(line)
        if "--wait" in words and words[1] != "uninstall":
            said = self.release.answer()
            self.tokens = self.tokens or said
            assert said == self.tokens, f"after {line} it says {said}, and {self.tokens} before"

    def section(self, name, lines):
        if self.tokens:
            self.shell.run(AGAIN)
        load = contextlib.nullcontext()
        if name == UNDER_LOAD:
            self.shell.run(f"{RELEASE} --reuse-values {TWO_OF_EACH}")
            load = Load(self.release, self.tokens, STREAMS)
        before = serving(self.server)
        with load:
            for words in lines:
                self.run(shlex.join(words), words)
        if name == UNDER_LOAD:
            assert not before & serving(self.server), "the upgrades left pods as they were"


def sections():
    """{section: its commands of helm and kubectl}, in the order of the page."""
    found = {}
    for section, words in commands(PAGE):
        if words[0] in ("helm", "kubectl"):
            found.setdefault(section, []).append(words)
    return found


def run(stack, servers, etcd, uniarm, model, helm, kubectl, folder):
    server = Server(stack, servers, etcd, folder)
    server.start_controllers()
    where = Node(stack, {"uniarm": uniarm, "etcd": etcd}, model, folder)
    kubelet = Kubelet(stack, server, where)
    shell = Shell(server, helm, kubectl, folder)
    by_hand(shell.place)
    lines = "".join(json.dumps({"prompt": f"What is {number}?", "max_tokens": 8}) + "\n" for number in range(LINES))
    data = where.folder_of("", "", {"persistentVolumeClaim": {"claimName": "work"}})
    (data / "in.jsonl").write_text(lines, encoding="utf-8")
    page = Page(shell, server, Installed(uniarm, where))
    for name, lines in sections().items():
        print(f"== {name}")
        page.section(name, lines)
        assert not kubelet.problems, "\n".join(kubelet.problems)
    assert len((data / "out.jsonl").read_text(encoding="utf-8").splitlines()) == LINES, "the batch Job left no answers"
    shell.run("helm uninstall steering --wait")
    gone(server)
    assert len(page.unable) == len(UNABLE), f"the page has other commands that cannot run: {page.unable}"


if __name__ == "__main__":
    sys.exit(told_where_it_can("the chart in a real API server", run, *sys.argv[1:]))

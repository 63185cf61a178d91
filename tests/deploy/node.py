"""A node without containers: runs pods of rendered manifests as processes, each at a loopback address of its own.

What a pod says is what runs: its command line, its variables and no others, its readiness, its hook before the end and its grace.
Four things stand for what a container would have: the pod's address for 0.0.0.0, addresses for the names that DNS would know,
folders for volumes, and the demo model for a model of the hub.

Needs PyYAML, and Linux, where all of 127.0.0.0/8 is this machine.
"""

import contextlib
import math
import os
import pathlib
import random
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

from cluster import page, told
from command_lines import expanded

# Ports that the chart gives its pods: the same ones at every address.
PORTS = (2379, 2380, 7000, 7001, 7002, 7080, 9000, 9001, 9002)
LOOK_S = 0.2  # between two looks at a pod: more often than its own probes, so that tests do not wait for them
CHUNK = 1 << 16


def occupied_port():
    """A port of PORTS where something listens at every address, so that no pod could have it; None where none is."""
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.254", port))
            except OSError:
                return port
    return None


def told_where_it_can(what, test, *arguments):
    """The exit status of a test that needs a node; 0 where this machine cannot be one, which is said."""
    reason = None
    if not sys.platform.startswith("linux"):
        reason = "only Linux has a loopback network"
    elif port := occupied_port():
        reason = f"something listens at port {port} of every address here"
    if reason:
        print(f"skipped: deploy: {what}, because {reason}")
        return 0
    return told(test, *arguments)


def image_variables():
    """The variables of the image: ENV of the Dockerfile's last stage."""
    text = pathlib.Path("deploy/Dockerfile").read_text(encoding="utf-8")
    stage = text[text.rindex("\nFROM ") :]
    lines = re.findall(r"^ENV (.+)$", stage, re.MULTILINE)
    return dict(variable.split("=", 1) for line in lines for variable in line.split())


def whole_cpus(quantity):
    """What a resourceFieldRef of CPUs says: whole ones, rounded up."""
    text = str(quantity)
    return math.ceil(int(text[:-1]) / 1000 if text.endswith("m") else float(text))


class Forward(socketserver.ThreadingTCPServer):
    """One port of a Service at its own address: each connection goes to one of the pods that are ready."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address, targets):
        super().__init__(address, None)
        self.targets = targets
        threading.Thread(target=self.serve_forever, args=(LOOK_S,), daemon=True).start()

    def finish_request(self, request, client_address):
        targets = self.targets()
        if not targets:
            return
        with socket.create_connection(random.choice(targets)) as there, contextlib.suppress(OSError):
            threading.Thread(target=self.pass_on, args=(there, request), daemon=True).start()
            self.pass_on(request, there)

    def handle_error(self, request, client_address):
        pass  # a pod that is gone: the client sees its connection closed

    @staticmethod
    def pass_on(source, sink):
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK):
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)


class Pod:
    """One pod, from its start to its end."""

    def __init__(self, node, manifest):
        self.node, self.manifest = node, manifest
        self.name = manifest["metadata"]["name"]
        self.labels = manifest["metadata"]["labels"]
        self.spec = manifest["spec"]
        [self.container] = self.spec["containers"]
        self.address = node.address_of(self.name)
        self.is_ready = self.is_leaving = False
        self.starts = 0
        self.starting = threading.Lock()
        self.start()
        threading.Thread(target=self.watch, daemon=True).start()

    def variables(self):
        """What Kubernetes would put into the container's environment, besides the image's own."""
        metadata = self.manifest["metadata"]
        fields = {"metadata.name": self.name, "status.podIP": self.address}
        for kind in ("labels", "annotations"):
            fields |= {f"metadata.{kind}['{key}']": value for key, value in metadata.get(kind, {}).items()}
        found = {}
        for variable in self.container.get("env", []):
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                found[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
            elif "resourceFieldRef" in source:
                assert source["resourceFieldRef"]["resource"] == "requests.cpu", source
                found[variable["name"]] = str(whole_cpus(self.container["resources"]["requests"]["cpu"]))
            elif "secretKeyRef" in source:
                found[variable["name"]] = self.node.secret(source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]]
            else:
                found[variable["name"]] = variable["value"]
        return found

    def places(self):
        """Where this machine has what is mounted: {path in the container: folder}."""
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        return {
            mount["mountPath"]: self.node.folder_of(self.name, mount["name"], volumes.get(mount["name"], {}))
            for mount in self.container.get("volumeMounts", [])
        }

    def here(self, text, places):
        """`text` with the addresses and folders that it means on this machine."""
        text = re.sub(r"[\w.-]+(?=:\d+)", lambda match: self.node.resolve(match[0], self), text)
        for path, folder in places.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", str(folder), text)
        return re.sub(r"^--model=hf://.*", f"--model={self.node.model}", text)

    def start(self):
        variables, places = self.variables(), self.places()
        own = {"PATH": os.environ["PATH"], "HOSTNAME": self.name}
        words = [*self.container.get("command", ["uniarm"]), *self.container.get("args", [])]
        program, *arguments = [expanded(word, variables) for word in words]
        environment = {**own, **image_variables(), **variables}
        command = [self.node.programs[program], *(self.here(argument, places) for argument in arguments)]
        with open(self.node.folder / f"{self.name}.log", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, env={key: self.here(value, places) for key, value in environment.items()}, stdout=log, stderr=log
            )
        self.starts += 1

    def port(self, name):
        [port] = [port["containerPort"] for port in self.container.get("ports", []) if port["name"] == name]
        return port

    def probed(self):
        probe = self.container.get("readinessProbe", {}).get("httpGet")
        return probe is None or page(f"{self.address}:{self.port(probe['port'])}", probe["path"])[0] == 200

    def watch(self):
        """Ready as its probe says; started again when it ends, unless it is meant to end."""
        while not self.is_leaving:
            if self.process.poll() is not None:
                self.is_ready = False
                if self.spec.get("restartPolicy", "Always") == "Never":
                    return
                with self.starting:
                    if not self.is_leaving:
                        self.start()
            answers = self.probed()
            with self.starting:
                self.is_ready = answers and not self.is_leaving
            time.sleep(LOOK_S)

    def leave(self):
        """Told to end as Kubernetes tells it; the status that it ends with."""
        self.stay_gone()
        grace = self.spec.get("terminationGracePeriodSeconds", 30)
        deadline = time.monotonic() + grace
        before_end = self.container.get("lifecycle", {}).get("preStop", {})
        time.sleep(before_end.get("sleep", {}).get("seconds", 0))
        if "exec" in before_end:
            subprocess.run(before_end["exec"]["command"], timeout=grace, check=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"{self.name} has not ended within its grace of {grace} s") from None

    def stay_gone(self):
        """From now on it is not ready, and not started again."""
        with self.starting:
            self.is_leaving, self.is_ready = True, False

    def kill(self):
        self.stay_gone()
        self.process.kill()


class Node:
    """Pods by their names, and the Services that lead to them."""

    def __init__(self, stack, programs, model, folder):
        self.stack, self.programs, self.model, self.folder = stack, programs, model, folder
        self.secret = {}.__getitem__  # {key: text} of a secret's name
        # Another test on this machine has another network.
        self.network = f"127.{random.randrange(16, 240)}.{random.randrange(256)}"
        self.addresses, self.services, self.pods = {}, {}, {}
        stack.callback(self.kill)

    def address_of(self, name):
        """The address of a pod or a Service: the same one as long as the test lasts."""
        return self.addresses.setdefault(name, f"{self.network}.{len(self.addresses) + 1}")

    def folder_of(self, pod, name, volume):
        """A volume's folder: that of a claim is shared, every other one is its pod's."""
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        folder = self.folder / "volumes" / (claim or f"{pod}.{name}")
        folder.mkdir(parents=True, exist_ok=True)
        if secret := volume.get("secret"):
            texts = self.secret(secret["secretName"])
            for item in secret.get("items", [{"key": key, "path": key} for key in texts]):
                (folder / item["path"]).write_text(texts[item["key"]], encoding="utf-8")
        return folder

    def resolve(self, host, pod):
        """What DNS would answer to `pod`; a host that nobody here has stays as it is."""
        name, _, rest = host.partition(".")
        if host == "0.0.0.0":
            return pod.address
        if host in self.services:
            return self.address_of(f"service {host}")
        return self.address_of(name) if rest in self.services else host

    def serve(self, service):
        """The Service has its name from now on and, unless it is headless, an address that leads to its pods."""
        name, spec = service["metadata"]["name"], service["spec"]
        known = name in self.services
        self.services[name] = spec
        if known or spec.get("clusterIP") == "None":
            return
        for port in spec["ports"]:
            targets = lambda n=name, p=port["targetPort"]: [(pod.address, pod.port(p)) for pod in self.behind(n)]
            forward = Forward((self.address_of(f"service {name}"), port["port"]), targets)
            self.stack.callback(forward.server_close)
            self.stack.callback(forward.shutdown)

    def behind(self, service):
        """The pods that a Service leads to."""
        wanted = self.services[service]["selector"].items()
        return [pod for pod in list(self.pods.values()) if pod.is_ready and wanted <= pod.labels.items()]

    def run(self, manifest):
        pod = self.pods[manifest["metadata"]["name"]] = Pod(self, manifest)
        return pod

    def run_to_end(self, manifests, seconds):
        """Pods that end by themselves, all at once; each has to end well."""
        pods = [self.run(manifest) for manifest in manifests]
        deadline = time.monotonic() + seconds
        for pod in pods:
            status = pod.process.wait(deadline - time.monotonic())
            del self.pods[pod.name]
            assert status == 0, f"{pod.name} ended with {status}"

    def wait_until_ready(self, seconds):
        deadline = time.monotonic() + seconds
        while waiting := [name for name, pod in self.pods.items() if not pod.is_ready]:
            assert time.monotonic() < deadline, f"not ready after {seconds} s: {waiting}"
            time.sleep(LOOK_S)

    def leave(self, names):
        """These pods are told to end at the same moment; {name: status}, and {name: problem} where one did not."""
        statuses = {}

        def told(pod):
            try:
                statuses[pod.name] = pod.leave()
            except AssertionError as problem:
                statuses[pod.name] = str(problem)

        threads = [threading.Thread(target=told, args=(self.pods.pop(name),)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses

    def kill(self):
        for pod in list(self.pods.values()):
            pod.kill()

"""Runs the cluster of the compose file without containers: its own command lines and variables, on this machine.

Every address of the file becomes a free port of the loopback interface; the models become the demo model.

Usage: python cluster.py UNIARM ETCD MODEL        needs PyYAML
"""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from command_lines import compose

READY_S = 180  # four workers load their models at once, perhaps on two busy cores
ANSWER_S = 120
PORTS = (20000, 32768)  # those of outgoing connections begin above, on every Linux that nobody has configured
LISTENERS = ("--listen", "--admin", "--http-listen")
STOP_S = 40  # stop_grace_period of the compose file
QUESTION = [
    "--preference",
    "positive=0.7,concise=0.3",
    "--temperature",
    "0",
    "--max-tokens",
    "16",
    "Why is the sky blue?",
]


def ports():
    """Free ports of the loopback interface, each once, and none that the kernel may give to a connection meanwhile."""
    first, beyond = PORTS
    yield from filter(is_free, random.sample(range(first, beyond), beyond - first))


def is_free(port):
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


class Addresses:
    """A loopback address for each host:port of the compose file."""

    free = ports()

    def __init__(self):
        self.given = {}

    def here(self, service, address):
        """Where `address`, as `service` writes it, is on this machine."""
        host, port = address.rsplit(":", 1)
        wanted = (service if host == "0.0.0.0" else host, port)
        if wanted not in self.given:
            self.given[wanted] = f"127.0.0.1:{next(self.free)}"
        return self.given[wanted]

    def translate(self, service, text):
        return re.sub(r"[\w.-]+:\d+", lambda match: self.here(service, match[0]), text)


def start_etcd(stack, etcd, address, folder):
    peer = Addresses().here("etcd", "0.0.0.0:2380")
    command = [etcd, f"--data-dir={folder}/etcd", f"--initial-cluster=default=http://{peer}"]
    command += [f"--{name}-client-urls=http://{address}" for name in ("listen", "advertise")]
    command += [f"--{name}-peer-urls=http://{peer}" for name in ("listen", "initial-advertise")]
    return start(stack, command, {}, folder / "etcd.log")


def start(stack, command, variables, log):
    """A process that ends with the test, however that ends."""
    file = stack.enter_context(open(log, "w", encoding="utf-8"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UNIARM_")}
    process = subprocess.Popen(command, env=environment | variables, stdout=file, stderr=file)
    stack.callback(process.kill)
    return process


def page(address, path):
    """Status and text of an admin page; status 0 where nobody listens."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def wait_until_ready(processes, admins):
    deadline = time.monotonic() + READY_S
    for name, process in processes.items():
        while (status := page(admins[name], "/readyz"))[0] != 200:
            assert process.poll() is None, f"{name} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{name} is not ready: {status}"
            time.sleep(0.2)


def ask(uniarm, router, command, *arguments):
    """What `uniarm COMMAND --json` prints."""
    line = [uniarm, command, "--endpoint", f"http://{router}", "--json", *arguments]
    outcome = subprocess.run(line, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


def stop(name, process):
    process.send_signal(signal.SIGTERM)
    status = process.wait(STOP_S)
    assert status == 0, f"{name} ended with {status}"


class Cluster:
    """The processes of the compose file, ready."""

    def __init__(self, stack, binaries, folder):
        uniarm, etcd, model = binaries
        addresses = self.addresses = Addresses()
        start_etcd(stack, etcd, addresses.here("etcd", "etcd:2379"), folder)
        self.processes, self.admins = {}, {}
        for service, arguments, variables in compose(pathlib.Path("deploy/compose.yaml").read_text(encoding="utf-8")):
            name = service.removeprefix("service ")
            flags = dict(argument.split("=", 1) for argument in arguments[1:])
            command = [uniarm, arguments[0]]
            for argument in arguments[1:]:
                flag, value = argument.split("=", 1)
                if flag in LISTENERS:
                    value = addresses.here(name, value)
                elif value.startswith("/cache/"):
                    value = f"{folder}{value}"
                command.append(f"{flag}={model if flag == '--model' else value}")
            self.admins[name] = addresses.here(name, flags["--admin"])
            for variable in ("UNIARM_STORE", "UNIARM_ADVERTISE"):
                variables[variable] = addresses.translate(name, variables[variable])
            self.processes[name] = start(stack, command, variables, folder / f"{name}.log")
        wait_until_ready(self.processes, self.admins)
        self.router = addresses.here("router", "router:7000")


def run(stack, uniarm, etcd, model, folder):
    cluster = Cluster(stack, (uniarm, etcd, model), folder)
    processes, router = cluster.processes, cluster.router
    served = ask(uniarm, router, "models")
    assert len(served["base_models"]) == 1, served
    assert sorted(reward["name"] for reward in served["reward_models"]) == ["concise", "positive"], served
    answer = ask(uniarm, router, "generate", *QUESTION)
    assert answer["tokens"] and answer["exchange"]["bytes"] > 0, answer
    status, listed = page(cluster.addresses.here("router", "router:7080"), "/v1/models")
    assert status == 200 and served["base_models"][0]["name"] in listed, f"by HTTP: {status} {listed}"
    for name, admin in cluster.admins.items():
        status, metrics = page(admin, "/metrics")
        assert status == 200 and "uniarm_" in metrics, f"{name} shows no metrics: {metrics}"

    # One worker of each pool leaves: the answer stays what it was.
    for name in ("base-1", "reward-1"):
        stop(name, processes.pop(name))
    again = ask(uniarm, router, "generate", *QUESTION)
    assert again["tokens"] == answer["tokens"], (answer, again)
    for name, process in processes.items():
        stop(name, process)


def told(test, *arguments):
    """The exit status of `test(stack, *arguments, folder)`; where it fails, what the processes said last, then the reason."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            test(stack, *arguments, pathlib.Path(folder))
        except (AssertionError, subprocess.TimeoutExpired) as problem:
            for log in sorted(pathlib.Path(folder).glob("*.log")):
                print(f"-- {log.name}", *log.read_text(encoding="utf-8").splitlines()[-8:], sep="\n")
            print(problem)
            return 1
    return 0


def main():
    return told(run, *sys.argv[1:4])


if __name__ == "__main__":
    sys.exit(main())

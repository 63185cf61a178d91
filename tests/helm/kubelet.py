"""The kubelet of a cluster without nodes: pods that an API server has become processes, and the server is told how they are.

Needs PyYAML, and Linux.
"""

import base64
import signal
import threading
import time
import traceback

from controllers import POD_INDEX

GROUP = "uniarm.internal/group"
HERE = "here"  # the name of the node that every pod is bound to
LOOK_S = 0.3


class Kubelet:
    """Runs the pods of a server's namespace on a node of processes, until the test ends."""

    def __init__(self, stack, server, where):
        self.server, self.node = server, where
        where.secret = self.secret
        self.told, self.leaving, self.is_over = {}, set(), False
        self.left = set()  # uids of pods that have ended, or are about to
        self.problems = []
        stack.callback(self.end)
        threading.Thread(target=self.look, daemon=True).start()

    def end(self):
        self.is_over = True

    def secret(self, name):
        """{key: text} of a secret."""
        status, said = self.server.ask("GET", self.server.place("Secret", name))
        assert status == 200, said
        return {key: base64.b64decode(value).decode() for key, value in said["data"].items()}

    def look(self):
        while not self.is_over:
            try:
                for service in self.server.items("Service"):
                    self.node.serve(service)
                present = {pod["metadata"]["name"]: pod for pod in self.server.items("Pod")}
                for name, pod in present.items():
                    self.look_at(name, pod)
                # Deleted without a word, such as a hook's pod that has ended.
                for name in set(self.node.pods) - present.keys() - self.leaving:
                    self.node.pods.pop(name).kill()
            except Exception:  # noqa: BLE001 (a thread's problem is the test's)
                if not self.is_over:
                    self.problems.append(traceback.format_exc())
            time.sleep(LOOK_S)

    def look_at(self, name, pod):
        if pod["metadata"].get("deletionTimestamp"):
            # The list may be older than the end of this pod, and its name another one's by now.
            if name not in self.leaving and pod["metadata"]["uid"] not in self.left:
                self.leaving.add(name)
                self.left.add(pod["metadata"]["uid"])
                threading.Thread(target=self.leave, args=(name, pod), daemon=True).start()
        elif name not in self.node.pods and name not in self.leaving:
            self.begin(name, pod)
        elif name in self.node.pods:
            self.tell(name, self.node.pods[name])

    def begin(self, name, pod):
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            return
        self.told.pop(name, None)
        target = {"metadata": {"name": name}, "target": {"kind": "Node", "name": HERE}}
        status, said = self.server.ask("POST", self.server.place("Pod", f"{name}/binding"), target)
        assert status == 201, said
        # Kubernetes gives this label since 1.28.
        if any(owner["kind"] == "StatefulSet" for owner in pod["metadata"].get("ownerReferences", [])):
            pod["metadata"]["labels"][POD_INDEX] = name.rsplit("-", 1)[1]
        self.node.run(pod)

    def tell(self, name, pod):
        """The pod's state, where it is another than the server knows."""
        exit_status = pod.process.poll() if pod.spec.get("restartPolicy") == "Never" else None
        now = (exit_status, pod.is_ready, pod.starts)
        if self.told.get(name) == now:
            return
        self.told[name] = now
        phase = {None: "Running", 0: "Succeeded"}.get(exit_status, "Failed")
        ready = str(pod.is_ready and phase == "Running")
        running = {"running": {}} if phase == "Running" else {"terminated": {"exitCode": exit_status}}
        address = pod.address.replace("127.", "10.", 1)  # a Service leads to no loopback address
        container = {"name": pod.container["name"], "image": pod.container["image"], "imageID": "", "state": running}
        body = {
            "phase": phase,
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": kind, "status": ready} for kind in ("Ready", "ContainersReady")],
            "containerStatuses": [{**container, "ready": ready == "True", "restartCount": pod.starts - 1}],
        }
        place = self.server.place("Pod", f"{name}/status")
        status, said = self.server.ask("PATCH", place, {"status": body}, kind="application/merge-patch+json")
        assert status in (200, 404), said

    def leave(self, name, pod):
        """Told to end as the pod says, and then no longer the server's."""
        if name in self.node.pods:
            status = self.node.leave([name])[name]
            # etcd says that it was stopped; ranks of a group that is stopped as a whole end each other.
            if status not in (0, -signal.SIGTERM) and GROUP not in pod["metadata"]["labels"]:
                self.problems.append(f"{name} ended with {status}")
        its_own = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        self.server.ask("DELETE", self.server.place("Pod", name), its_own)
        self.leaving.discard(name)

"""A Kubernetes API server and its controllers on this machine, and what the chart renders put into words that they know.

The server is Kubernetes 1.20 (scripts/kube-apiserver.sh); the chart is written for 1.30 and later. `converted` is all that lies
between the two. Needs PyYAML and openssl.
"""

import copy
import json
import pathlib
import secrets
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

import yaml

sys.path.append(str(pathlib.Path(__file__).parents[1] / "deploy"))
from cluster import Addresses, start, start_etcd  # noqa: E402 (the path above leads to it)

NAMESPACE = "steering"
READY_S = 120  # on two busy cores
ASK_S = 30
CONTROLLERS = ["deployment", "replicaset", "statefulset", "job", "endpoint", "disruption", "garbagecollector", "namespace"]
CONTROLLERS += ["serviceaccount", "serviceaccount-token", "pvc-protection", "ttl-after-finished"]
# Kinds that no Kubernetes knows by itself, and whose definitions are not ours to install.
STRANGERS = {
    "Certificate": "a kind of cert-manager's",
    "ScaledObject": "a kind of KEDA's",
    "GRPCRoute": "a kind of the Gateway API's",
    "HTTPRoute": "a kind of the Gateway API's",
}
# Kinds that the chart writes, and where the API has them.
PLACES = {
    "ConfigMap": ("api/v1", "configmaps"),
    "Deployment": ("apis/apps/v1", "deployments"),
    "HorizontalPodAutoscaler": ("apis/autoscaling/v2beta2", "horizontalpodautoscalers"),
    "Job": ("apis/batch/v1", "jobs"),
    "NetworkPolicy": ("apis/networking.k8s.io/v1", "networkpolicies"),
    "Pod": ("api/v1", "pods"),
    "PodDisruptionBudget": ("apis/policy/v1beta1", "poddisruptionbudgets"),
    "Secret": ("api/v1", "secrets"),
    "Service": ("api/v1", "services"),
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
}


def converted(manifest):
    """(`manifest` as Kubernetes 1.20 knows it, what was changed in words)."""
    manifest, notes = copy.deepcopy(manifest), []
    spec = manifest.get("spec", {})

    def renamed(version):
        notes.append(f"{manifest['apiVersion']} is {version}")
        manifest["apiVersion"] = version

    def left_out(field):
        if spec.pop(field, None) is not None:
            notes.append(f"without {field}")

    if manifest["kind"] == "HorizontalPodAutoscaler":
        renamed("autoscaling/v2beta2")
    if manifest["kind"] == "PodDisruptionBudget":
        renamed("policy/v1beta1")
        left_out("unhealthyPodEvictionPolicy")
    if manifest["kind"] == "Job":
        for field in ("completionMode", "podFailurePolicy"):
            left_out(field)
        if retries := spec.pop("backoffLimitPerIndex", None):
            spec["backoffLimit"] = retries
            notes.append("backoffLimitPerIndex is backoffLimit")
    for port in spec.get("ports", []) if manifest["kind"] == "Service" else []:
        port.setdefault("protocol", "TCP")  # the default, which that server forgets where it merges
    pod = spec if manifest["kind"] == "Pod" else spec.get("template", {}).get("spec", {})
    for container in pod.get("containers", []):
        before_end = container.get("lifecycle", {}).get("preStop", {})
        if sleep := before_end.pop("sleep", None):
            before_end["exec"] = {"command": ["sleep", str(sleep["seconds"])]}
            notes.append("the sleep before the end is an exec")
        for port in container.get("ports", []):
            port.setdefault("protocol", "TCP")
    return manifest, notes


class Server:
    """An API server with an etcd of its own, until the test ends; with controllers once they are asked for."""

    def __init__(self, stack, programs, etcd, folder):
        self.stack, self.programs, self.folder = stack, programs, folder
        addresses = Addresses()
        store = addresses.here("etcd", "etcd:2379")
        start_etcd(stack, etcd, store, folder)
        self.address = addresses.here("server", "server:443")
        self.token = secrets.token_hex(16)
        (folder / "tokens.csv").write_text(f'{self.token},admin,1,"system:masters"\n', encoding="utf-8")
        self.key = folder / "accounts.key"
        key = ["openssl", "genrsa", "-out", self.key, "2048"]
        subprocess.run(key, check=True, capture_output=True)
        public = ["openssl", "rsa", "-in", self.key, "-pubout", "-out", folder / "accounts.pub"]
        subprocess.run(public, check=True, capture_output=True)
        host, port = self.address.split(":")
        self.start(
            "kube-apiserver",
            etcd_servers=f"http://{store}",
            bind_address=host,
            advertise_address=host,
            secure_port=port,
            cert_dir=folder / "certificates",
            token_auth_file=folder / "tokens.csv",
            authorization_mode="RBAC",
            service_account_issuer="https://kubernetes.default.svc",
            service_account_key_file=folder / "accounts.pub",
            service_account_signing_key_file=self.key,
            service_cluster_ip_range="10.96.0.0/16",
            feature_gates="TTLAfterFinished=true",
        )
        self.trust = None
        self.wait()
        self.enter(NAMESPACE)
        self.write_kubeconfig()

    def start(self, program, **flags):
        command = [f"{self.programs}/{program}", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
        return start(self.stack, command, {}, self.folder / f"{program}.log")

    def wait(self):
        """Until it answers."""
        deadline = time.monotonic() + READY_S
        certificate = self.folder / "certificates/apiserver.crt"
        while True:
            try:
                self.trust = ssl.create_default_context(cafile=certificate)
                if self.ask("GET", "readyz", parse=False)[0] == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < deadline, "the API server is not ready"
            time.sleep(0.2)

    def enter(self, namespace):
        """Everything is asked of this namespace from now on, which is made."""
        self.namespace = namespace
        account = {"kind": "ServiceAccount", "metadata": {"name": "default"}}
        for path, body in (("api/v1/namespaces", {"metadata": {"name": namespace}}), (self.place("ServiceAccount"), account)):
            status, said = self.ask("POST", path, body)
            assert status in (201, 409), said  # 409: a controller was first

    def write_kubeconfig(self):
        cluster = {"server": f"https://{self.address}", "certificate-authority": str(self.folder / "certificates/apiserver.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin", "namespace": NAMESPACE}}],
            "current-context": "here",
        }
        self.kubeconfig = self.folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")

    def start_controllers(self):
        self.start(
            "kube-controller-manager",
            kubeconfig=self.kubeconfig,
            controllers=",".join(CONTROLLERS),
            service_account_private_key_file=self.key,
            leader_elect="false",
            port=0,
            secure_port=0,
            feature_gates="TTLAfterFinished=true",
        )

    def ask(self, method, path, body=None, kind="application/json", parse=True):
        """(status, answer) of one call."""
        request = urllib.request.Request(
            f"https://{self.address}/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": kind},
        )
        try:
            with urllib.request.urlopen(request, timeout=ASK_S, context=self.trust) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if parse else text
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def place(self, kind, name="", query=""):
        version, plural = PLACES[kind]
        return f"{version}/namespaces/{self.namespace}/{plural}{name and '/' + name}{query and '?' + query}"

    def items(self, kind):
        status, answer = self.ask("GET", self.place(kind))
        assert status == 200, answer
        return answer["items"]

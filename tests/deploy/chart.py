"""Runs what the chart renders: its pods become processes with a real etcd, answer, grow and shrink under load, run the chart's
jobs, and go over to groups of shards behind certificates and keys, one of which loses a rank.

Usage: python chart.py UNIARM ETCD MODEL HELM        needs PyYAML, and Linux
"""

import json
import subprocess
import sys
import threading
import time

import node
from cluster import page
from controllers import jobs, manifests_of, served
from credentials import secrets

READY_S = 180
ANSWER_S = 120
JOB_S = 180
STREAMS = 4  # more than one worker of a pool needs to be busy, all on two cores
LINES = 6
VALUES = ["--values=helm/uniarm/values-cpu-demo.yaml", "--set=drainTimeoutSeconds=2", "--set=batch.args={--max-tokens=8}"]
TWO_OF_EACH = "--set=reward.replicas=2,base.replicas=2,router.replicas=2"
CLAIM = "volume.persistentVolumeClaim.claimName=work"
BATCH = ["--set=batch.enabled=true,batch.parts=2", f"--set=batch.{CLAIM}"]
TRAIN = ["--set=train.enabled=true", f"--set=train.{CLAIM}"]
GROUPS = "--set=base.shards=2,reward.shards=2"
# TLS by roles and at the front door, and tenants: secrets.
SECURED = "--set=tls.enabled=true,router.front.tlsSecret=front,router.front.tenants.name=tenants"
CLIENT = "--set=client.apiKeySecret.name=key,client.caSecret.name=front-ca"
# Long enough that workers come and go within an answer.
QUESTION = ["--preference=positive=0.7,concise=0.3", "--temperature=0", "--max-tokens=96", "Tell me about the sea."]
TRAINING = """\
model = "{model}"
pairs = ["{data}/pairs.jsonl"]
steps = 2
batch = 1
objectives = [
    {{ name = "positive", description = "positive: the answer is cheerful", beta = 0.02 }},
    {{ name = "concise", description = "concise: the answer is short", beta = 0.02 }},
]
adapter = {{ method = "moslora", rank = 2, alpha = 4.0 }}
"""
PAIR = {
    "prompt": "Why is the sky blue?",
    "response_a": "Because air scatters blue light.",
    "response_b": "Nobody knows.",
    "scores": {"positive": {"a": 1, "b": 0}, "concise": {"a": 0, "b": 1}},
}


class Release:
    """A release of the chart on a node."""

    def __init__(self, stack, programs, helm, model, folder):
        self.helm, self.folder = helm, folder
        self.node = node.Node(stack, programs, model, folder)
        self.uniarm = programs["uniarm"]
        self.access = [f"--endpoint=http://{self.host}:7000"]

    def rendered(self, *values):
        command = [self.helm, "template", "trial", "helm/uniarm", "--namespace=steering", *VALUES, *values]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def upgrade(self, *values):
        """As `helm upgrade`, in the order of rolling updates: pods that come are ready before those that go are told, and
        of a StatefulSet one after the other is replaced, the last one first. The statuses of those that went."""
        text = self.rendered(*values)
        for service in manifests_of(text, "Service"):
            self.node.serve(service)
        wanted, present = served(text), dict(self.node.pods)
        for name in wanted.keys() - present.keys():
            self.node.run(wanted[name])
        self.node.wait_until_ready(READY_S)
        statuses = self.node.leave([name for name in present if name not in wanted])
        for name in sorted(wanted.keys() & present.keys(), reverse=True):
            if present[name].manifest != wanted[name]:
                statuses |= self.node.leave([name])
                self.node.run(wanted[name])
                self.node.wait_until_ready(READY_S)
        return statuses

    @property
    def host(self):
        return self.node.address_of("service trial-uniarm")

    def answer(self):
        return answer(self.uniarm, *self.access, *QUESTION)

    def test(self, *values):
        """What `helm test` runs ends well."""
        [test] = manifests_of(self.rendered(*values), "Pod")
        self.node.run_to_end([test], ANSWER_S)

    def pods(self, component):
        return [pod for pod in self.node.pods.values() if component_of(pod) == component]


class Load:
    """Clients that ask one question again and again while something happens: each answer is the one that nobody disturbed."""

    def __init__(self, release, tokens, clients):
        self.release, self.tokens = release, tokens
        self.is_over, self.answers, self.problems = False, 0, []
        self.clients = [threading.Thread(target=self.ask, daemon=True) for _ in range(clients)]

    def ask(self):
        while not self.is_over and not self.problems:
            try:
                said = self.release.answer()
                assert said == self.tokens, f"{said} is another answer than {self.tokens}"
                self.answers += 1
            except (AssertionError, subprocess.TimeoutExpired) as problem:
                self.problems.append(problem)

    def __enter__(self):
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, problem, *_):
        self.is_over = True
        for client in self.clients:
            client.join()
        if problem:
            return  # what went wrong first is what to look at
        assert not self.problems, self.problems[0]
        assert self.answers >= len(self.clients), "the clients were given no answer"


def asked(uniarm, *flags):
    """A guided request, and how it ended."""
    command = [uniarm, "generate", "--json", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)


def answer(uniarm, *flags):
    """The tokens that a guided request is answered with."""
    outcome = asked(uniarm, *flags)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)["tokens"]


def component_of(pod):
    return pod.labels["app.kubernetes.io/component"]


def metric(pod, name):
    """A metric that a pod has one of; 0 before it has any."""
    _, text = page(f"{pod.address}:{pod.port('admin')}", "/metrics")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


def all_ended_well(statuses):
    assert set(statuses.values()) <= {0}, statuses


def wait_for(what, ask_it):
    deadline = time.monotonic() + ANSWER_S
    while not ask_it():
        assert time.monotonic() < deadline, what
        time.sleep(node.LOOK_S)


def grow_and_shrink(release, tokens):
    """A second worker of each pool, and a second router, join and are given work; then they leave amid streams."""
    before = set(release.node.pods)
    with Load(release, tokens, STREAMS):
        release.upgrade(TWO_OF_EACH)
        came = {component_of(pod): pod for name, pod in release.node.pods.items() if name not in before}
        assert sorted(came) == ["base", "reward", "router"], came
        wait_for("the second base worker is given no sequence", lambda: metric(came["base"], "uniarm_base_sequences_running"))
        wait_for("the second reward worker is given no session", lambda: metric(came["reward"], "uniarm_reward_sessions"))
        all_ended_well(release.upgrade())
    assert release.node.pods.keys() == before


def replace_all(release, tokens):
    """An upgrade replaces every process of a release with two of each, and no stream fails."""
    release.upgrade(TWO_OF_EACH)
    before = [pod for pod in release.node.pods.values() if component_of(pod) != "etcd"]
    with Load(release, tokens, STREAMS):
        all_ended_well(release.upgrade(TWO_OF_EACH, "--set=log=text"))
    assert not any(pod in release.node.pods.values() for pod in before), "the upgrade left pods as they were"
    release.upgrade()


def run_jobs(release):
    """The batch Job's pods share the lines or have a part each, to the same answers; the trainer's Job makes an adapter."""
    data = release.node.folder_of("", "", {"persistentVolumeClaim": {"claimName": "work"}})
    lines = [json.dumps({"id": f"q{number}", "prompt": f"What is {number} and {number}?"}) for number in range(LINES)]
    (data / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    release.node.run_to_end(jobs(release.rendered(*BATCH), "batch"), JOB_S)
    shared = (data / "out.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in shared.splitlines()] == [f"q{number}" for number in range(LINES)], shared
    release.node.run_to_end(jobs(release.rendered(*BATCH, "--set=batch.share=false"), "batch"), JOB_S)
    parts = "".join((data / f"out-{part}.jsonl").read_text(encoding="utf-8") for part in range(2))
    assert parts == shared, f"{parts} is not {shared}"

    (data / "train.toml").write_text(TRAINING.format(model=release.node.model, data=data), encoding="utf-8")
    (data / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    release.node.run_to_end(jobs(release.rendered(*TRAIN), "train"), JOB_S)
    assert (data / "run/adapter/adapter_model.safetensors").exists(), "the trainer's Job left no adapter"


def secure(release):
    """Groups of shards, with certificates and tenants: who has a key is answered, and nobody else."""
    made = secrets(release.uniarm, "trial-uniarm", release.host, release.folder / "authority")
    release.node.secret = made.__getitem__
    release.upgrade(GROUPS, SECURED, CLIENT)
    release.test(GROUPS, SECURED, CLIENT)
    trusted = [f"--endpoint=https://{release.host}:7000", f"--ca={release.folder}/authority/ca.crt"]
    stranger = asked(release.uniarm, *trusted, *QUESTION)
    assert stranger.returncode != 0 and "API key" in stranger.stderr, f"without a key: {stranger}"
    release.access = [*trusted, f"--api-key={made['key']['key']}"]


def lose_a_rank(release, tokens):
    """A group whose rank is killed is not ready, comes back by itself, and its stream goes on."""
    [face] = [pod for pod in release.pods("reward") if pod.name.endswith("-g0-0")]
    [rank] = [pod for pod in release.pods("reward") if pod.name.endswith("-g0-1")]
    with Load(release, tokens, 1):
        wait_for("the group is given no session", lambda: metric(face, "uniarm_reward_sessions"))
        rank.process.kill()
        wait_for("the group of a killed rank is ready all the same", lambda: not face.is_ready)
        release.node.wait_until_ready(READY_S)
        assert rank.starts == 2, f"the killed rank was started {rank.starts} times"


def run(stack, uniarm, etcd, model, helm, folder):
    release = Release(stack, {"uniarm": uniarm, "etcd": etcd}, helm, model, folder)
    release.upgrade()
    release.test()
    tokens = release.answer()
    grow_and_shrink(release, tokens)
    replace_all(release, tokens)
    run_jobs(release)

    secure(release)
    sizes = {component: len(release.pods(component)) for component in ("base", "reward")}
    assert sizes == {"base": 2, "reward": 2}, sizes
    assert release.answer() == tokens, "groups of shards answer something else"
    lose_a_rank(release, tokens)
    # Rank 0 first, as docs/shards.md has it: the others of its group end with it.
    faces = [pod.name for pod in release.node.pods.values() if component_of(pod) != "etcd" and not pod.name.endswith("-1")]
    all_ended_well(release.node.leave(faces))


if __name__ == "__main__":
    sys.exit(node.told_where_it_can("the chart's pods as processes", run, *sys.argv[1:5]))

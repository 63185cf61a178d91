"""A client of uniarm.v1 that owes nothing to the project's own code: Python, grpcio, and the .proto files.

Usage: python client.py ENDPOINT PROMPT [--preference NAME=WEIGHT,…] [--strength 1] [--temperature 0] [--seed 7] …

Streams one answer to standard output and checks on the way that the stream keeps the contract.
"""

import argparse
import pathlib
import sys
from dataclasses import dataclass, field

import grpc

# The stubs are made from the contract itself, in memory, each time: they cannot be out of date.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[3] / "proto"))
inference, services = grpc.protos_and_services("uniarm/v1/inference.proto")
types = grpc.protos("uniarm/v1/types.proto")

DEADLINE_S = 120


@dataclass
class Answer:
    """One of the n answers of a request."""

    first: int = 0  # position of ids[0]: above 0 where the request skips
    ids: list = field(default_factory=list)
    deltas: list = field(default_factory=list)
    details: list = field(default_factory=list)
    finished: object = None

    @property
    def text(self):
        return "".join(self.deltas)


@dataclass
class Stream:
    """Everything that one call has said."""

    started: object
    answers: dict
    summary: object


def connect(endpoint):
    """A channel to http://HOST:PORT or HOST:PORT."""
    return grpc.insecure_channel(endpoint.removeprefix("http://").rstrip("/"))


def request(prompt, *, preference=None, strength=None, skip=0, chat=True, **sampling):
    """A GenerateRequest. `preference` maps objectives to weights; `sampling` is the message of that name."""
    kind = {"prompt": prompt}
    if chat:
        kind = {"chat": types.ChatMessages(messages=[types.ChatMessage(role="user", content=prompt)])}
    guidance = []
    if preference:
        weights = [types.ObjectiveWeight(objective=name, weight=weight) for name, weight in preference.items()]
        guidance = [types.GuidanceTerm(preference=weights, strength=strength)]
    return inference.GenerateRequest(
        input=types.Input(**kind), sampling=types.Sampling(**sampling), guidance=guidance, skip=skip
    )


def receive(events, wanted, on_text=lambda choice, text: None):
    """Reads a stream to its end and returns it; an AssertionError says where it breaks the contract.

    Started comes first and once, Summary last and once; in between, each answer's tokens in order without
    a gap, then its Finished. `wanted` is the request.
    """
    started = summary = None
    choices = range(wanted.sampling.n if wanted.sampling.HasField("n") else 1)
    answers = {choice: Answer(first=wanted.skip) for choice in choices}
    for event in events:
        kind = event.WhichOneof("event")
        said = getattr(event, kind)
        assert summary is None, f"{kind} after Summary"
        assert (started is None) == (kind == "started"), f"{kind}, and Started is {started}"
        if kind == "started":
            started = said
        elif kind == "summary":
            summary = said
        else:
            answer = answers[said.choice]
            assert answer.finished is None, f"{kind} after Finished of answer {said.choice}"
            if kind == "finished":
                answer.finished = said
                continue
            due = answer.first + len(answer.ids)
            assert said.position == due, f"position {said.position} where {due} was due"
            assert len(said.ids) > 0 or said.text, "an empty Tokens"
            assert len(said.details) in (0, len(said.ids)), f"{len(said.details)} details of {len(said.ids)} tokens"
            answer.ids += said.ids
            answer.deltas.append(said.text)
            answer.details += said.details
            on_text(said.choice, said.text)

    assert summary is not None, "the stream ended without Summary"
    for choice, answer in answers.items():
        assert answer.finished is not None, f"answer {choice} never finished"
        assert answer.finished.reason != inference.FINISH_REASON_UNSPECIFIED, "finished for no reason"
        length = answer.first + len(answer.ids)
        assert answer.finished.completion_tokens == length, f"{answer.finished} after {length} tokens"
    total = sum(answer.finished.completion_tokens for answer in answers.values())
    assert summary.usage.completion_tokens == total, f"{summary.usage} for {total} tokens"
    assert summary.usage.prompt_tokens == started.prompt_tokens, f"{summary.usage} and {started}"
    return Stream(started, answers, summary)


def generate(channel, wanted, timeout=DEADLINE_S, on_text=lambda choice, text: None):
    """Sends a request and receives its stream."""
    stub = services.InferenceStub(channel)
    return receive(stub.Generate(wanted, timeout=timeout), wanted, on_text)


def models(channel):
    """What the cluster serves."""
    return services.InferenceStub(channel).ListModels(inference.ListModelsRequest(), timeout=DEADLINE_S)


def weights(text):
    """harmless=0.7,helpful=0.3 as a map."""
    pairs = (part.split("=", 1) for part in text.split(","))
    return {name: float(weight) for name, weight in pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("endpoint")
    parser.add_argument("prompt")
    parser.add_argument("--preference", type=weights)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--raw", action="store_true", help="the prompt is no chat message")
    options = parser.parse_args()
    wanted = request(
        options.prompt,
        preference=options.preference,
        strength=options.strength,
        chat=not options.raw,
        temperature=options.temperature,
        seed=options.seed,
        max_tokens=options.max_tokens,
    )
    with connect(options.endpoint) as channel:
        stream = generate(channel, wanted, on_text=lambda _, text: print(text, end="", flush=True))
    usage, exchange = stream.summary.usage, stream.summary.exchange
    print(f"\n[{usage.prompt_tokens} + {usage.completion_tokens} tokens, {exchange.bytes} bytes of reward exchange]")


if __name__ == "__main__":
    main()

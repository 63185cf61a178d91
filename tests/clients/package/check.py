"""The Python client against a running cluster of two routers, one of which it kills.

Usage: python check.py ROUTER OTHER_ROUTER PID_OF_ROUTER

Prints one JSON object of answers, which the caller compares with those of another client.
"""

import asyncio
import json
import os
import signal
import sys
import time

import uniarm
from uniarm._resume import Fault, Journey, Repeats
from uniarm.v1 import inference_pb2

GUIDED = uniarm.Request(
    "Describe the sea.", preference={"positive": 0.5, "concise": 0.5}, temperature=0.0, seed=7, max_tokens=16
)
LONG = uniarm.Request("Tell me a story.", preference={"positive": 1.0}, seed=11, max_tokens=96, ignore_eos=True)

# Tokens that the reader has when the router is killed.
KILL_AFTER = 8


def plain(result):
    return {"ids": result.answers[0].ids, "text": result.text}


def errors_are_typed_and_name_their_field(client):
    cases = [
        (uniarm.InvalidArgument, "sampling.top_p", {"top_p": 2.0}),
        (uniarm.NotFound, "model", {"model": "nobody"}),
        # What cannot even be sent is refused in the same way.
        (uniarm.InvalidArgument, "sampling.max_tokens", {"max_tokens": -1}),
        (uniarm.InvalidArgument, "sampling.temperature", {"temperature": "hot"}),
        (uniarm.InvalidArgument, "guidance[0].preference[0].weight", {"preference": {"positive": "much"}}),
        (uniarm.InvalidArgument, "priority", {"priority": "urgent"}),
        (uniarm.InvalidArgument, "guidance[0].strength", {"preference": {"positive": 1.0}, "strength": 1e9}),
        (ValueError, "request_id", {"request_id": "a\nb"}),
    ]
    for kind, field, fields in cases:
        try:
            client.generate("Hi", **fields)
        except kind as error:
            assert error.field == field, f"{error.field} instead of {field}: {error}"
        else:
            raise AssertionError(f"{fields} was answered")
    began = time.monotonic()
    try:
        client.generate(LONG, timeout=0.2)
    except uniarm.DeadlineExceeded:
        assert time.monotonic() - began < 5
    else:
        raise AssertionError("a deadline of 0.2 s was met")
    try:
        client.generate("Hi", temperture=1)
    except TypeError as error:
        assert "temperture" in str(error)


def events_come_in_order_and_make_the_result(client):
    events = list(client.stream(GUIDED))
    assert isinstance(events[0], uniarm.Started) and isinstance(events[-1], uniarm.Summary), events
    assert events[0].seed == 7 and len(events[0].guidance) >= 1, events[0]
    result = uniarm.Result()
    for event in events:
        result.apply(event)
    assert result.answers[0].finish_reason in ("stop", "length")
    assert result.summary.completion_tokens == len(result.answers[0].ids)
    detailed = client.generate(GUIDED, logprobs=2)
    assert plain(detailed) == plain(result)
    assert len(detailed.answers[0].details) == len(detailed.answers[0].ids)
    assert len(detailed.answers[0].details[0].alternatives) >= 2


def a_batch_yields_results_in_order_and_errors_beside_them(client):
    requests = [GUIDED, uniarm.Request("Hi", top_p=2.0), "Say one word."]
    told = []
    items = list(client.batch(requests, in_flight=2, progress=lambda so_far: told.append(so_far.done)))
    assert [item.index for item in items] == [0, 1, 2] and told == [1, 2, 3]
    assert isinstance(items[1].error, uniarm.InvalidArgument) and items[1].result is None
    return plain(items[0].result)


def the_rules_of_repeating_are_the_rust_clients():
    repeats = Repeats(2, 0.0)
    assert repeats.on_loss(Fault.CONNECTION, 0.0, 0.0) == 0.0
    assert repeats.on_loss(Fault.ELSEWHERE, 0.0, 0.0) is None
    assert Repeats(2, 0.0).on_loss(Fault.REQUEST, 0.0, 0.0) is None
    repeats = Repeats(2, 0.0)
    repeats.on_progress()
    assert [repeats.on_loss(Fault.CONNECTION, 0.0, 1.0) for _ in range(5)] == [0, 0.05, 0.05, 0.1, 0.1]
    assert repeats.on_loss(Fault.CONNECTION, 60.0, 0.0) is None


def what_is_repeated_names_the_version_that_it_began_with():
    journey = Journey(uniarm.Request("Hi", reward="my", preference={"kind": 1.0}).to_wire(), 2, 0.0)
    started = inference_pb2.Started(request_id="r", model="m", seed=7)
    started.guidance.add(reward="my@3", strength=1.0).preference.add(objective="kind", weight=1.0)
    assert journey.take(inference_pb2.GenerateResponse(started=started))
    journey.take(inference_pb2.GenerateResponse(tokens=inference_pb2.Tokens(ids=[5])))
    again = journey.request()
    assert [term.reward for term in again.guidance] == ["my@3"], again
    assert list(again.resume[0].ids) == [5] and again.sampling.seed == 7, again


async def asynchronous(routers):
    async with uniarm.AsyncClient(routers) as client:
        assert (await client.models()).base
        answer = plain(await client.generate(GUIDED))
        batch = [item async for item in client.batch([GUIDED] * 3, in_flight=2)]
        assert [plain(item.result) for item in batch] == [answer] * 3
        return answer


def killed(routers, pid):
    """A router dies in the middle of a stream, and its reader does not see it."""
    with uniarm.Client(routers) as client:
        result, has_killed = uniarm.Result(), False
        for event in client.stream(LONG):
            result.apply(event)
            if not has_killed and result.answers and len(result.answers[0].ids) >= KILL_AFTER:
                os.kill(pid, signal.SIGKILL)
                has_killed = True
        assert has_killed and result.summary is not None
        # And the next request finds the router that is left.
        assert plain(client.generate(GUIDED))["ids"]
        return plain(result)


def main():
    routers, pid = sys.argv[1:3], int(sys.argv[3])
    the_rules_of_repeating_are_the_rust_clients()
    what_is_repeated_names_the_version_that_it_began_with()
    with uniarm.Client(routers) as client:
        assert {"positive", "concise"} <= {name for model in client.models().reward for name in model.objectives}
        errors_are_typed_and_name_their_field(client)
        events_come_in_order_and_make_the_result(client)
        answers = {"guided": plain(client.generate(GUIDED))}
        answers["batch"] = a_batch_yields_results_in_order_and_errors_beside_them(client)
    answers["asynchronous"] = asyncio.run(asynchronous(routers))
    answers["killed"] = killed(routers, pid)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

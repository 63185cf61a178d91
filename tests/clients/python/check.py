"""What a foreign client may rely on, tried against a running cluster.

Usage: python check.py ENDPOINT
"""

import sys
import textwrap
import traceback

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from client import DEADLINE_S, connect, generate, inference, models, request, services, types

PROMPT = "Why is the sky blue?"
TOKENS = 24


def objectives(channel):
    """Up to two objectives that one preference can name."""
    served = models(channel).reward_models
    one_model = next((model for model in served if len(model.objectives) > 1), None)
    names = [o.name for model in ([one_model] if one_model else served) for o in model.objectives]
    return sorted(set(names))[:2]


def bad_request(error):
    """Code and named fields of a refusal."""
    fields = []
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = error_details_pb2.BadRequest()
            detail.Unpack(violations)
            fields += [violation.field for violation in violations.field_violations]
            assert all(violation.description for violation in violations.field_violations), "a refusal without a reason"
    return error.code(), fields


def assert_refused(channel, wanted, code, field):
    try:
        generate(channel, wanted)
    except grpc.RpcError as error:
        assert bad_request(error) == (code, [field]), f"{bad_request(error)}, {error.details()}"
        assert field in error.details(), error.details()
    else:
        raise AssertionError("it was answered")


# === what is tried: each function's name is the situation ===


def the_services_are_healthy(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "uniarm.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, f"{service!r}: {answer}"


def the_models_are_listed_with_what_a_client_needs(channel):
    served = models(channel)
    assert served.base_models, "no base model is served"
    for model in served.base_models:
        assert model.name and model.context_tokens > 0 and model.vocabulary > 0, model
    for model in served.reward_models:
        assert model.name and model.method, model


def an_answer_streams_in_order(channel):
    stream = generate(channel, request(PROMPT, temperature=0, max_tokens=TOKENS, ignore_eos=True))
    answer = stream.answers[0]
    assert len(answer.ids) == TOKENS and answer.text, answer
    assert answer.finished.reason == inference.FINISH_REASON_LENGTH, answer.finished
    assert stream.started.model in [model.name for model in models(channel).base_models], stream.started
    assert stream.summary.timing.total_ms >= stream.summary.timing.first_token_ms > 0, stream.summary.timing


def the_same_request_is_answered_with_the_same_tokens(channel):
    wanted = request(PROMPT, temperature=1, seed=7, max_tokens=TOKENS)
    first, second = (generate(channel, wanted).answers[0] for _ in range(2))
    assert (first.ids, first.text) == (second.ids, second.text), f"{first.text!r} and {second.text!r}"


def a_seed_that_was_drawn_is_reported_and_can_be_repeated(channel):
    drawn = generate(channel, request(PROMPT, temperature=1, max_tokens=TOKENS))
    again = generate(channel, request(PROMPT, temperature=1, max_tokens=TOKENS, seed=drawn.started.seed))
    assert drawn.answers[0].ids == again.answers[0].ids, f"seed {drawn.started.seed}"


def two_answers_to_one_request_are_told_apart(channel):
    stream = generate(channel, request(PROMPT, temperature=1, seed=7, max_tokens=TOKENS, n=2))
    alone = generate(channel, request(PROMPT, temperature=1, seed=7, max_tokens=TOKENS))
    assert stream.answers[0].ids == alone.answers[0].ids, "the first answer depends on the second"
    assert stream.answers[0].ids != stream.answers[1].ids, "two answers, one text"


def a_preference_steers_and_its_cost_is_reported(channel):
    names = objectives(channel)
    if not names:
        return "no objective is served"
    preference = {name: 2.0 for name in names}
    wanted = request(PROMPT, preference=preference, temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    stream = generate(channel, wanted)
    answer, exchange = stream.answers[0], stream.summary.exchange
    resolved = [weight for term in stream.started.guidance for weight in term.preference]
    assert {weight.objective for weight in resolved} == set(names), stream.started.guidance
    assert all(term.reward for term in stream.started.guidance), "a term that names no reward model"
    assert exchange.certified + exchange.queried + exchange.dense >= TOKENS and exchange.bytes > 0, exchange
    assert len(answer.details) == TOKENS, "details were asked for"
    assert all(detail.base_logprob <= 0 and detail.reward_contribution != 0 for detail in answer.details)
    return None


def an_answer_ends_before_its_stop_string(channel):
    whole = generate(channel, request(PROMPT, temperature=0, max_tokens=TOKENS)).answers[0].text
    stop = whole[len(whole) // 2 :][:4]
    answer = generate(channel, request(PROMPT, temperature=0, max_tokens=TOKENS, stop=[stop])).answers[0]
    assert answer.text == whole[: whole.index(stop)], f"{answer.text!r}, stopped at {stop!r}, of {whole!r}"
    assert (answer.finished.reason, answer.finished.stop) == (inference.FINISH_REASON_STOP, stop), answer.finished


def a_client_that_comes_back_gets_the_rest(channel):
    wanted = {"temperature": 1, "seed": 11, "max_tokens": TOKENS, "ignore_eos": True}
    whole = generate(channel, request(PROMPT, **wanted)).answers[0]
    rest = generate(channel, request(PROMPT, skip=TOKENS // 2, **wanted)).answers[0]
    assert rest.ids == whole.ids[TOKENS // 2 :], f"{rest.ids} of {whole.ids}"
    assert whole.text.endswith(rest.text), f"{rest.text!r} of {whole.text!r}"


def a_bad_value_is_refused_by_the_name_of_its_field(channel):
    nan = float("nan")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for field, wanted in (
        ("input", inference.GenerateRequest()),
        ("input.prompt", request("", chat=False)),
        ("sampling.max_tokens", request(PROMPT, max_tokens=0)),
        ("sampling.temperature", request(PROMPT, temperature=1e9)),
        ("sampling.top_p", request(PROMPT, top_p=nan)),
        ("sampling.stop", request(PROMPT, stop=["x"] * 10_000)),
        ("guidance[0].preference", request(PROMPT, preference={"a": -1.0, "b": 2.0})),
        ("guidance[0].preference", request(PROMPT, preference={"a": 0.0})),
        ("guidance[0].preference", request(PROMPT, preference={"a": nan})),
        ("guidance[0].strength", request(PROMPT, preference={"a": 1.0}, strength=nan)),
    ):
        assert_refused(channel, wanted, invalid, field)


def what_is_not_served_is_refused_by_name(channel):
    unknown_model = request(PROMPT)
    unknown_model.model = "no-such-model"
    unknown_reward = request(PROMPT, preference={"no-such-objective": 1.0})
    for field, wanted in (("model", unknown_model), ("guidance[0]", unknown_reward)):
        try:
            generate(channel, wanted)
        except grpc.RpcError as error:
            code, fields = bad_request(error)
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), code
            assert fields and fields[0].startswith(field) and "no-such-" in error.details(), (fields, error.details())
        else:
            raise AssertionError(f"a wrong {field} was answered")


def a_token_outside_the_vocabulary_is_refused(channel):
    wanted = inference.GenerateRequest(input=types.Input(tokens=types.TokenIds(ids=[1, 4_000_000_000])))
    try:
        generate(channel, wanted)
    except grpc.RpcError as error:
        code, fields = bad_request(error)
        assert code == grpc.StatusCode.INVALID_ARGUMENT and fields[0].startswith("input"), (code, fields)
    else:
        raise AssertionError("it was answered")


def a_deadline_is_kept(channel):
    wanted = request(PROMPT, temperature=0, max_tokens=1000, ignore_eos=True)
    try:
        generate(channel, wanted, timeout=0.05)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    else:
        raise AssertionError("1000 tokens in 50 ms")


def a_client_that_hangs_up_leaves_the_cluster_serving(channel):
    call = services.InferenceStub(channel).Generate(request(PROMPT, max_tokens=1000, ignore_eos=True))
    for _ in zip(range(3), call):
        pass
    call.cancel()
    an_answer_streams_in_order(channel)


SITUATIONS = (
    the_services_are_healthy,
    the_models_are_listed_with_what_a_client_needs,
    an_answer_streams_in_order,
    the_same_request_is_answered_with_the_same_tokens,
    a_seed_that_was_drawn_is_reported_and_can_be_repeated,
    two_answers_to_one_request_are_told_apart,
    a_preference_steers_and_its_cost_is_reported,
    an_answer_ends_before_its_stop_string,
    a_client_that_comes_back_gets_the_rest,
    a_bad_value_is_refused_by_the_name_of_its_field,
    what_is_not_served_is_refused_by_name,
    a_token_outside_the_vocabulary_is_refused,
    a_deadline_is_kept,
    a_client_that_hangs_up_leaves_the_cluster_serving,
)


def main():
    failed = skipped = 0
    with connect(sys.argv[1]) as channel:
        for situation in SITUATIONS:
            name = situation.__name__.replace("_", " ")
            try:
                reason = situation(channel)
            except (AssertionError, grpc.RpcError):
                failed += 1
                print(f"FAILED  python: {name}")
                print(textwrap.indent(traceback.format_exc(limit=-2), " " * 8), end="")
            else:
                skipped += reason is not None
                print(f"skipped: python: {name}, because {reason}" if reason else f"ok      python: {name}")
    print(f"python: {len(SITUATIONS) - failed - skipped} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

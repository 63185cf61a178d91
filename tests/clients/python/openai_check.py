"""What OpenAI's own client may rely on, tried against a running cluster.

Usage: python openai_check.py URL        URL: http://HOST:PORT of an HTTP front door with --batch-dir
"""

import asyncio
import json
import sys
import textwrap
import time
import traceback

import openai

DEADLINE_S = 120
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
TOKENS = 12


def served(client):
    """(name of a base model, up to two objectives that one preference can name)"""
    listed = client.models.list().data
    base = next(model.id for model in listed if model.uniarm["role"] == "base")
    rewards = [model for model in listed if model.uniarm["role"] == "reward"]
    rich = next((model for model in rewards if len(model.uniarm["objectives"]) > 1), None)
    names = {o["name"] for model in ([rich] if rich else rewards) for o in model.uniarm["objectives"]}
    return base, sorted(names)[:2]


def guided(client, **more):
    base, objectives = served(client)
    guidance = {"preference": {name: 1.0 for name in objectives}, "strength": 1.5}
    fields = {"model": base, "messages": MESSAGES, "seed": 7, "temperature": 0.8, "max_tokens": TOKENS}
    return fields | {"extra_body": {"guidance": guidance, "ignore_eos": True}} | more


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# === what is tried: each function's name is the situation ===


def a_listed_model_can_be_looked_up_and_another_cannot(client):
    base, _ = served(client)
    assert client.models.retrieve(base).id == base
    try:
        client.models.retrieve("no-such-model")
    except openai.NotFoundError as error:
        assert "no-such-model" in error.message, error
    else:
        raise AssertionError("it was found")


def a_guided_chat_is_the_same_whole_and_streamed(client):
    whole = client.chat.completions.create(**guided(client))
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length", whole
    assert whole.usage.completion_tokens == TOKENS, whole.usage
    assert whole.uniarm["seed"] == 7 and whole.uniarm["unguided_tokens"] == 0, whole.uniarm
    assert all(term["reward"] for term in whole.uniarm["guidance"]), whole.uniarm
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**guided(client, **options)))
    assert text_of(chunks) == text, chunks
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and not chunks[-1].choices, chunks[-1]
    assert all(chunk.usage is None for chunk in chunks[:-1])


def steering_changes_the_answer(client):
    steered = client.chat.completions.create(**guided(client)).choices[0].message.content
    plain = guided(client, extra_body={"ignore_eos": True})
    assert client.chat.completions.create(**plain).choices[0].message.content != steered


def log_probabilities_come_with_what_the_reward_changed(client):
    whole = client.chat.completions.create(**guided(client, logprobs=True, top_logprobs=3))
    content = whole.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == whole.choices[0].message.content, content
    for entry in content:
        assert entry.logprob <= 0 and bytes(entry.bytes or []).decode() in ("", entry.token), entry
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True), entry
        ours = entry.uniarm
        terms = zip(whole.uniarm["guidance"], ours["reward_logprobs"], strict=True)
        added = sum(term["strength"] * logprob for term, logprob in terms)
        assert ours["base_logprob"] <= 0 and abs(added - ours["reward_contribution"]) < 1e-3, entry
    streamed = client.chat.completions.create(**guided(client, logprobs=True, top_logprobs=3, stream=True))
    pieces = [piece.choices[0].logprobs for piece in streamed if piece.choices and piece.choices[0].logprobs]
    assert [entry for piece in pieces for entry in piece.content] == content


def several_answers_stream_side_by_side(client):
    whole = client.chat.completions.create(**guided(client, n=3))
    texts = [choice.message.content for choice in whole.choices]
    # Two of three may say the same by chance.
    assert len(texts) == 3 and len(set(texts)) > 1, texts
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**guided(client, n=3, stream=True)):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts, streamed


def an_answer_ends_before_its_stop_string(client):
    whole = client.chat.completions.create(**guided(client)).choices[0].message.content
    stop = whole[len(whole) // 2 :][:4]
    stopped = client.chat.completions.create(**guided(client, stop=stop)).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)], f"{stopped} of {whole!r}"
    assert stopped.finish_reason == "stop" and stopped.uniarm["stop"] == stop, stopped


def a_text_is_continued(client):
    base, _ = served(client)
    fields = {"model": base, "prompt": "The sky is blue because", "temperature": 0, "max_tokens": 8, "logprobs": 2}
    whole = client.completions.create(**fields)
    streamed = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text != "", whole
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == whole.choices[0].text and len(logprobs.top_logprobs[0]) == 2, logprobs
    assert logprobs.text_offset[1] == len(logprobs.tokens[0]), logprobs


def a_bad_field_is_named(client):
    for fields, param in (
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"50": 10}}, "logit_bias"),
        ({"extra_body": {"guidance": {"preference": {"no-such-objective": 1}}}}, "guidance.preference"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ):
        try:
            client.chat.completions.create(**guided(client, **fields))
        except openai.BadRequestError as error:
            assert (error.param, error.type) == (param, "invalid_request_error"), error
            assert param in error.message and error.code == "invalid_argument", error
            assert error.request_id, "no request id"
        else:
            raise AssertionError(f"a wrong {param} was answered")


def a_deadline_is_kept_and_not_tried_again(client):
    began = time.monotonic()
    body = {"ignore_eos": True, "timeout_ms": 100}
    try:
        client.with_options(max_retries=5).chat.completions.create(**guided(client, max_tokens=4000, extra_body=body))
    except openai.InternalServerError as error:
        assert error.status_code == 504 and error.code == "deadline_exceeded", error
        assert time.monotonic() - began < 5, "it was tried again"
    else:
        raise AssertionError("4000 tokens in 100 ms")


def a_deadline_that_passes_in_a_stream_is_an_error_of_the_stream(client):
    body = {"ignore_eos": True, "timeout_ms": 1500}
    stream = client.chat.completions.create(**guided(client, max_tokens=4000, stream=True, extra_body=body))
    try:
        assert text_of(stream), "nothing came"
    except openai.APIError as error:
        assert error.code == "deadline_exceeded", error
    else:
        raise AssertionError("the stream ended as if it were whole")


def a_request_keeps_the_id_that_it_came_with(client):
    raw = client.chat.completions.with_raw_response.create(**guided(client, extra_headers={"x-request-id": "mine-1"}))
    assert raw.headers["x-request-id"] == "mine-1" and raw.parse().id.endswith("mine-1"), raw.headers


def the_asynchronous_client_streams_as_well(client):
    async def ask():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as client_of_its_own:
            stream = await client_of_its_own.chat.completions.create(**guided(client, stream=True))
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == client.chat.completions.create(**guided(client)).choices[0].message.content


def a_client_that_hangs_up_leaves_the_cluster_serving(client):
    with client.chat.completions.create(**guided(client, stream=True, max_tokens=4000)) as stream:
        for _ in zip(range(3), stream):
            pass
    assert client.chat.completions.create(**guided(client)).choices[0].message.content


def a_file_of_lines_is_answered_and_removed(client):
    base, _ = served(client)
    body = {"model": base, "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    lines = [
        {"custom_id": f"r{index}", "method": "POST", "url": "/v1/chat/completions", "body": body | more}
        for index, more in enumerate(({"seed": 1}, {"model": "no-such-model"}, {"n": 2, "seed": 2}))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.status) == (len(content), "lines.jsonl", "processed"), file
    assert client.files.retrieve(file.id) == file and file in list(client.files.list(purpose="batch", limit=1))
    assert client.files.content(file.id).content == content
    batch = create_batch(client, file, metadata={"for": "this check"})
    assert batch.status in ("validating", "in_progress") and batch.metadata == {"for": "this check"}, batch
    batch = ended(client, batch)
    assert batch.status == "completed" and batch.errors is None, batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1), counts
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["r0", "r2"], answers
    alone = client.chat.completions.create(**body, seed=1).choices[0].message.content
    choices = [answer["response"]["body"]["choices"] for answer in answers]
    assert choices[0][0]["message"]["content"] == alone and len(choices[1]) == 2, answers
    (error,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("r1", 404), error
    assert batch.id in [listed.id for listed in client.batches.list(limit=1)]
    for name in (file.id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(name).deleted
    assert not list(client.files.list())


def create_batch(client, file, **more):
    fields = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
    return client.batches.create(input_file_id=file.id, **fields)


def ended(client, batch):
    deadline = time.monotonic() + DEADLINE_S
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def a_batch_is_cancelled_or_fails_and_says_why(client):
    base, _ = served(client)
    body = {"model": base, "messages": MESSAGES, "max_tokens": 4000, "ignore_eos": True}
    line = {"custom_id": "long", "method": "POST", "url": "/v1/chat/completions", "body": body}
    long = client.files.create(file=json.dumps(line).encode(), purpose="batch")
    batch = client.batches.cancel(create_batch(client, long).id)
    assert batch.status in ("cancelling", "cancelled"), batch
    assert ended(client, batch).status == "cancelled"
    try:
        client.batches.cancel(batch.id)
    except openai.ConflictError as error:
        assert "cancelled" in error.message, error
    else:
        raise AssertionError("it was cancelled twice")
    line["body"]["tools"] = [{"type": "function"}]
    wrong = client.files.create(file=json.dumps(line).encode(), purpose="batch")
    batch = ended(client, create_batch(client, wrong))
    (error,) = batch.errors.data
    assert (batch.status, error.line, error.param) == ("failed", 1, "body.tools"), batch
    for file in (long, wrong):
        client.files.delete(file.id)
    for use in (lambda: client.files.retrieve(long.id), lambda: create_batch(client, long)):
        try:
            use()
        except openai.NotFoundError as error:
            assert long.id in error.message, error
        else:
            raise AssertionError("a file that was deleted is there")
    try:
        client.files.create(file=b"{}", purpose="fine-tune")
    except openai.BadRequestError as error:
        assert error.param == "purpose", error
    else:
        raise AssertionError("a file for nothing was taken")


SITUATIONS = (
    a_listed_model_can_be_looked_up_and_another_cannot,
    a_guided_chat_is_the_same_whole_and_streamed,
    steering_changes_the_answer,
    log_probabilities_come_with_what_the_reward_changed,
    several_answers_stream_side_by_side,
    an_answer_ends_before_its_stop_string,
    a_text_is_continued,
    a_bad_field_is_named,
    a_deadline_is_kept_and_not_tried_again,
    a_deadline_that_passes_in_a_stream_is_an_error_of_the_stream,
    a_request_keeps_the_id_that_it_came_with,
    the_asynchronous_client_streams_as_well,
    a_client_that_hangs_up_leaves_the_cluster_serving,
    a_file_of_lines_is_answered_and_removed,
    a_batch_is_cancelled_or_fails_and_says_why,
)


def main():
    failed = 0
    with openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
        for situation in SITUATIONS:
            name = situation.__name__.replace("_", " ")
            try:
                situation(client)
            except (AssertionError, openai.OpenAIError):
                failed += 1
                print(f"FAILED  openai: {name}")
                print(textwrap.indent(traceback.format_exc(limit=-2), " " * 8), end="")
            else:
                print(f"ok      openai: {name}")
    print(f"openai: {len(SITUATIONS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

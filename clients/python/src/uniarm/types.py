"""Requests and answers as a program works with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, TypeVar, Union

import grpc
from google.protobuf.message import Message as Wire

from .errors import InvalidArgument
from .v1 import inference_pb2, types_pb2

_ON_REWARD_LOSS = {
    "wait": types_pb2.ON_REWARD_LOSS_WAIT,
    "fail": types_pb2.ON_REWARD_LOSS_FAIL,
    "unguided": types_pb2.ON_REWARD_LOSS_UNGUIDED,
}
_PRIORITY = {
    "low": types_pb2.PRIORITY_LOW,
    "normal": types_pb2.PRIORITY_NORMAL,
    "high": types_pb2.PRIORITY_HIGH,
}
_FINISH_REASON: dict[int, "FinishReason"] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_CONTEXT: "context",
}

FinishReason = Literal["stop", "length", "context", "unknown"]

# What a word of ours stands for in the contract.
_Word = TypeVar("_Word")
_Kind = TypeVar("_Kind", bound=Wire)


# === what is asked ===


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Guidance:
    """One reward model that steers: guided logits are base_strength * z_base + sum(strength * z_reward)."""

    preference: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0
    # Empty: the one that serves the objectives of the preference.
    reward: str = ""


@dataclass(frozen=True)
class Request:
    """What a cluster is asked. One of `prompt`, `messages` and `token_ids` is the input."""

    prompt: str | None = None
    messages: Sequence[Message] = ()
    token_ids: Sequence[int] = ()
    # The prompt is continued as it is, without a chat template.
    raw: bool = False
    system: str | None = None
    model: str = ""
    # Weights of objectives: short for one term of guidance.
    preference: Mapping[str, float] | None = None
    # Of the term that these name; alone, it asks the cluster which reward model is meant.
    strength: float | None = None
    reward: str = ""
    guidance: Sequence[Guidance] = ()
    base_strength: float = 1.0
    on_reward_loss: Literal["wait", "fail", "unguided"] = "wait"
    priority: Literal["low", "normal", "high"] = "normal"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # The same seed gives the same answer; drawn by the router where there is none.
    seed: int | None = None
    max_tokens: int = 256
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    # Details of each token, with that many alternatives.
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False
    request_id: str = ""
    # The router keeps a record of it; details come with the tokens, and the record's hash with the summary.
    audit: bool = False

    def to_wire(self) -> inference_pb2.GenerateRequest:
        return _wire(
            inference_pb2.GenerateRequest,
            "",
            request_id=self.request_id,
            model=self.model,
            input=self._input(),
            sampling=self._sampling(),
            guidance=[_term(f"guidance[{index}].", term) for index, term in enumerate(self._terms())],
            base_strength=self.base_strength,
            on_reward_loss=_one_of("on_reward_loss", self.on_reward_loss, _ON_REWARD_LOSS),
            priority=_one_of("priority", self.priority, _PRIORITY),
            audit=self.audit,
        )

    def _terms(self) -> list[Guidance]:
        own = []
        if self.preference is not None or self.reward or self.strength is not None:
            strength = 1.0 if self.strength is None else self.strength
            own = [Guidance(self.preference or {}, strength, self.reward)]
        return own + list(self.guidance)

    def _input(self) -> types_pb2.Input:
        given = [self.prompt is not None, bool(self.messages), bool(self.token_ids)]
        if sum(given) != 1:
            raise _invalid("input", "a request wants one of prompt, messages and token_ids")
        if self.token_ids:
            return types_pb2.Input(tokens=_wire(types_pb2.TokenIds, "input.tokens.", ids=self.token_ids))
        if self.raw:
            if self.prompt is None or self.system is not None:
                raise _invalid("input.prompt", "a raw request wants a prompt, and no system message")
            return _wire(types_pb2.Input, "input.", prompt=self.prompt)
        messages = list(self.messages) or [Message("user", self.prompt or "")]
        if self.system is not None:
            messages.insert(0, Message("system", self.system))
        chat = [
            _wire(types_pb2.ChatMessage, f"input.chat.messages[{index}].", role=message.role, content=message.content)
            for index, message in enumerate(messages)
        ]
        return types_pb2.Input(chat=types_pb2.ChatMessages(messages=chat))

    def _sampling(self) -> types_pb2.Sampling:
        return _wire(
            types_pb2.Sampling,
            "sampling.",
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=self.max_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            logprobs=self.logprobs,
            n=self.n,
            ignore_eos=self.ignore_eos,
        )


class RequestFields(TypedDict, total=False):
    """The fields of a `Request` but its prompt, as keyword arguments."""

    messages: Sequence[Message]
    token_ids: Sequence[int]
    raw: bool
    system: str | None
    model: str
    preference: Mapping[str, float] | None
    strength: float
    reward: str
    guidance: Sequence[Guidance]
    base_strength: float
    on_reward_loss: Literal["wait", "fail", "unguided"]
    priority: Literal["low", "normal", "high"]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    max_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int | None
    n: int
    ignore_eos: bool
    request_id: str
    audit: bool


def _term(path: str, term: Guidance) -> types_pb2.GuidanceTerm:
    weights = [
        _wire(types_pb2.ObjectiveWeight, f"{path}preference[{index}].", objective=name, weight=weight)
        for index, (name, weight) in enumerate(term.preference.items())
    ]
    return _wire(types_pb2.GuidanceTerm, path, reward=term.reward, preference=weights, strength=term.strength)


def _wire(kind: type[_Kind], path: str, **fields: Any) -> _Kind:
    """A message of these fields. What does not fit into one is refused by its path, in the words of the cluster's own errors."""
    message = kind()
    for name, value in fields.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise _invalid(path + name, f"{path}{name}: {value!r} does not fit: {error}") from error
    return message


def _invalid(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, code=grpc.StatusCode.INVALID_ARGUMENT, field=field)


def _one_of(name: str, value: str, known: Mapping[str, _Word]) -> _Word:
    if value not in known:
        raise _invalid(name, f"{name} is {value!r}, wants one of {', '.join(known)}")
    return known[value]


# === what is answered ===


@dataclass(frozen=True)
class Started:
    """First event of a request, with what the router drew and resolved."""

    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    guidance: tuple[Guidance, ...]


@dataclass(frozen=True)
class Alternative:
    """One of the best tokens at a position."""

    id: int
    text: str
    base_logprob: float
    reward_contribution: float
    guided_logprob: float


@dataclass(frozen=True)
class TokenDetail:
    """Why a token was chosen."""

    base_logprob: float
    reward_contribution: float
    alternatives: tuple[Alternative, ...]
    # Log-probability under each term's reward model, in the order of the guidance.
    reward_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Tokens:
    """Tokens position .. position + len(ids) of one answer, and the text that became certain with them."""

    choice: int
    position: int
    ids: tuple[int, ...]
    text: str
    details: tuple[TokenDetail, ...]
    # Positions of tokens that were chosen without their reward.
    unguided: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """The end of one answer."""

    choice: int
    reason: FinishReason
    completion_tokens: int
    # The stop string, or empty.
    stop: str


@dataclass(frozen=True)
class Summary:
    """Last event of a request."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    unguided_tokens: int
    queue_ms: float
    first_token_ms: float
    total_ms: float
    # Hexadecimal hash of the record that was asked for: a receipt to keep.
    audit: str = ""


Event = Union[Started, Tokens, Finished, Summary]


@dataclass
class Answer:
    """One of the n answers, whole."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    details: list[TokenDetail] = field(default_factory=list)
    unguided: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "unknown"


@dataclass
class Result:
    """Everything that a request was answered with."""

    started: Started | None = None
    answers: list[Answer] = field(default_factory=list)
    summary: Summary | None = None

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.answers[0].text if self.answers else ""

    def apply(self, event: Event) -> None:
        """Takes the next event of a stream in."""
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Summary):
            self.summary = event
        else:
            while len(self.answers) <= event.choice:
                self.answers.append(Answer())
            answer = self.answers[event.choice]
            if isinstance(event, Finished):
                answer.finish_reason = event.reason
            else:
                answer.text += event.text
                answer.ids.extend(event.ids)
                answer.details.extend(event.details)
                answer.unguided.extend(event.unguided)


@dataclass(frozen=True)
class BaseModel:
    """A language model that writes."""

    name: str
    context_tokens: int
    vocabulary: int
    has_chat_template: bool


@dataclass(frozen=True)
class RewardModel:
    """A reward model that steers, with descriptions of its objectives by name."""

    name: str
    objectives: Mapping[str, str]
    backbone: str
    method: str
    # Of the cluster's catalogue of adapters; 0: it has none.
    version: int = 0


@dataclass(frozen=True)
class Models:
    """What a cluster serves."""

    base: tuple[BaseModel, ...]
    reward: tuple[RewardModel, ...]


# === from the wire ===


def event_of_wire(wire: inference_pb2.GenerateResponse) -> Event | None:
    """None: a kind of event that this client does not know."""
    kind = wire.WhichOneof("event")
    if kind == "started":
        said = wire.started
        terms = tuple(
            Guidance({one.objective: one.weight for one in term.preference}, term.strength, term.reward)
            for term in said.guidance
        )
        return Started(said.request_id, said.model, said.seed, said.prompt_tokens, terms)
    if kind == "tokens":
        tokens = wire.tokens
        unguided = tuple(tokens.position + index for index in tokens.unguided)
        details = tuple(map(_detail, tokens.details))
        return Tokens(tokens.choice, tokens.position, tuple(tokens.ids), tokens.text, details, unguided)
    if kind == "finished":
        end = wire.finished
        reason = _FINISH_REASON.get(end.reason, "unknown")
        return Finished(end.choice, reason, end.completion_tokens, end.stop)
    if kind == "summary":
        usage, timing = wire.summary.usage, wire.summary.timing
        return Summary(
            usage.prompt_tokens,
            usage.cached_prompt_tokens,
            usage.completion_tokens,
            usage.unguided_tokens,
            timing.queue_ms,
            timing.first_token_ms,
            timing.total_ms,
            wire.summary.audit.hex(),
        )
    return None


def _detail(wire: inference_pb2.TokenDetail) -> TokenDetail:
    alternatives = tuple(
        Alternative(one.id, one.text, one.base_logprob, one.reward_contribution, one.guided_logprob)
        for one in wire.alternatives
    )
    return TokenDetail(wire.base_logprob, wire.reward_contribution, alternatives, tuple(wire.reward_logprobs))


def models_of_wire(wire: inference_pb2.ListModelsResponse) -> Models:
    base = tuple(
        BaseModel(one.name, one.context_tokens, one.vocabulary, one.has_chat_template) for one in wire.base_models
    )
    reward = tuple(
        RewardModel(one.name, {o.name: o.description for o in one.objectives}, one.backbone, one.method, one.version)
        for one in wire.reward_models
    )
    return Models(base, reward)

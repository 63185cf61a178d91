from uniarm.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CONTEXT: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CONTEXT: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "input", "sampling", "guidance", "on_reward_loss", "priority", "exchange", "skip", "base_strength", "resume", "audit")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    ON_REWARD_LOSS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    BASE_STRENGTH_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    input: _types_pb2.Input
    sampling: _types_pb2.Sampling
    guidance: _containers.RepeatedCompositeFieldContainer[_types_pb2.GuidanceTerm]
    on_reward_loss: _types_pb2.OnRewardLoss
    priority: _types_pb2.Priority
    exchange: _types_pb2.Exchange
    skip: int
    base_strength: float
    resume: _containers.RepeatedCompositeFieldContainer[AnswerSoFar]
    audit: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., input: _Optional[_Union[_types_pb2.Input, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.Sampling, _Mapping]] = ..., guidance: _Optional[_Iterable[_Union[_types_pb2.GuidanceTerm, _Mapping]]] = ..., on_reward_loss: _Optional[_Union[_types_pb2.OnRewardLoss, str]] = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ..., exchange: _Optional[_Union[_types_pb2.Exchange, str]] = ..., skip: _Optional[int] = ..., base_strength: _Optional[float] = ..., resume: _Optional[_Iterable[_Union[AnswerSoFar, _Mapping]]] = ..., audit: bool = ...) -> None: ...

class AnswerSoFar(_message.Message):
    __slots__ = ("choice", "ids", "unguided_tokens", "finished")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    UNGUIDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    choice: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    unguided_tokens: int
    finished: bool
    def __init__(self, choice: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., unguided_tokens: _Optional[int] = ..., finished: bool = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "tokens", "finished", "summary")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    started: Started
    tokens: Tokens
    finished: Finished
    summary: Summary
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("request_id", "model", "seed", "prompt_tokens", "guidance", "base_strength")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    BASE_STRENGTH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    guidance: _containers.RepeatedCompositeFieldContainer[_types_pb2.GuidanceTerm]
    base_strength: float
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., seed: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., guidance: _Optional[_Iterable[_Union[_types_pb2.GuidanceTerm, _Mapping]]] = ..., base_strength: _Optional[float] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("choice", "position", "ids", "text", "details", "unguided", "served")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    UNGUIDED_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    choice: int
    position: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    details: _containers.RepeatedCompositeFieldContainer[TokenDetail]
    unguided: _containers.RepeatedScalarFieldContainer[int]
    served: Served
    def __init__(self, choice: _Optional[int] = ..., position: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., details: _Optional[_Iterable[_Union[TokenDetail, _Mapping]]] = ..., unguided: _Optional[_Iterable[int]] = ..., served: _Optional[_Union[Served, _Mapping]] = ...) -> None: ...

class Served(_message.Message):
    __slots__ = ("base", "rewards")
    BASE_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    base: Scorer
    rewards: _containers.RepeatedCompositeFieldContainer[Scorer]
    def __init__(self, base: _Optional[_Union[Scorer, _Mapping]] = ..., rewards: _Optional[_Iterable[_Union[Scorer, _Mapping]]] = ...) -> None: ...

class Scorer(_message.Message):
    __slots__ = ("member", "generation", "weights")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    member: str
    generation: int
    weights: bytes
    def __init__(self, member: _Optional[str] = ..., generation: _Optional[int] = ..., weights: _Optional[bytes] = ...) -> None: ...

class TokenDetail(_message.Message):
    __slots__ = ("base_logprob", "reward_contribution", "alternatives", "reward_logprobs")
    BASE_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    REWARD_CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    REWARD_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    base_logprob: float
    reward_contribution: float
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternative]
    reward_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, base_logprob: _Optional[float] = ..., reward_contribution: _Optional[float] = ..., alternatives: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., reward_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("id", "text", "base_logprob", "reward_contribution", "guided_logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BASE_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    REWARD_CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    GUIDED_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    base_logprob: float
    reward_contribution: float
    guided_logprob: float
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., base_logprob: _Optional[float] = ..., reward_contribution: _Optional[float] = ..., guided_logprob: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("choice", "reason", "completion_tokens", "stop")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    choice: int
    reason: FinishReason
    completion_tokens: int
    stop: str
    def __init__(self, choice: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., completion_tokens: _Optional[int] = ..., stop: _Optional[str] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("usage", "timing", "exchange", "speculation", "audit")
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    usage: Usage
    timing: Timing
    exchange: ExchangeUse
    speculation: Speculation
    audit: bytes
    def __init__(self, usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., exchange: _Optional[_Union[ExchangeUse, _Mapping]] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ..., audit: _Optional[bytes] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "unguided_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNGUIDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    unguided_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., unguided_tokens: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_ms", "first_token_ms", "total_ms", "reward_stall_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    REWARD_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    first_token_ms: float
    total_ms: float
    reward_stall_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., first_token_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., reward_stall_ms: _Optional[float] = ...) -> None: ...

class ExchangeUse(_message.Message):
    __slots__ = ("bytes", "certified", "queried", "dense")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FIELD_NUMBER: _ClassVar[int]
    QUERIED_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    certified: int
    queried: int
    dense: int
    def __init__(self, bytes: _Optional[int] = ..., certified: _Optional[int] = ..., queried: _Optional[int] = ..., dense: _Optional[int] = ...) -> None: ...

class Speculation(_message.Message):
    __slots__ = ("base_passes", "drafted", "accepted")
    BASE_PASSES_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    base_passes: int
    drafted: int
    accepted: int
    def __init__(self, base_passes: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("base_models", "reward_models")
    BASE_MODELS_FIELD_NUMBER: _ClassVar[int]
    REWARD_MODELS_FIELD_NUMBER: _ClassVar[int]
    base_models: _containers.RepeatedCompositeFieldContainer[_types_pb2.BaseModel]
    reward_models: _containers.RepeatedCompositeFieldContainer[_types_pb2.RewardModel]
    def __init__(self, base_models: _Optional[_Iterable[_Union[_types_pb2.BaseModel, _Mapping]]] = ..., reward_models: _Optional[_Iterable[_Union[_types_pb2.RewardModel, _Mapping]]] = ...) -> None: ...

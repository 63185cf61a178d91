from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OnRewardLoss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_REWARD_LOSS_UNSPECIFIED: _ClassVar[OnRewardLoss]
    ON_REWARD_LOSS_WAIT: _ClassVar[OnRewardLoss]
    ON_REWARD_LOSS_FAIL: _ClassVar[OnRewardLoss]
    ON_REWARD_LOSS_UNGUIDED: _ClassVar[OnRewardLoss]

class Exchange(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXCHANGE_UNSPECIFIED: _ClassVar[Exchange]
    EXCHANGE_CERTIFIED: _ClassVar[Exchange]
    EXCHANGE_DENSE: _ClassVar[Exchange]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ROUTER: _ClassVar[Role]
    ROLE_BASE: _ClassVar[Role]
    ROLE_REWARD: _ClassVar[Role]
ON_REWARD_LOSS_UNSPECIFIED: OnRewardLoss
ON_REWARD_LOSS_WAIT: OnRewardLoss
ON_REWARD_LOSS_FAIL: OnRewardLoss
ON_REWARD_LOSS_UNGUIDED: OnRewardLoss
EXCHANGE_UNSPECIFIED: Exchange
EXCHANGE_CERTIFIED: Exchange
EXCHANGE_DENSE: Exchange
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
ROLE_UNSPECIFIED: Role
ROLE_ROUTER: Role
ROLE_BASE: Role
ROLE_REWARD: Role

class ObjectiveWeight(_message.Message):
    __slots__ = ("objective", "weight")
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    objective: str
    weight: float
    def __init__(self, objective: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class GuidanceTerm(_message.Message):
    __slots__ = ("reward", "preference", "strength")
    REWARD_FIELD_NUMBER: _ClassVar[int]
    PREFERENCE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    reward: str
    preference: _containers.RepeatedCompositeFieldContainer[ObjectiveWeight]
    strength: float
    def __init__(self, reward: _Optional[str] = ..., preference: _Optional[_Iterable[_Union[ObjectiveWeight, _Mapping]]] = ..., strength: _Optional[float] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("prompt", "chat", "tokens")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    chat: ChatMessages
    tokens: TokenIds
    def __init__(self, prompt: _Optional[str] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "stop", "stop_token_ids", "logprobs", "n", "ignore_eos")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    n: int
    ignore_eos: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ..., ignore_eos: bool = ...) -> None: ...

class Objective(_message.Message):
    __slots__ = ("name", "description")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class RewardModel(_message.Message):
    __slots__ = ("name", "objectives", "backbone", "method", "single_objective", "version", "retired")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVES_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SINGLE_OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RETIRED_FIELD_NUMBER: _ClassVar[int]
    name: str
    objectives: _containers.RepeatedCompositeFieldContainer[Objective]
    backbone: str
    method: str
    single_objective: bool
    version: int
    retired: bool
    def __init__(self, name: _Optional[str] = ..., objectives: _Optional[_Iterable[_Union[Objective, _Mapping]]] = ..., backbone: _Optional[str] = ..., method: _Optional[str] = ..., single_objective: bool = ..., version: _Optional[int] = ..., retired: bool = ...) -> None: ...

class AdapterRecord(_message.Message):
    __slots__ = ("name", "versions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    versions: _containers.RepeatedCompositeFieldContainer[AdapterVersion]
    def __init__(self, name: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[AdapterVersion, _Mapping]]] = ...) -> None: ...

class AdapterVersion(_message.Message):
    __slots__ = ("version", "source", "digest", "backbone_fingerprint", "put_at_ms", "retired_at_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PUT_AT_MS_FIELD_NUMBER: _ClassVar[int]
    RETIRED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    version: int
    source: str
    digest: bytes
    backbone_fingerprint: bytes
    put_at_ms: int
    retired_at_ms: int
    def __init__(self, version: _Optional[int] = ..., source: _Optional[str] = ..., digest: _Optional[bytes] = ..., backbone_fingerprint: _Optional[bytes] = ..., put_at_ms: _Optional[int] = ..., retired_at_ms: _Optional[int] = ...) -> None: ...

class AdapterFault(_message.Message):
    __slots__ = ("name", "version", "reason", "other_backbone")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OTHER_BACKBONE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    reason: str
    other_backbone: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., reason: _Optional[str] = ..., other_backbone: bool = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "context_tokens", "vocabulary", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    context_tokens: int
    vocabulary: int
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., context_tokens: _Optional[int] = ..., vocabulary: _Optional[int] = ..., has_chat_template: bool = ...) -> None: ...

class TokenizerFingerprint(_message.Message):
    __slots__ = ("core", "core_tokens", "full")
    CORE_FIELD_NUMBER: _ClassVar[int]
    CORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    core: bytes
    core_tokens: int
    full: bytes
    def __init__(self, core: _Optional[bytes] = ..., core_tokens: _Optional[int] = ..., full: _Optional[bytes] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("id", "generation", "role", "address", "tokenizer", "vocabulary", "capacity", "base_model", "reward_models", "group", "rank", "size", "adapter_faults")
    ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    REWARD_MODELS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FAULTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    generation: int
    role: Role
    address: str
    tokenizer: TokenizerFingerprint
    vocabulary: int
    capacity: int
    base_model: BaseModel
    reward_models: _containers.RepeatedCompositeFieldContainer[RewardModel]
    group: str
    rank: int
    size: int
    adapter_faults: _containers.RepeatedCompositeFieldContainer[AdapterFault]
    def __init__(self, id: _Optional[str] = ..., generation: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., tokenizer: _Optional[_Union[TokenizerFingerprint, _Mapping]] = ..., vocabulary: _Optional[int] = ..., capacity: _Optional[int] = ..., base_model: _Optional[_Union[BaseModel, _Mapping]] = ..., reward_models: _Optional[_Iterable[_Union[RewardModel, _Mapping]]] = ..., group: _Optional[str] = ..., rank: _Optional[int] = ..., size: _Optional[int] = ..., adapter_faults: _Optional[_Iterable[_Union[AdapterFault, _Mapping]]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

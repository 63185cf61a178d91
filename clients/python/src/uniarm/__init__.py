"""Client of UniARM: a frozen language model steered, token by token, toward the preference of each request.

    import uniarm

    with uniarm.Client("http://127.0.0.1:7000") as client:
        answer = client.generate("What should I do on a rainy Sunday?", preference={"positive": 0.7, "concise": 0.3})
        print(answer.text)
"""

from .aio import AsyncClient
from .batch import BatchItem, BatchProgress
from .client import Client
from .errors import (
    Cancelled,
    DeadlineExceeded,
    Error,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from .types import (
    Alternative,
    Answer,
    BaseModel,
    Event,
    Finished,
    Guidance,
    Message,
    Models,
    Request,
    Result,
    RewardModel,
    Started,
    Summary,
    TokenDetail,
    Tokens,
)

__all__ = [
    "Alternative",
    "Answer",
    "AsyncClient",
    "BaseModel",
    "BatchItem",
    "BatchProgress",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Error",
    "Event",
    "Finished",
    "Guidance",
    "Internal",
    "InvalidArgument",
    "Message",
    "Models",
    "NotFound",
    "PermissionDenied",
    "Request",
    "ResourceExhausted",
    "Result",
    "RewardModel",
    "Started",
    "Summary",
    "TokenDetail",
    "Tokens",
    "Unauthenticated",
    "Unavailable",
]

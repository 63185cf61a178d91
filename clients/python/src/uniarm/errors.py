"""The closed set of errors that a cluster answers with."""

from __future__ import annotations

from typing import Any

import grpc

from .v1 import details_pb2

# Key under which a status carries its details.
DETAILS = "grpc-status-details-bin"

# Cause of a request that asked to fail with its reward: nobody may try it again.
REWARD_LOST = "reward_lost"


class Error(Exception):
    """Why a request was refused or ended.

    `field` is the path of a bad field (`sampling.top_p`), `cause` a short stable word for programs, and `retry_after`
    the seconds after which a full cluster wants to be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        field: str | None = None,
        cause: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.field = field
        self.cause = cause
        self.retry_after = retry_after


class InvalidArgument(Error, ValueError):
    """A field is wrong; it is named. The client itself says so of what it cannot even send."""


class Unauthenticated(Error):
    """The routers want an API key, and this is none of theirs."""


class PermissionDenied(Error):
    """The key is known, and its holder may not have this; a field is named."""


class NotFound(Error):
    """No such model or reward model."""


class ResourceExhausted(Error):
    """A queue or a pool is full."""


class DeadlineExceeded(Error):
    """The deadline passed."""


class Unavailable(Error):
    """A router, or a worker that the request needs, cannot be reached."""


class Cancelled(Error):
    """The request was cancelled."""


class Internal(Error):
    """A fault of the cluster."""


_CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: Internal,
}


def of_rpc(error: Any) -> Error:
    """The typed form of what grpcio raises."""
    code, message = error.code(), error.details() or ""
    found: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS:
            found = _read_details(value)
    return _CLASSES.get(code, Error)(message, code=code, **found)


def _read_details(raw: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for detail in details_pb2.Status.FromString(raw).details:
        kind = detail.type_url.rpartition("/")[2]
        if kind == "google.rpc.BadRequest":
            for violation in details_pb2.BadRequest.FromString(detail.value).field_violations[:1]:
                found["field"] = violation.field
        elif kind == "google.rpc.RetryInfo":
            delay = details_pb2.RetryInfo.FromString(detail.value).retry_delay
            found["retry_after"] = delay.seconds + delay.nanos / 1e9
        elif kind == "google.rpc.ErrorInfo":
            found["cause"] = details_pb2.ErrorInfo.FromString(detail.value).reason
    return found

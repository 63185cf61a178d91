"""How a router is dialled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import grpc

# A silent router is asked for a sign of life, and is lost when it gives none: a process that hangs costs its streams at
# most the sum. As the Rust client has it.
_OPTIONS = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The client's own rules decide when a router that broke is dialled again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),
]


def dial(module: Any, address: str, is_encrypted: bool, credentials: grpc.ChannelCredentials | None) -> Any:
    """A channel of `module`, which is grpc or grpc.aio."""
    if is_encrypted or credentials is not None:
        return module.secure_channel(address, credentials or grpc.ssl_channel_credentials(), options=_OPTIONS)
    return module.insecure_channel(address, options=_OPTIONS)


def signed(metadata: Sequence[tuple[str, str]], api_key: str | None) -> list[tuple[str, str]]:
    """The metadata of every call, with the key that routers look for."""
    key = os.environ.get("UNIARM_API_KEY") if api_key is None else api_key
    return [*metadata, *([("authorization", f"Bearer {key}")] if key else [])]

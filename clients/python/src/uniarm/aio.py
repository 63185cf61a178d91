"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from . import errors
from ._channel import dial, signed
from ._resume import Fault, Journey, Turns, endpoints_of
from .batch import IN_FLIGHT, BatchItem, BatchProgress, run_batch_async
from .client import _request
from .types import Event, Models, Request, Result, event_of_wire, models_of_wire
from .v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .types import RequestFields


class AsyncClient:
    """As `Client`, with coroutines and asynchronous iterators."""

    def __init__(
        self,
        endpoints: str | Sequence[str] = "http://127.0.0.1:7000",
        *,
        patience: float = 0.0,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        routers = endpoints_of(endpoints)
        self._channels = [dial(grpc.aio, address, encrypted, credentials) for address, encrypted in routers]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._turns = Turns(len(routers))
        self._patience = patience
        self._metadata = signed(metadata, api_key)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def models(self, *, timeout: float | None = 10.0) -> Models:
        last: errors.Error = errors.Unavailable("no router answers", code=grpc.StatusCode.UNAVAILABLE)
        for _ in self._stubs:
            router = self._turns.choose(time.monotonic())
            try:
                wire = await self._stubs[router].ListModels(
                    inference_pb2.ListModelsRequest(), timeout=timeout, metadata=self._metadata
                )
                return models_of_wire(wire)
            except grpc.RpcError as error:
                last = errors.of_rpc(error)
                if Fault.of(last) is not Fault.CONNECTION:
                    break
                self._turns.leave_alone(router, time.monotonic())
        raise last

    def stream(
        self, prompt: str | Request | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> AsyncIterator[Event]:
        request = _request(prompt, fields)
        return self._events(Journey(request.to_wire(), len(self._stubs), self._patience), timeout)

    async def generate(
        self, prompt: str | Request | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Result:
        result = Result()
        async for event in self.stream(prompt, timeout=timeout, **fields):
            result.apply(event)
        return result

    def batch(
        self,
        requests: Iterable[str | Request],
        *,
        in_flight: int = IN_FLIGHT,
        timeout: float | None = None,
        progress: bool | Callable[[BatchProgress], None] = False,
    ) -> AsyncIterator[BatchItem]:
        return run_batch_async(lambda request: self.generate(request, timeout=timeout), requests, in_flight, progress)

    async def _events(self, journey: Journey, timeout: float | None) -> AsyncIterator[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        router = self._turns.choose(time.monotonic())
        while not journey.is_over:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            call = self._stubs[router].Generate(journey.request(), timeout=left, metadata=self._metadata)
            try:
                async for wire in call:
                    event = event_of_wire(wire)
                    if journey.take(wire) and event is not None:
                        yield event
                if journey.is_over:
                    return
                message = "the stream ended before the answer did"
                lost: errors.Error = errors.Unavailable(message, code=grpc.StatusCode.UNAVAILABLE)
            except grpc.RpcError as error:
                lost = errors.of_rpc(error)
            finally:
                call.cancel()
            router = await self._after_loss(journey, router, lost, deadline)

    async def _after_loss(self, journey: Journey, router: int, lost: errors.Error, deadline: float | None) -> int:
        fault, now = Fault.of(lost), time.monotonic()
        if fault is Fault.CONNECTION:
            self._turns.leave_alone(router, now)
        wait = journey.repeats.on_loss(fault, now, random.random())
        if wait is None:
            raise lost
        if deadline is not None and now + wait >= deadline:
            message = "the deadline passed before the last token"
            raise errors.DeadlineExceeded(message, code=grpc.StatusCode.DEADLINE_EXCEEDED) from lost
        await asyncio.sleep(wait)
        return self._turns.choose(time.monotonic(), router)

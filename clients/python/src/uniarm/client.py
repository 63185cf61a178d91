"""The client for programs without an event loop."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from . import errors
from ._channel import dial, signed
from ._resume import Fault, Journey, Turns, endpoints_of
from .batch import IN_FLIGHT, BatchItem, BatchProgress, run_batch
from .types import Event, Models, Request, Result, event_of_wire, models_of_wire
from .v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .types import RequestFields


class Client:
    """The routers of a cluster. It may be used by several threads."""

    def __init__(
        self,
        endpoints: str | Sequence[str] = "http://127.0.0.1:7000",
        *,
        patience: float = 0.0,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`patience`: seconds that a request which no router takes is sent again; by default each is asked once.
        `api_key`: what the routers know you by, where they ask for a key; by default $UNIARM_API_KEY."""
        routers = endpoints_of(endpoints)
        self._channels = [dial(grpc, address, encrypted, credentials) for address, encrypted in routers]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._turns = Turns(len(routers))
        self._lock = threading.Lock()
        self._patience = patience
        self._metadata = signed(metadata, api_key)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def models(self, *, timeout: float | None = 10.0) -> Models:
        """What the cluster serves."""
        last: errors.Error = errors.Unavailable("no router answers", code=grpc.StatusCode.UNAVAILABLE)
        for _ in self._stubs:
            router = self._choose()
            try:
                wire = self._stubs[router].ListModels(
                    inference_pb2.ListModelsRequest(), timeout=timeout, metadata=self._metadata
                )
                return models_of_wire(wire)
            except grpc.RpcError as error:
                last = errors.of_rpc(error)
                if Fault.of(last) is not Fault.CONNECTION:
                    break
                self._leave_alone(router)
        raise last

    def stream(
        self, prompt: str | Request | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Iterator[Event]:
        """The events of a request, each once and in order, whatever becomes of its routers.

        `timeout`: seconds over all repeats. Closing the iterator cancels the request.
        """
        request = _request(prompt, fields)
        return self._events(Journey(request.to_wire(), len(self._stubs), self._patience), timeout)

    def generate(
        self, prompt: str | Request | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Result:
        """Runs a request to its end."""
        result = Result()
        for event in self.stream(prompt, timeout=timeout, **fields):
            result.apply(event)
        return result

    def batch(
        self,
        requests: Iterable[str | Request],
        *,
        in_flight: int = IN_FLIGHT,
        timeout: float | None = None,
        progress: bool | Callable[[BatchProgress], None] = False,
    ) -> Iterator[BatchItem]:
        """Runs many requests, `in_flight` at a time, and yields them in their order, each with its result or error.

        `timeout`: seconds for each. `progress`: True shows a line on a terminal.
        """
        return run_batch(lambda request: self.generate(request, timeout=timeout), requests, in_flight, progress)

    def _events(self, journey: Journey, timeout: float | None) -> Iterator[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        router = self._choose()
        while not journey.is_over:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            call = self._stubs[router].Generate(journey.request(), timeout=left, metadata=self._metadata)
            try:
                for wire in call:
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
            router = self._after_loss(journey, router, lost, deadline)

    def _after_loss(self, journey: Journey, router: int, lost: errors.Error, deadline: float | None) -> int:
        """Waits as long as it should, and says who is asked next; or raises, because this was the end."""
        fault, now = Fault.of(lost), time.monotonic()
        if fault is Fault.CONNECTION:
            self._leave_alone(router)
        wait = journey.repeats.on_loss(fault, now, random.random())
        if wait is None:
            raise lost
        if deadline is not None and now + wait >= deadline:
            message = "the deadline passed before the last token"
            raise errors.DeadlineExceeded(message, code=grpc.StatusCode.DEADLINE_EXCEEDED) from lost
        time.sleep(wait)
        return self._choose(router)

    def _choose(self, lost: int | None = None) -> int:
        with self._lock:
            return self._turns.choose(time.monotonic(), lost)

    def _leave_alone(self, router: int) -> None:
        with self._lock:
            self._turns.leave_alone(router, time.monotonic())


def _request(prompt: str | Request | None, fields: RequestFields) -> Request:
    if isinstance(prompt, Request):
        return replace(prompt, **fields) if fields else prompt
    return Request(prompt, **fields)

"""Many requests, some at a time. For millions of lines, and for work that outlives its process, there is `uniarm batch`."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from . import errors
from .types import Request, Result

# Rows beyond it make a step slower, not a token cheaper.
IN_FLIGHT = 64

# Wait of a request that a full or absent cluster refused; it doubles with each refusal.
_WAIT_FIRST = 0.25
_WAIT_LONGEST = 15.0

# A cluster that takes a request in none of so many attempts is not there: about two minutes.
_ATTEMPTS = 14

_SHOW_EVERY = 0.5


@dataclass(frozen=True)
class BatchItem:
    """A request of a batch, with its result or its error."""

    index: int
    request: Request
    result: Result | None
    error: errors.Error | None


@dataclass
class BatchProgress:
    """How far a batch is."""

    done: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0


class _Watch:
    """Counts what is done, and tells whoever wants to know."""

    def __init__(self, progress: bool | Callable[[BatchProgress], None]) -> None:
        self._began = time.monotonic()
        self._shown = self._began
        self._is_shown = progress is True and sys.stderr.isatty()
        self._tell = progress if callable(progress) else None
        self._so_far = BatchProgress()

    def count(self, item: BatchItem) -> BatchItem:
        now = time.monotonic()
        so_far = self._so_far
        so_far.done += 1
        so_far.failed += item.error is not None
        if item.result is not None:
            so_far.tokens += sum(len(answer.ids) for answer in item.result.answers)
        so_far.seconds = now - self._began
        if self._tell:
            self._tell(so_far)
        if self._is_shown and now - self._shown >= _SHOW_EVERY:
            self._shown = now
            speed = so_far.tokens / max(so_far.seconds, 1e-9)
            line = f"\r{so_far.done} done, {so_far.failed} failed, {speed:.0f} tokens/s "
            print(line, end="", file=sys.stderr, flush=True)
        return item

    def end(self) -> None:
        if self._is_shown:
            print(file=sys.stderr)


def _wait(error: errors.Error, attempt: int) -> float | None:
    """Seconds until the next attempt; None: there is none."""
    is_temporary = isinstance(error, (errors.ResourceExhausted, errors.Unavailable))
    if not is_temporary or error.cause == errors.REWARD_LOST or attempt + 1 >= _ATTEMPTS:
        return None
    if error.retry_after is not None:
        return error.retry_after
    return min(_WAIT_FIRST * float(2**attempt), _WAIT_LONGEST) * (0.5 + 0.5 * random.random())


def _requests(requests: Iterable[str | Request]) -> Iterator[tuple[int, Request]]:
    for index, request in enumerate(requests):
        yield index, Request(request) if isinstance(request, str) else request


def run_batch(
    ask: Callable[[Request], Result],
    requests: Iterable[str | Request],
    in_flight: int,
    progress: Any,
) -> Iterator[BatchItem]:
    def one(index: int, request: Request) -> BatchItem:
        for attempt in range(_ATTEMPTS):
            try:
                return BatchItem(index, request, ask(request), None)
            except errors.Error as error:
                wait = _wait(error, attempt)
                if wait is None:
                    return BatchItem(index, request, None, error)
                time.sleep(wait)
        raise AssertionError("the last attempt has no wait")

    watch = _Watch(progress)
    running: deque[Future[BatchItem]] = deque()
    with ThreadPoolExecutor(max_workers=in_flight) as pool:
        try:
            for index, request in _requests(requests):
                if len(running) >= in_flight:
                    yield watch.count(running.popleft().result())
                running.append(pool.submit(one, index, request))
            while running:
                yield watch.count(running.popleft().result())
        finally:
            # Whoever stops reading wants no more of it.
            for future in running:
                future.cancel()
            watch.end()


async def run_batch_async(
    ask: Callable[[Request], Awaitable[Result]],
    requests: Iterable[str | Request],
    in_flight: int,
    progress: Any,
) -> AsyncIterator[BatchItem]:
    async def one(index: int, request: Request) -> BatchItem:
        for attempt in range(_ATTEMPTS):
            try:
                return BatchItem(index, request, await ask(request), None)
            except errors.Error as error:
                wait = _wait(error, attempt)
                if wait is None:
                    return BatchItem(index, request, None, error)
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt has no wait")

    watch = _Watch(progress)
    running: deque[asyncio.Task[BatchItem]] = deque()
    try:
        for index, request in _requests(requests):
            if len(running) >= in_flight:
                yield watch.count(await running.popleft())
            running.append(asyncio.create_task(one(index, request)))
        while running:
            yield watch.count(await running.popleft())
    finally:
        for task in running:
            task.cancel()
        watch.end()

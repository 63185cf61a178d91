"""When a request is sent again, and what it goes on with: no I/O, no clock of its own.

The same rules as the Rust client's (proto/src/cluster_client.rs): what has begun goes on at another router with the
tokens so far, and its reader sees one stream.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from . import errors
from .v1 import inference_pb2

# Seconds that a router whose connection broke is not asked first.
LEFT_ALONE = 2.0

# A stream that has begun and finds no router for so many seconds ends.
RECOVERY_LONGEST = 60.0

# Wait after all routers have been tried; it doubles with each round.
WAIT_FIRST = 0.05
WAIT_LONGEST = 2.0


class Fault(enum.Enum):
    """Where the fault of a failed call lies, and so what may help."""

    CONNECTION = "the router cannot be reached, or was lost on the way"
    ELSEWHERE = "the router works and cannot do it now"
    REQUEST = "the request would end like this everywhere"

    @staticmethod
    def of(error: errors.Error) -> Fault:
        if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Fault.ELSEWHERE
        if error.code != grpc.StatusCode.UNAVAILABLE or error.cause == errors.REWARD_LOST:
            return Fault.REQUEST
        # What a router says has a cause; what grpcio says of a broken connection has none.
        return Fault.ELSEWHERE if error.cause else Fault.CONNECTION


@dataclass
class Repeats:
    """When a request is sent again."""

    routers: int
    # How long a request insists that no router has taken.
    patience: float
    has_begun: bool = False
    # Since the last new event.
    losses: int = 0
    lost_at: float | None = None

    def on_progress(self) -> None:
        self.has_begun = True
        self.losses = 0
        self.lost_at = None

    def on_loss(self, fault: Fault, now: float, die: float) -> float | None:
        """The wait before the next try; None: there is none. `die` is in [0, 1]."""
        if fault is Fault.REQUEST:
            return None
        self.losses += 1
        if self.lost_at is None:
            self.lost_at = now
        rounds = self.losses // max(self.routers, 1)
        patience = RECOVERY_LONGEST if self.has_begun else self.patience
        if rounds > 0 and now - self.lost_at >= patience:
            return None
        if rounds == 0:
            return 0.0
        # Between half of it and all: clients of one lost router do not come to the next one together.
        return min(WAIT_FIRST * float(2 ** min(rounds - 1, 16)), WAIT_LONGEST) * (0.5 + 0.5 * die)


@dataclass
class _AnswerSoFar:
    ids: list[int] = field(default_factory=list)
    unguided_tokens: int = 0
    is_finished: bool = False


class Journey:
    """A request on its way through routers: what it has, and what it sends next."""

    def __init__(self, request: inference_pb2.GenerateRequest, routers: int, patience: float) -> None:
        self._request = request
        self._answers: dict[int, _AnswerSoFar] = {}
        self._has_started = False
        self.repeats = Repeats(routers, patience)
        self.is_over = False

    def request(self) -> inference_pb2.GenerateRequest:
        """As it is sent now, with the tokens so far."""
        del self._request.resume[:]
        for choice, answer in self._answers.items():
            self._request.resume.add(
                choice=choice,
                ids=answer.ids,
                unguided_tokens=answer.unguided_tokens,
                finished=answer.is_finished,
            )
        return self._request

    def take(self, wire: inference_pb2.GenerateResponse) -> bool:
        """Books an event. False: it says nothing new."""
        kind = wire.WhichOneof("event")
        if kind == "started":
            return self._start(wire.started)
        if kind == "tokens":
            is_new = self._record(wire.tokens)
        elif kind == "finished":
            answer = self._answers.setdefault(wire.finished.choice, _AnswerSoFar())
            is_new = not answer.is_finished
            answer.is_finished = True
        else:
            is_new = True
            self.is_over = kind == "summary"
        if is_new:
            self.repeats.on_progress()
        return is_new

    def _start(self, started: inference_pb2.Started) -> bool:
        self.repeats.has_begun = True
        # What the router drew belongs to the request from now on.
        self._request.request_id = started.request_id
        self._request.sampling.seed = started.seed
        self._request.model = started.model
        del self._request.guidance[:]
        self._request.guidance.extend(started.guidance)
        is_first = not self._has_started
        self._has_started = True
        return is_first

    def _record(self, tokens: inference_pb2.Tokens) -> bool:
        answer = self._answers.setdefault(tokens.choice, _AnswerSoFar())
        have = len(answer.ids)
        if tokens.ids and tokens.position + len(tokens.ids) <= have:
            return False
        if tokens.position != have or answer.is_finished:
            message = f"answer {tokens.choice} has {have} tokens, and goes on at {tokens.position}"
            raise errors.Internal(message, code=grpc.StatusCode.INTERNAL)
        answer.ids.extend(tokens.ids)
        answer.unguided_tokens += len(tokens.unguided)
        return True


class Turns:
    """Which router is asked next."""

    def __init__(self, routers: int) -> None:
        self._lost_at: list[float | None] = [None] * routers
        self._turn = 0

    def choose(self, now: float, lost: int | None = None) -> int:
        """The next in turn, rather not `lost`, and none that broke a moment ago, if there is another."""
        count = len(self._lost_at)
        first, self._turn = self._turn, self._turn + 1
        in_turn = [(first + step) % count for step in range(count)]
        others = [router for router in in_turn if router != lost]
        well = [router for router in others if not self._is_left_alone(router, now)]
        return (well or others or [0])[0]

    def leave_alone(self, router: int, now: float) -> None:
        self._lost_at[router] = now

    def _is_left_alone(self, router: int, now: float) -> bool:
        lost_at = self._lost_at[router]
        return lost_at is not None and now - lost_at < LEFT_ALONE


def endpoints_of(endpoints: str | Sequence[str]) -> list[tuple[str, bool]]:
    """Addresses as grpcio wants them, and whether they are encrypted."""
    listed = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    if not listed:
        raise ValueError("a client wants the address of a router, such as http://127.0.0.1:7000")
    parted = [one.rstrip("/").rpartition("://") for one in listed]
    for (scheme, _, _), whole in zip(parted, listed):
        if scheme not in ("", "http", "https"):
            raise ValueError(f"{whole!r} is not an address such as http://127.0.0.1:7000")
    return [(address, scheme == "https") for scheme, _, address in parted]

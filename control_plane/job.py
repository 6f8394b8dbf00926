"""The control plane's own record of one accepted request, from acceptance to its end. One object, used by queue, dispatch,
executor and manager; users see :class:`~control_plane.types.RequestMetadata` and ``RequestStatusInfo``.
"""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from control_plane.body_memory import BodyMemory
from control_plane.protocols import Call, Sink, WireRequest
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, RequestStatus, SchedulingDecision, Usage

_PENDING: Final = RequestStatus.PENDING


class LaneKey(NamedTuple):
    """Requests that the same instances may serve wait in one lane."""

    model: str
    kind: RequestKind
    pinned: str | None = None
    avoid: frozenset[str] = frozenset()


class Decided(Protocol):
    """What dispatch went by; see ``policies.decision``."""

    def written_out(self, request_id: str) -> SchedulingDecision: ...


class Job:
    """``*_s`` are monotonic seconds; 0.0 means the point was not reached."""

    __slots__ = (
        "_body_memory",
        "arrival_s",
        "attempts",
        "call",
        "cost_usd",
        "decided",
        "end_s",
        "error",
        "filled_in",
        "first_token_s",
        "held_bytes",
        "input_tokens",
        "instance",
        "key",
        "lane",
        "last_token_s",
        "latest_start_s",
        "order",
        "output_tokens",
        "owner",
        "phase",
        "predicted_ms",
        "prefill_ms",
        "pulled_back",
        "queued",
        "relegated",
        "request",
        "request_id",
        "scheduled_s",
        "seq",
        "sink",
        "spent_usd",
        "state",
        "tried",
        "unreached_since_s",
        "usage",
        "waits_for",
        "waits_ms",
        "wire",
        "work_ms",
    )

    def __init__(
        self, request: RequestMetadata, lane: LaneKey, wire: WireRequest, sink: Sink, arrival_s: float, owner: RequestMetadata | None = None
    ) -> None:
        #: what everything here goes by
        self.request = request
        #: the object of a caller who may change it under us; ``request`` is a copy of it then
        self.owner = owner
        #: kept here too, since a ``request`` without a copy may change under us
        self.request_id = request.request_id
        #: fields of the request that its caller left open and the control plane filled in while it is live
        self.filled_in: tuple[str, ...] = ()
        self.lane = lane
        self.wire = wire
        self.sink = sink
        self.arrival_s = arrival_s
        self.scheduled_s = 0.0
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.end_s = 0.0
        #: the policy's key, lower first; does not change while it waits
        self.key = 0.0
        #: the queue's order (a number) that the key belongs to
        self.order = 0
        #: order of acceptance; breaks ties, survives a retry
        self.seq = 0
        #: last moment at which starting still meets the deadline; +inf without one
        self.latest_start_s = float("inf")
        self.relegated = False
        #: predicted milliseconds of an instance that it takes up; 0.0: not asked yet
        self.work_ms = 0.0
        #: in a lane of the queue right now
        self.queued = False
        self.state = _PENDING
        #: how often it was sent to an engine that it reached
        self.attempts = 0
        #: how often it was taken back from an engine for a more urgent one
        self.pulled_back = 0
        #: instances that it reached and that failed under it
        self.tried: frozenset[str] = frozenset()
        #: since when no engine could even be connected to; 0.0: not so
        self.unreached_since_s = 0.0
        self.input_tokens = 0
        self.output_tokens = 0
        self.predicted_ms = 0.0
        #: predicted prefill where it runs, of what is not cached there
        self.prefill_ms = 0.0
        #: the instance that it waits for although others have room, and its predicted prefill there
        self.waits_for: ExecutionInstance | None = None
        self.waits_ms = 0.0
        self.phase: str | None = None
        self.decided: Decided | None = None
        #: what it is predicted to cost where it runs
        self.cost_usd = 0.0
        #: what it did cost, of those that were answered
        self.spent_usd = 0.0
        self.instance: ExecutionInstance | None = None
        self.call: Call | None = None
        self.usage: Usage | None = None
        self.error: Exception | None = None
        #: bytes of its body that are counted in the memory of bodies
        self.held_bytes = 0
        self._body_memory: BodyMemory | None = None

    @property
    def decision(self) -> SchedulingDecision | None:
        """Where it went and why; written out when somebody looks."""
        return None if self.decided is None else self.decided.written_out(self.request_id)

    @property
    def shown(self) -> RequestMetadata:
        """The object that its caller knows."""
        return self.request if self.owner is None else self.owner

    def stamp(self, **times: datetime | None) -> None:
        """Write times to the request, and to the caller's object while that is still this request."""
        owner = self.owner
        if owner is not None and owner.request_id != self.request_id:
            owner = None
        for name, moment in times.items():
            setattr(self.request, name, moment)
            if owner is not None:
                setattr(owner, name, moment)

    def fill_in(self, name: str, value: float | str | None) -> None:
        """Set a field that the caller left open, until :meth:`leave_open`."""
        setattr(self.request, name, value)
        if name not in self.filled_in:
            self.filled_in += (name,)

    def leave_open(self) -> None:
        """Give the request back as its caller left it, so that it may be sent again."""
        for name in self.filled_in:
            setattr(self.request, name, None)
        self.filled_in = ()

    def forget_content(self) -> None:
        """After its end: thousands are remembered, and the text of none is asked for again. A policy that still decides keeps its own."""
        if self.owner is None:
            return
        self.request = copy.copy(self.request)
        self.request.prompt, self.request.messages, self.request.input = "", None, None
        self.request.extra_body = {}
        self.owner = None

    def wait_for(self, instance: ExecutionInstance, prefill_ms: float) -> None:
        """It is worth waiting for ``instance``, which has no room; those that are placed meanwhile count it there."""
        self.waits_for = instance
        self.waits_ms = prefill_ms
        instance.awaited_ms += prefill_ms

    def waits_no_more(self) -> None:
        """It is decided anew, or has left the queue. May repeat."""
        instance = self.waits_for
        if instance is not None:
            self.waits_for = None
            left_ms = instance.awaited_ms - self.waits_ms
            # sums of floats drift
            instance.awaited_ms = left_ms if left_ms > 1e-6 else 0.0

    def hold_body(self, memory: BodyMemory) -> None:
        """It was accepted: its body, which fits there, counts until :meth:`let_go_of_body`."""
        self._body_memory = memory
        self.held_bytes = len(self.wire.body)
        memory.take(self.held_bytes)

    def let_go_of_body(self) -> None:
        """Nobody holds the body any more. May repeat."""
        memory = self._body_memory
        if memory is not None:
            self._body_memory = None
            memory.give_back(self.held_bytes)
            self.held_bytes = 0

"""The seams of the house: what decisions may look at, and how bytes flow from an engine to whoever waits for them.

Decisions (policies, routers, PD routing, admission) get a :class:`FleetView` and return values; they do no I/O. Bytes flow through
callbacks: an :class:`Engine` runs one leg of a plan and feeds a :class:`Sink`; the :class:`Call` it returns is the way back.
All of it runs on one event loop, in one thread, so between view and decision nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from control_plane.errors import ControlPlaneError
from control_plane.types import ExecutionInstance, Leg, RequestMetadata
from control_plane.wire_request import EngineOutcome as EngineOutcome
from control_plane.wire_request import Headers as Headers
from control_plane.wire_request import WireRequest as WireRequest


class Call(Protocol):
    """The way back to a running leg. All three may be called at any time and more than once."""

    def pause(self) -> None:
        """Stop reading from the engine (the client is slow)."""

    def resume(self) -> None:
        """Read on."""

    def cancel(self) -> None:
        """Drop the connection so that the engine stops working; the sink hears nothing more."""


class Sink(Protocol):
    """Where an answer goes. Order: ``started`` once, then ``chunk`` and ``tokens``, then ``finished`` or ``failed`` once.

    ``failed`` may come first and alone. Chunks of a streamed answer are whole server-sent events; chunks of a unary one are the
    body's bytes. ``tokens(n, first_s, last_s)``: n output tokens came between two monotonic times (an engine model reports many
    steps at once, an engine over HTTP some at a time after the first). ``started`` is called only for a 2xx; any other status ends
    in ``failed(EngineError)``. A sink that has ``frame(frame, data)`` too gets some of its chunks there, with their HTTP framing
    beside them.
    """

    def started(self, status: int, headers: Headers, call: Call) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def tokens(self, n: int, first_s: float, last_s: float) -> None: ...
    def finished(self, outcome: EngineOutcome) -> None: ...
    def failed(self, error: ControlPlaneError) -> None: ...


class Engine(Protocol):
    """Runs legs on one instance: an HTTP server, or a model of one in the simulator's time."""

    def start(self, leg: Leg, wire: WireRequest, sink: Sink, request: RequestMetadata) -> Call:
        """Begin; never blocks, never raises: what goes wrong reaches ``sink.failed`` (maybe before this returns)."""

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """One small unary GET (health, models, metrics) beside the traffic. Raises InstanceFailed."""

    async def close(self) -> None: ...


class PrefixMatches(Protocol):
    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        """Tokens of the prompt whose KV blocks that instance is believed to hold."""

    def cached_tokens_of(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
        """:meth:`cached_tokens` on each of them; the prompt is looked at once."""

    def holders(self, request: RequestMetadata, limit: int) -> Sequence[ExecutionInstance]:
        """The instances that hold the most of the prompt, at most ``limit``, the most first; empty where nobody knows."""

    def lost_tokens(self, instance: ExecutionInstance, tokens: int) -> float:
        """How many tokens are expected to be computed again because ``tokens`` new ones take their room in its cache."""


class Queued(NamedTuple):
    """What is in flight on one instance, first hand: ``prompts`` of which no token has come and their ``prompt_tokens`` that its cache did
    not hold, ``context_tokens`` of all in flight."""

    prompts: float
    prompt_tokens: float
    context_tokens: float


class Predictor(Protocol):
    """Milliseconds and dollars, finite from the first call on (a roofline prior stands in until there are samples)."""

    def input_tokens(self, request: RequestMetadata) -> int: ...
    def output_tokens(self, request: RequestMetadata) -> int: ...
    def prefill_ms(self, instance: ExecutionInstance, tokens: int) -> float:
        """Own prefill of that many uncached tokens, on an idle instance."""

    def tpot_ms(self, instance: ExecutionInstance) -> float:
        """Milliseconds per further output token at its present batch."""

    def newcomers_ms(
        self, instances: Sequence[ExecutionInstance], cached_tokens: Sequence[int], prompt_tokens: int
    ) -> list[tuple[float, float, float, float, float]]:
        """Of a request that comes now, on each of them: the steps of the prompts ahead of its own; those of its own; by how much it
        lengthens those of the others; each step of its answer; by how much it lengthens each step of theirs."""

    def queued(self, instance: ExecutionInstance) -> Queued:
        """What was sent there and has not come back."""

    def wait_ms(self, instance: ExecutionInstance) -> float:
        """What is in flight there ahead of a newcomer, until its first token could start."""

    def service_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        """Prefill and decode of this request there, without waiting."""

    def cost_usd(self, request: RequestMetadata, instance: ExecutionInstance) -> float: ...


class FleetView(Protocol):
    """All that a decision may look at."""

    @property
    def now_s(self) -> float: ...
    @property
    def predictor(self) -> Predictor: ...
    @property
    def prefixes(self) -> PrefixMatches: ...
    def instances(self) -> Sequence[ExecutionInstance]:
        """Every registered instance, usable or not."""

    def get(self, instance_id: str) -> ExecutionInstance | None: ...


class EventSink(Protocol):
    """Hears what happens (``instance_unhealthy``, ``policy_switched``, ...): logs, metrics, the dashboard."""

    def event(self, name: str, message: str, **fields: Any) -> None: ...

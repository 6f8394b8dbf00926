"""What a simulation runs: requests with their times and sizes, and which of them share a prefix. No texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from control_plane.errors import InvalidRequest

#: tokens of a block of a trace (Mooncake's): equal ids are equal prefixes
TRACE_BLOCK_TOKENS = 512


@dataclass(slots=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
        arrival_s: seconds since the workload's start; the earliest where ``think_s`` is given.
        prompt_tokens, output_tokens: its lengths; the control plane is not told the second.
        block_ids: one id for each block of ``Workload.block_tokens`` of its tokens, prompt first, the last may be partly filled. Equal
            ids mean that everything up to the end of that block is equal. Ids beyond the prompt are those of its answer, which the
            next turn of a conversation repeats. Empty: it shares nothing.
        session_id: requests of one conversation or agent; "": it stands alone.
        tenant: whom it is for.
        slo_class: by whose targets it is judged; "": assigned by :mod:`~control_plane.simulator.slo`.
        priority: a name of RequestPriority, in lower case.
        ttft_slo_ms, tpot_slo_ms, slo_deadline_ms: what it asked for, end to end the last; None: nothing. One that asked for anything
            is judged by that alone.
        think_s: it comes this long after the answer to the session's request before it (closed loop); None: at ``arrival_s``.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    session_id: str = ""
    tenant: str = ""
    slo_class: str = ""
    priority: str = "normal"
    think_s: float | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    slo_deadline_ms: float | None = None

    @property
    def has_targets(self) -> bool:
        return self.ttft_slo_ms is not None or self.tpot_slo_ms is not None or self.slo_deadline_ms is not None


@dataclass(slots=True)
class Workload:
    """Requests in order of arrival, and where they come from.

    Attributes:
        name: a trace's or a generator's.
        block_tokens: tokens of one block of ``block_ids``.
        source: a line for people: from where, under which licence, or which generator with which arguments.
    """

    name: str
    requests: list[TraceRequest]
    block_tokens: int = TRACE_BLOCK_TOKENS
    source: str = ""
    duration_s: float = field(default=0.0)

    def __post_init__(self) -> None:
        if not self.requests:
            raise InvalidRequest(f"workload {self.name!r} has no requests", param="trace")
        self.duration_s = self.duration_s or self.requests[-1].arrival_s

    @property
    def rate_rps(self) -> float:
        """Requests a second over its whole duration; 0.0 where all come at once."""
        return len(self.requests) / self.duration_s if self.duration_s > 0 else 0.0

    def with_requests(self, requests: Iterable[TraceRequest], duration_s: float = 0.0) -> Workload:
        """Others of the same kind and source."""
        return Workload(self.name, list(requests), self.block_tokens, self.source, duration_s)

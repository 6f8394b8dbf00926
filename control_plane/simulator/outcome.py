"""What a run gave: the times of every request, and where they went. Columns, not objects: a million requests are 80 MB."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from control_plane.simulator.slo import SloClass

#: the workload begins so long after the control plane: probes have been there, and no time of a request is 0.0, which means "not reached"
BEGIN_S: Final = 1.0
#: of a request: what became of it
UNSENT, LIVE, COMPLETED, FAILED, REJECTED = range(5)


class Outcomes:
    """One row a request, in the workload's order. Times in seconds of the virtual loop (the workload begins at ``BEGIN_S``), 0.0: not
    reached."""

    __slots__ = ("arrival_s", "cached_tokens", "end_s", "first_s", "instance", "output_tokens", "prompt_tokens", "state")

    def __init__(self, count: int) -> None:
        self.arrival_s = array("d", bytes(8 * count))
        self.first_s = array("d", bytes(8 * count))
        self.end_s = array("d", bytes(8 * count))
        self.prompt_tokens = array("l", bytes(8 * count))
        self.output_tokens = array("l", bytes(8 * count))
        self.cached_tokens = array("l", bytes(8 * count))
        #: number of the instance that it was sent to last; -1: none
        self.instance = array("l", [-1]) * count
        self.state = array("b", bytes(count))

    def __len__(self) -> int:
        return len(self.state)

    def ttft_ms(self, row: int) -> float:
        return (self.first_s[row] - self.arrival_s[row]) * 1000.0

    def e2e_ms(self, row: int) -> float:
        return (self.end_s[row] - self.arrival_s[row]) * 1000.0

    def tpot_ms(self, row: int) -> float:
        """Milliseconds per output token after the first; 0.0 for answers of one."""
        tokens = self.output_tokens[row]
        return 0.0 if tokens < 2 else (self.end_s[row] - self.first_s[row]) * 1000.0 / (tokens - 1)


@dataclass(slots=True)
class Sample:
    """The fleet so many seconds after the workload's beginning: what waits in the control plane, what each engine runs and has waiting."""

    at_s: float
    queued: int
    running: list[int]
    waiting: list[int]
    kv_usage: list[float]


@dataclass(slots=True)
class RunResult:
    """All that is kept of a run.

    Attributes:
        classes: the class of each request.
        codes: how many requests ended with each error code.
        rate_rps: requests a second offered in the judged window.
        prefix_queries_tokens, prefix_hits_tokens: of all engines, in the judged window.
        virtual_s, wall_s: how long it was and took; ``callbacks``, ``timers``: of the loop.
    """

    scheduling_policy: str
    routing_strategy: str
    fleet: str
    trace: str
    seed: int
    window_s: tuple[float, float]
    outcomes: Outcomes
    classes: list[SloClass]
    tenants: list[str]
    instance_names: list[str]
    price_per_hour_usd: float
    event_digest: str
    events: int
    codes: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    preemptions: int = 0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    callbacks: int = 0
    timers: int = 0
    probes: int = 0

    def judged(self) -> Iterator[int]:
        """Rows of the requests that arrived in the judged window."""
        begin_s, end_s = self.window_s
        arrivals, states = self.outcomes.arrival_s, self.outcomes.state
        for row in range(len(states)):
            if states[row] != UNSENT and begin_s <= arrivals[row] < end_s:
                yield row

    @property
    def window_length_s(self) -> float:
        return self.window_s[1] - self.window_s[0]

"""Taking back what was sent ahead, so that a more urgent request that came after it goes first: a pure rule.

Only requests of which their client has seen nothing can be taken back: the engine is told to drop them, and they are sent again, with
their old keys. What was sent since the engine's last first token, behind another, is taken back without loss: it still waits there, for
the next step at the earliest. The others are perhaps being computed; they are taken back only where that saves a deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from control_plane.job import Job
from control_plane.live_state import LiveState
from control_plane.types import ExecutionInstance

#: how often one request may be taken back, so that it gets its turn
MOST: Final = 3
#: urgent ones that are sent beside less urgent ones, and not in their place
BESIDE: Final = 8


class Ahead(Protocol):
    """A request that was sent to an engine and has shown no token yet."""

    @property
    def job(self) -> Job: ...
    @property
    def started_s(self) -> float: ...


class PullBack(NamedTuple):
    """Where the urgent one goes, and which are taken back for that."""

    instance: ExecutionInstance
    jobs: tuple[Job, ...]


def found(job: Job, places: Iterable[tuple[ExecutionInstance, Sequence[Ahead]]], now_s: float, there_s: float) -> PullBack | None:
    """Of instances without room and what is ahead on each, oldest first: where ``job``, the next of its lane, would start soonest.

    A request gives way to one of a more urgent class that the policy puts before it. Where those that are there are being computed, the
    urgent one is sent beside them, so that it is in the engine's next step; so it is to an engine that orders by priority itself. BESIDE
    as urgent ones may be there. None where it has to wait.

    Args:
        there_s: what requests of its lane wait at the engines beyond their own prefill.
    """
    late = job.latest_start_s < now_s + there_s  # it will miss its deadline behind those that are there
    best: PullBack | None = None
    least_ms = math.inf
    for instance, ahead in places:
        live: LiveState = instance
        back: tuple[Job, ...] = ()
        behind = sum(_is_behind(one.job, job) for one in ahead)
        beside = behind > 0 and len(ahead) - behind < BESIDE and live.active_requests < instance.concurrency_limit
        if live.priority_scheduling:
            if not beside:
                continue
            before_ms = sum(one.job.prefill_ms for one in ahead if one.job.request.priority <= job.request.priority)
        else:
            waiting = [one for place, one in enumerate(ahead) if late or (place and one.started_s >= live.began_s)]
            back = tuple(one.job for one in waiting if _gives_way(one.job, job, late))
            if not back and not beside:
                continue
            before_ms = live.ahead_ms - sum(one.prefill_ms for one in back)
        if before_ms < least_ms:
            best, least_ms = PullBack(instance, back), before_ms
    return best


def _is_behind(job: Job, urgent: Job) -> bool:
    return job.request.priority > urgent.request.priority and job.key > urgent.key


def _gives_way(job: Job, urgent: Job, late: bool) -> bool:
    return _is_behind(job, urgent) and job.pulled_back < MOST and (not late or job.latest_start_s > urgent.latest_start_s)

"""Which of the waiting can still start in time: the largest set that fits goes first, the rest after it (Moore and Hodgson, 1968).

The requests of a lane are served one after the other, in order, at a pace that is measured; so what stands before a request says when it
will start. Going through them in order, the work so far is added up. Where a request would start after its latest start, the largest so
far, by work over the worth of its class, is left out; what stays can all start in time. Without classes, and in order of latest end, no
larger set can: that is Moore's theorem. O(n log n).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Final

#: a class's worth relative to NORMAL, from CRITICAL to BACKGROUND: of two that are as long, the one of less worth is left out
CLASS_WORTH: Final = (16.0, 4.0, 1.0, 0.25, 0.0625)
#: memory of a lane's pace, and the shortest time that says something of it
PACE_MEMORY_S: Final = 5.0
LEAST_LOOK_S: Final = 0.2
#: weight of one first token in the mean wait at the engines
THERE_WEIGHT: Final = 0.1


class Pace:
    """How fast a lane is served while requests wait in it: predicted milliseconds of work that start in a second."""

    __slots__ = ("_begun_s", "_started_ms", "there_s", "work_ms_per_s")

    def __init__(self) -> None:
        #: 0.0: not known yet
        self.work_ms_per_s = 0.0
        #: mean time from leaving our queue to the first token beyond the request's own prefill: what it waits for at the engine
        self.there_s = 0.0
        self._begun_s = -math.inf
        self._started_ms = 0.0

    def begin(self, now_s: float) -> None:
        """Requests begin to wait, or to be looked at."""
        self._begun_s = now_s
        self._started_ms = 0.0

    def started(self, work_ms: float) -> None:
        self._started_ms += work_ms

    def began(self, there_s: float) -> None:
        """A first token came, so long after its request was sent, without its own prefill."""
        self.there_s += THERE_WEIGHT * (max(0.0, there_s) - self.there_s)

    def look(self, now_s: float) -> None:
        """Requests have waited all the time since the last look."""
        length_s = now_s - self._begun_s
        if length_s < LEAST_LOOK_S:
            return
        seen = self._started_ms / length_s
        known = self.work_ms_per_s
        self.work_ms_per_s = known + (seen - known) * (1.0 - math.exp(-length_s / PACE_MEMORY_S)) if known else seen
        self.begin(now_s)


def left_out(works_ms: Sequence[float], left_s: Sequence[float], worths: Sequence[float], pace_ms_per_s: float) -> list[int]:
    """Places of those that are left out, of requests in the order in which they would start.

    Args:
        works_ms: predicted work of each.
        left_s: seconds until its latest start; inf: it has none, and is never left out.
        pace_ms_per_s: work that starts in a second.
    """
    kept: list[tuple[float, int]] = []
    out: list[int] = []
    before_ms = 0.0
    for at, work_ms in enumerate(works_ms):
        latest_ms = left_s[at] * pace_ms_per_s
        if latest_ms == math.inf:
            before_ms += work_ms
            continue
        if latest_ms < 0.0:
            out.append(at)
            continue
        heapq.heappush(kept, (-work_ms / worths[at], at))
        # it starts when the work before it is done: taking out some of that, or itself, mends it
        taken: list[tuple[float, int]] = []
        while before_ms > latest_ms:
            taken.append(heapq.heappop(kept))
            longest = taken[-1][1]
            if longest == at:
                break
            before_ms -= works_ms[longest]
        if taken and taken[-1][1] == at:
            # worth more than it takes, or longer than all: those before it are in time without it
            for entry in taken[:-1]:
                heapq.heappush(kept, entry)
                before_ms += works_ms[entry[1]]
            out.append(at)
            continue
        out += [place for _, place in taken]
        before_ms += work_ms
    return out

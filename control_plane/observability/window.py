"""A sliding window over what ended: a ring of slots, each a fixed share of the window, the oldest dropped when time moves on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from control_plane.observability.sketch import Distribution

#: the durations kept, all in seconds
SERIES = ("latency", "ttft", "tpot", "queue_wait")
SLOTS = 12


class Slot:
    """What ended in one slot of time."""

    __slots__ = ("completed", "judged", "met", "output_tokens", "series")

    def __init__(self, *, quantiles: bool) -> None:
        self.completed = 0
        self.output_tokens = 0
        #: ended requests that asked for a target, and those of them that got all they asked for
        self.judged = 0
        self.met = 0
        self.series = tuple(Distribution(quantiles=quantiles) for _ in SERIES)

    def merge(self, other: Slot) -> None:
        self.completed += other.completed
        self.output_tokens += other.output_tokens
        self.judged += other.judged
        self.met += other.met
        for mine, theirs in zip(self.series, other.series, strict=True):
            mine.merge(theirs)


class Window:
    """The last ``window_s`` seconds, known to within one slot (a twelfth of it)."""

    def __init__(self, window_s: float, now_s: float, *, quantiles: bool = True) -> None:
        self._slot_s = window_s / SLOTS
        self._quantiles = quantiles
        self._slots: deque[Slot] = deque(maxlen=SLOTS)
        self._begin_s = now_s
        self.current = Slot(quantiles=quantiles)
        #: monotonic time from which on ``current`` may not be written to before :meth:`advance`
        self.current_ends_s = now_s + self._slot_s

    def begin(self, now_s: float) -> None:
        """The time covered begins now if there is nothing in it yet."""
        total = self.total()
        if not total.completed and not total.judged:
            self._slots.clear()
            self._begin_s = now_s
            self.current_ends_s = now_s + self._slot_s

    def advance(self, now_s: float) -> None:
        """Close slots until ``now_s`` lies in the current one."""
        behind = int((now_s - self.current_ends_s) / self._slot_s) + 1 if now_s >= self.current_ends_s else 0
        for _ in range(min(behind, SLOTS + 1)):
            self._slots.append(self.current)
            self.current = Slot(quantiles=self._quantiles)
        self.current_ends_s += behind * self._slot_s

    def span_s(self, now_s: float) -> float:
        """Seconds that :meth:`total` covers: the window, or the time since the beginning if that is less."""
        return max(0.0, min(now_s - self._begin_s, now_s - (self.current_ends_s - (len(self._slots) + 1) * self._slot_s)))

    def total(self) -> Slot:
        """All slots together, as a new one."""
        merged = Slot(quantiles=self._quantiles)
        for slot in (*self._slots, self.current):
            merged.merge(slot)
        return merged

    def add(self, series: int, values: Sequence[float]) -> None:
        """Fold durations (seconds) of ``SERIES[series]`` into the current slot."""
        self.current.series[series].add(values)

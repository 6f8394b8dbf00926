"""The sequences that wait in a modelled engine, in vLLM's two orders (v1/core/sched/request_queue.py, 0.32)."""

from __future__ import annotations

import heapq
import math
from collections import deque

from control_plane.engines.sequence import ModelSequence


class WaitingQueue:
    """First come first served, and who was thrown out goes first again; or the lowest ``priority``, among equals the first to come."""

    __slots__ = ("_heap", "_line", "by_priority", "count")

    def __init__(self, by_priority: bool) -> None:
        self.by_priority = by_priority
        self.count = 0
        self._line: deque[ModelSequence] = deque()
        self._heap: list[tuple[int, int, ModelSequence]] = []

    def push(self, sequence: ModelSequence, front: bool = False) -> None:
        self.count += 1
        if self.by_priority:
            heapq.heappush(self._heap, (sequence.priority, sequence.order, sequence))
        elif front:
            self._line.appendleft(sequence)
        else:
            self._line.append(sequence)

    def first(self) -> ModelSequence | None:
        if not self.count:
            return None
        return self._heap[0][2] if self.by_priority else self._line[0]

    def pop(self) -> None:
        """Take the first. (There is one.)"""
        self.count -= 1
        if self.by_priority:
            heapq.heappop(self._heap)
        else:
            self._line.popleft()

    def remove(self, sequence: ModelSequence) -> None:
        self.count -= 1
        if self.by_priority:
            self._heap.remove((sequence.priority, sequence.order, sequence))
            heapq.heapify(self._heap)
        else:
            self._line.remove(sequence)


class Fetches:
    """Those whose first blocks come from another engine: on the way in order of arrival, and there, ahead of the queue.

    They hold blocks and are not in the batch, so they cannot be thrown out (vLLM's ``kv_holding_waiting``).
    """

    __slots__ = ("_by_priority", "_coming", "_here")

    def __init__(self, by_priority: bool) -> None:
        self._by_priority = by_priority
        #: (when its blocks are there, order, sequence)
        self._coming: list[tuple[float, int, ModelSequence]] = []
        #: (priority or 0, order, sequence)
        self._here: list[tuple[int, int, ModelSequence]] = []

    @property
    def count(self) -> int:
        return len(self._coming) + len(self._here)

    @property
    def next_s(self) -> float:
        """When the next one's blocks are there; infinite where none are on the way."""
        return self._coming[0][0] if self._coming else math.inf

    def begin(self, sequence: ModelSequence, there_s: float) -> None:
        heapq.heappush(self._coming, (there_s, sequence.order, sequence))

    def take_arrived(self, now_s: float) -> ModelSequence | None:
        """One whose blocks are there by now; None: none is left."""
        if not self._coming or self._coming[0][0] > now_s:
            return None
        return heapq.heappop(self._coming)[2]

    def wait(self, sequence: ModelSequence) -> None:
        """Its blocks are there."""
        heapq.heappush(self._here, (sequence.priority if self._by_priority else 0, sequence.order, sequence))

    def first(self) -> ModelSequence | None:
        return self._here[0][2] if self._here else None

    def pop(self) -> None:
        """Take the first. (There is one.)"""
        heapq.heappop(self._here)

    def remove(self, sequence: ModelSequence) -> None:
        """One of those whose blocks are there."""
        self._here = [entry for entry in self._here if entry[2] is not sequence]
        heapq.heapify(self._here)

    def sequences(self) -> list[ModelSequence]:
        return [sequence for _, _, sequence in self._coming] + [sequence for _, _, sequence in self._here]

"""Coarse timers: one timer of the event loop for all of them, in buckets of equal time.

Made for limits, which nearly never run out: setting and cancelling are what must be cheap, and being late by a bucket is no matter.
A timer never fires early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush


class Timer:
    """One pending callback. ``deadline_s`` is in seconds of ``loop.time()``."""

    __slots__ = ("_bucket", "callback", "deadline_s")

    def __init__(self, deadline_s: float, callback: Callable[[], object], bucket: dict[Timer, None]) -> None:
        self.deadline_s = deadline_s
        self.callback = callback
        self._bucket = bucket

    def cancel(self) -> None:
        """Do not fire. May be called more than once, also after it fired."""
        self._bucket.pop(self, None)


class TimerWheel:
    """Timers of ``resolution_s``; each fires 0 to 2 resolutions after its deadline, in the order of their buckets.

    When the loop itself stood still for longer than ``stall_s`` (a stopped process), nothing fires at first: what has come in
    meanwhile is read before anybody is called late.
    """

    __slots__ = ("_buckets", "_handle", "_keys", "_last_key", "_loop", "_next_key", "_resolution_s", "_stall_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, resolution_s: float = 0.05, stall_s: float = 1.0) -> None:
        self._loop = loop
        self._resolution_s = resolution_s
        self._stall_s = stall_s
        self._buckets: dict[int, dict[Timer, None]] = {}
        self._keys: list[int] = []
        self._handle: asyncio.TimerHandle | None = None
        self._next_key = 0
        self._last_key = 0

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def now_s(self) -> float:
        """Seconds of the loop's clock, in which deadlines are given."""
        return self._loop.time()

    def add(self, deadline_s: float, callback: Callable[[], object]) -> Timer:
        """Call ``callback()`` once ``loop.time()`` has passed ``deadline_s``."""
        # a deadline already past goes to the next bucket, so that a callback cannot add to the one being fired
        key = max(int(deadline_s / self._resolution_s), self._last_key) + 1
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = {}
            heappush(self._keys, key)
            if self._handle is None or key < self._next_key:
                self._schedule()
        timer = Timer(deadline_s, callback, bucket)
        bucket[timer] = None
        return timer

    def close(self) -> None:
        """Forget all timers; none fires any more."""
        for bucket in self._buckets.values():
            bucket.clear()
        self._buckets.clear()
        self._keys.clear()
        self._schedule()

    def _schedule(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._keys:
            self._next_key = self._keys[0]
            self._handle = self._loop.call_at(self._next_key * self._resolution_s, self._tick)

    def _called(self) -> None:
        """The loop has called; what it called by is of no use any more."""
        self._handle = None

    def _tick(self) -> None:
        self._called()
        now_s = self._loop.time()
        if now_s - self._next_key * self._resolution_s > self._stall_s:
            self._handle = self._loop.call_later(self._resolution_s, self._fire)
        else:
            self._fire()

    def _fire(self) -> None:
        self._called()
        now_s = self._loop.time()
        # rounding may put a bucket's own time before it
        reached = self._next_key if now_s >= self._next_key * self._resolution_s else 0
        self._last_key = max(int(now_s / self._resolution_s), reached)
        try:
            while self._keys and self._keys[0] <= self._last_key:
                self._fire_bucket(self._keys[0])
        finally:
            if self._handle is None:
                self._schedule()

    def _fire_bucket(self, key: int) -> None:
        bucket = self._buckets[key]
        while bucket:
            timer = next(iter(bucket))
            del bucket[timer]
            try:
                timer.callback()
            except Exception as error:
                self._loop.call_exception_handler({"message": "a timer's callback failed", "exception": error})
        # close() may have been called by a callback
        if self._buckets.pop(key, None) is not None:
            heappop(self._keys)

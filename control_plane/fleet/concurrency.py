"""Learns how many requests an engine really runs at once, so that the rest waits in our queue and not in its own.

The rule, chosen so that it never lowers throughput:

- A cap is set only when the engine itself shows, in three scrapes in a row, requests that wait, more of them than the headroom,
  while its running batch has stopped growing. Then what is beyond that batch does nothing there: cap = the largest of the three
  batches + headroom (an eighth of it, at least 4), which keeps a few requests at hand for the places that come free between steps.
  A batch that still grows is an engine working through its prefills, not a full one.
- It is set only while we are the load (at least half of what the engine holds is ours); what others send is no reason to send less.
- When we are at the cap and nothing waits there beyond half the headroom, the cap grows by half.
- A restarted engine, or one that no longer tells, has no cap.

A number in ``max_concurrent_requests`` overrides what is learned here.
"""

from __future__ import annotations

import math

#: scrapes in a row that must show the same picture
EVIDENCE = 3


def headroom(running: int) -> int:
    """Requests to keep at the engine beyond its running batch."""
    return max(4, running // 8)


class ConcurrencyLearner:
    """One engine's cap, ``None`` until one shows."""

    __slots__ = ("_batches", "cap")

    def __init__(self) -> None:
        self.cap: int | None = None
        self._batches: list[int] = []

    def forget(self) -> None:
        self.cap = None
        self._batches.clear()

    def observe(self, running: int, waiting: int, ours: int) -> int | None:
        """One scrape: the engine's ``running`` and ``waiting`` requests, and ``ours`` in flight there. The cap from now on."""
        if waiting > headroom(running) and ours * 2 >= running + waiting:
            self._see_full(running)
        else:
            self._batches.clear()
            if self.cap is not None and ours >= self.cap and waiting <= headroom(running) // 2:
                self.cap = math.ceil(self.cap * 1.5)
        return self.cap

    def _see_full(self, running: int) -> None:
        batches = self._batches
        batches.append(running)
        if len(batches) < EVIDENCE:
            return
        del batches[:-EVIDENCE]
        # an empty batch with requests waiting is an engine that has not begun or cannot: no statement about its size
        if running > 0 and running <= max(batches[:-1]):
            self.cap = max(batches) + headroom(max(batches))

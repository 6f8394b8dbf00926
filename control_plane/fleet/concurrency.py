"""Learns how many requests an engine really runs at once, so that the rest waits in our queue and not in its own.

The rule, chosen so that it never lowers throughput:

- A cap is set only when the engine itself shows, in three scrapes in a row, requests that wait, more of them than the headroom, or that
  it throws requests out of its KV cache, while its running batch has stopped growing. Then what is beyond that batch does nothing there:
  cap = the largest of the three batches, less what of it is others', + headroom (an eighth of the batch, at least 4), which keeps a few
  requests at hand for the places that come free between steps. A batch that still grows is an engine working through its prefills, not a
  full one.
- It is set only while we are the load (at least half of what the engine holds is ours); what others send is no reason to send less.
- When we are at the cap, nothing waits there beyond half the headroom and nothing was thrown out, the cap grows by half; where the KV
  cache is nearly full, by the headroom only.
- A restarted engine, or one that no longer tells, has no cap.

A number in ``max_concurrent_requests`` overrides what is learned here.
"""

from __future__ import annotations

import math

#: scrapes in a row that must show the same picture
EVIDENCE = 3
#: share of the KV cache in use from which on it presses; at 1.0 nothing is left
KV_TIGHT = 0.9


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

    def observe(
        self, running: int, waiting: int, ours: int, *, others: int = 0, preempted: int = 0, kv_cache_usage: float = 0.0
    ) -> int | None:
        """One scrape. The cap from now on.

        Args:
            running, waiting: the engine's requests.
            ours, others: in flight there, ours and other clients'.
            preempted: thrown out of its KV cache since the last scrape.
            kv_cache_usage: share of that in use.
        """
        if (waiting > headroom(running) or preempted > 0) and ours * 2 >= running + waiting:
            self._see_full(running, others)
        else:
            self._batches.clear()
            if self.cap is not None and ours >= self.cap and waiting <= headroom(running) // 2:
                more = headroom(self.cap) if kv_cache_usage >= KV_TIGHT else self.cap / 2
                self.cap = math.ceil(self.cap + more)
        return self.cap

    def _see_full(self, running: int, others: int) -> None:
        batches = self._batches
        batches.append(running)
        if len(batches) < EVIDENCE:
            return
        del batches[:-EVIDENCE]
        # an empty batch with requests waiting is an engine that has not begun or cannot: no statement about its size
        if running > 0 and running <= max(batches[:-1]):
            self.cap = max(1, max(batches) - others + headroom(max(batches)))

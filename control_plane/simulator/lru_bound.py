"""How much of a stream one cache would find that holds as much as all engines of a fleet together: what placement could reach at best.

A yardstick rather than a bound: requests come one at a time, the blocks of one are there for the next at once, and what runs takes no room;
but the least recently used goes first, and a cache that knew the future would find more.
"""

from __future__ import annotations

from collections import OrderedDict

from control_plane.simulator.fleet_spec import FleetSpec
from control_plane.simulator.workload import Workload


class LruCache:
    """Contents in order of use, at most ``blocks`` of them. Of one prompt the last block is the first to go, as in vLLM."""

    def __init__(self, blocks: int) -> None:
        self._room = blocks
        self._used: OrderedDict[int, None] = OrderedDict()

    def match(self, ids: tuple[int, ...]) -> int:
        """How many of the leading ``ids`` are there."""
        used = self._used
        for count, block in enumerate(ids):
            if block not in used:
                return count
        return len(ids)

    def use(self, ids: tuple[int, ...]) -> None:
        """They have been read or written now."""
        used = self._used
        for block in reversed(ids):
            used[block] = None
            used.move_to_end(block)
        while len(used) > self._room:
            used.popitem(last=False)


def cache_tokens(fleet: FleetSpec) -> int:
    """Tokens that the KV caches of all engines hold."""
    return sum(part.count * part.profile.kv_block_count * part.profile.block_size_tokens for part in fleet.parts)


def lru_hit_rate(fleet: FleetSpec, workload: Workload, window_s: tuple[float, float]) -> float:
    """Share of the prompt tokens of the requests that arrive in the window which the cache holds, the requests before having filled it.

    As in an engine whole blocks count, a prompt's last token is never found, and an answer is kept as far as the workload knows its blocks.
    """
    begin_s, end_s = window_s
    size = workload.block_tokens
    cache = LruCache(cache_tokens(fleet) // size)
    asked = found = 0
    for request in workload.requests:
        if request.arrival_s >= end_s:
            break
        ids = request.block_ids
        if request.arrival_s >= begin_s:
            asked += request.prompt_tokens
            found += size * cache.match(ids[: max(0, request.prompt_tokens - 1) // size])
        cache.use(ids[: (request.prompt_tokens + request.output_tokens) // size])
    return found / asked if asked else 0.0

"""A consistent hash ring over instance ids, with bounded load.

Every instance has POINTS_PER_INSTANCE points on a circle of 64-bit hashes; a key belongs to the first point after its own hash. An
instance that joins takes its share of the keys from the others and one that leaves gives up its own; no other key moves (Karger et
al. 1997). Bounded load (Mirrokni et al. 2018): an owner that already has ``bound`` times the mean in flight is passed over, so a hot
key spills to the instances after it instead of queueing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import xxhash

from control_plane.live_state import LiveState
from control_plane.protocols import FleetView
from control_plane.router.placement import SAMPLE_ABOVE, SAMPLE_SIZE
from control_plane.types import ExecutionInstance

POINTS_PER_INSTANCE = 64
MAX_RINGS = 16


class HashRing:
    __slots__ = ("_hashes", "_owners", "ids")

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        points = sorted((xxhash.xxh3_64_intdigest(f"{name}#{n}".encode()), name) for name in self.ids for n in range(POINTS_PER_INSTANCE))
        self._hashes = [point for point, _ in points]
        self._owners = [name for _, name in points]

    def owners(self, key: bytes) -> Iterator[str]:
        """All instances in the order in which they stand after the key, each once."""
        owners, n = self._owners, len(self._owners)
        start = bisect_left(self._hashes, xxhash.xxh3_64_intdigest(key))
        seen: set[str] = set()
        for k in range(start, start + n):
            owner = owners[k if k < n else k - n]
            if owner not in seen:
                seen.add(owner)
                yield owner


class RingCache:
    """The rings of the fleets seen lately: one is built when the set of instances changes, not per request."""

    __slots__ = ("_last", "_rings")

    def __init__(self) -> None:
        self._rings: dict[tuple[str, ...], HashRing] = {}
        self._last = HashRing(())

    def of(self, instances: Sequence[ExecutionInstance]) -> HashRing:
        if self._is_last(instances):
            return self._last
        ids = tuple([i.instance_id for i in instances])
        ring = self._rings.pop(ids, None)
        if ring is None:
            ring = HashRing(ids)
            if len(self._rings) >= MAX_RINGS:
                del self._rings[next(iter(self._rings))]
        self._rings[ids] = self._last = ring
        return ring

    def _is_last(self, instances: Sequence[ExecutionInstance]) -> bool:
        known = self._last.ids
        if len(known) != len(instances):
            return False
        for at, instance in enumerate(instances):
            live: LiveState = instance
            if live.instance_id is not known[at] and live.instance_id != known[at]:
                return False
        return True


def owner_within_bound(
    ring: HashRing, key: bytes, candidates: Sequence[ExecutionInstance], view: FleetView, bound: float
) -> tuple[ExecutionInstance, int]:
    """The first candidate after the key that is not over its bound, and how many candidates were passed over for that."""
    n = len(candidates)
    measured = candidates if n <= SAMPLE_ABOVE else candidates[:: n // SAMPLE_SIZE]
    most = math.ceil(bound * (sum([i.active_requests for i in measured]) / len(measured) + 1.0 / n))
    passed = 0
    first: ExecutionInstance | None = None
    for owner in ring.owners(key):
        instance = view.get(owner)
        if instance is None or instance not in candidates:
            continue
        if instance.active_requests < most:
            return instance, passed
        first = first if first is not None else instance
        passed += 1
    # every candidate is at the bound (the mean was of a sample), or none is on the ring (the view does not know it)
    return (first, passed) if first is not None else (candidates[0], passed)

"""Routing rules of other projects, after their published descriptions, to compare ours with: ``rival:NAME``.

Only who asks for one loads them. They see what ours see (the prefix index, what is in flight first hand, the predictor), which is more
than some of them have at home; what each takes from where is in its file. ``affinity`` and ``locality`` of the table are consistent
hashing with bounded load, ``round_robin``, ``random`` and ``power_of_two`` the usual baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from control_plane.router.base import RoutingStrategy
from control_plane.router.rivals.cache_aware import CacheAware
from control_plane.router.rivals.dynamo import DynamoCost, DynamoSoftmax
from control_plane.router.rivals.least_requests import LeastRequests
from control_plane.router.rivals.lmetric import LMetric
from control_plane.router.rivals.preble import PrebleE2
from control_plane.router.rivals.sticky import StickyUntilSaturated
from control_plane.router.rivals.weighted import WeightedScorers

#: by what stands after ``rival:``
RIVALS: dict[str, Callable[[Random], RoutingStrategy]] = {
    "least_requests": LeastRequests,
    "lmetric": lambda rng: LMetric(),
    "sticky": lambda rng: StickyUntilSaturated(),
    "weighted": WeightedScorers,
    "dynamo": DynamoCost,
    "dynamo_softmax": DynamoSoftmax,
    "preble": lambda rng: PrebleE2(),
    "cache_aware": lambda rng: CacheAware(),
}

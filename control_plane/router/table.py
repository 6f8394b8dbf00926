"""The table of routing strategies, and making one by name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from control_plane.loading import load_object, unknown_name
from control_plane.router.adaptive import AdaptiveRouting
from control_plane.router.affinity import Affinity
from control_plane.router.base import RoutingStrategy
from control_plane.router.foreign import ForeignStrategy
from control_plane.router.least_response_time import LeastResponseTime
from control_plane.router.load_balanced import LoadBalanced
from control_plane.router.locality import Locality
from control_plane.router.power_of_two import PowerOfTwo
from control_plane.router.predicted_latency import PredictedLatency
from control_plane.router.prefix_aware import PrefixAware
from control_plane.router.random_choice import RandomChoice
from control_plane.router.round_robin import RoundRobin

#: each makes a strategy with the randomness it is handed
ROUTERS: dict[str, Callable[[Random], RoutingStrategy]] = {
    LoadBalanced.name: LoadBalanced,
    RoundRobin.name: lambda rng: RoundRobin(),
    RandomChoice.name: RandomChoice,
    PowerOfTwo.name: PowerOfTwo,
    LeastResponseTime.name: LeastResponseTime,
    Affinity.name: lambda rng: Affinity(),
    Locality.name: lambda rng: Locality(),
    PrefixAware.name: PrefixAware,
    PredictedLatency.name: PredictedLatency,
    AdaptiveRouting.name: AdaptiveRouting,
}
#: how the rules of other projects are called, which are there to compare with
RIVAL = "rival:"


def create_strategy(strategy: object, rng: Random | None = None) -> RoutingStrategy:
    """A strategy from its name in the table, ``rival:NAME``, ``module:Class``, a class, or an object (a subclass of ours is returned as
    it is, another is wrapped). ``rng`` None: seeded with 0. Raises InvalidRequest (``param="routing_strategy"``) that names the nearest
    name."""
    made = strategy
    if isinstance(strategy, str):
        known = ROUTERS.get(strategy)
        if known is not None:
            return known(rng if rng is not None else Random(0))
        if strategy.startswith(RIVAL):
            return _rival(strategy, rng if rng is not None else Random(0))
        if ":" not in strategy:
            raise unknown_name(strategy, ROUTERS, "routing_strategy")
        made = load_object(strategy, "routing_strategy")
    elif isinstance(strategy, type):
        made = strategy()
    return made if isinstance(made, RoutingStrategy) else ForeignStrategy(made)


def _rival(name: str, rng: Random) -> RoutingStrategy:
    from control_plane.router.rivals import RIVALS  # loaded by who asks for one

    known = RIVALS.get(name.removeprefix(RIVAL))
    if known is None:
        raise unknown_name(name, [RIVAL + rival for rival in RIVALS], "routing_strategy")
    return known(rng)

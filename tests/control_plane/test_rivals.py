"""The rules of other projects, on cases worked out by hand. Instances are a, b, c; numbers are those of RoundNumbers."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from routing_world import World, asking

from control_plane.errors import InvalidRequest
from control_plane.router import ROUTERS, create_strategy
from control_plane.router.base import RoutingStrategy
from control_plane.router.rivals import RIVALS
from control_plane.router.rivals.cache_aware import CacheAware
from control_plane.router.rivals.dynamo import DynamoCost
from control_plane.router.rivals.least_requests import LeastRequests
from control_plane.router.rivals.lmetric import LMetric
from control_plane.router.rivals.preble import WINDOW_S, PrebleE2
from control_plane.router.rivals.sticky import StickyUntilSaturated
from control_plane.router.rivals.weighted import WeightedScorers


def choice(strategy: RoutingStrategy, world: World, tokens: int = 1000) -> str:
    return strategy.place(asking(tokens), world.instances, world.view).instance.instance_id


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_each_is_made_by_its_name_and_stands_apart_from_ours(name: str) -> None:
    made = create_strategy(f"rival:{name}", Random(0))

    assert made.name == f"rival:{name}"
    assert f"rival:{name}" not in ROUTERS
    placed = made.place(asking(100), (world := World(1, 2)).instances, world.view)
    assert dict(placed.candidates)[placed.instance.instance_id] == placed.predicted_ms
    assert placed.reason


def test_a_rival_that_is_none_names_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'rival:lmetric'"):
        create_strategy("rival:lmetrics")


def test_least_requests_draws_among_the_fewest() -> None:
    world = World(3, 1, 1)
    strategy = LeastRequests(Random(0))
    drawn = Counter(choice(strategy, world) for _ in range(200))

    assert set(drawn) == {"b", "c"}
    assert min(drawn.values()) > 60


def test_lmetric_multiplies_tokens_by_batch() -> None:
    # a: (1000 - 800) x (9 + 1) = 2000; b: 1000 x (1 + 1) = 2000, a tie that goes to the smaller batch; c: 1000 x 3
    assert choice(LMetric(), World(9, 1, 2, cached={"a": 800})) == "b"
    assert choice(LMetric(), World(8, 1, 2, cached={"a": 800})) == "a", "200 x 9 = 1800 is less"


def test_lmetric_counts_what_is_queued_there() -> None:
    world = World(8, 1, cached={"a": 800})
    world.queued("a", 100)  # (100 + 200) x 9 = 2700 against 2000

    assert choice(LMetric(), world) == "b"


def test_sticky_stays_until_the_wait_is_too_long() -> None:
    world = World(0, 0, 0, cached={"a": 900, "b": 700})
    strategy = StickyUntilSaturated(max_extra_ms=1000.0)
    assert choice(strategy, world) == "a", "only a holds 80 %: 100 tokens to prefill"

    world.queued("a", 1200)  # 1,300 ms there, 300 ms on b: 1,000 more are allowed
    assert choice(strategy, world) == "a"

    world.queued("a", 1)
    assert choice(strategy, world) == "b", "saturated: all compete, b has the fewest to prefill"


def test_sticky_without_a_holder_takes_the_least_to_prefill() -> None:
    world = World(0, 0, 0, cached={"b": 790})
    world.queued("b", 800)  # 210 + 800 = 1,010 against 1,000 on a and c
    world.queued("a", 1)

    assert choice(StickyUntilSaturated(), world) == "c"


def test_sticky_refuses_a_negative_allowance() -> None:
    with pytest.raises(InvalidRequest, match="max_extra_ms"):
        StickyUntilSaturated(-1.0)


def test_weighted_sums_three_scores() -> None:
    world = World(0, 0, cached={"a": 500})
    world.queued("a", 10)  # a: 3 x 0.5 + 2 x 0 + 2 x 1 = 3.5; b: 0 + 2 x 1 + 2 x 1 = 4
    assert choice(WeightedScorers(), world) == "b"

    world.prefixes.cached["a"] = 700  # 3 x 0.7 + 2 = 4.1
    assert choice(WeightedScorers(), world) == "a"

    world.instances[0].engine.kv_cache_usage = 0.1  # 2.1 + 2 x 0.9 = 3.9
    assert choice(WeightedScorers(), world) == "b"


def test_dynamo_adds_blocks_to_prefill_and_blocks_that_decode() -> None:
    world = World(0, 0, cached={"a": 960})
    world.decoding("a", 1600)
    # in blocks of 16: a: ceil(40 / 16) + ceil(2600 / 16) = 3 + 163; b: 63 + 63
    assert DynamoCost().costs(asking(1000), world.instances, world.view) == [166.0, 126.0]
    assert choice(DynamoCost(), world) == "b"
    # a prefill scale of 2: 6 + 163 = 169 against 126 + 63 = 189
    assert choice(DynamoCost(prefill_scale=2.0), world) == "a"


def test_dynamo_draws_by_softmax_over_normalised_costs() -> None:
    world = World(0, 0)
    world.decoding("a", 1600)  # costs normalised: a 1, b 0; at temperature 1 b is drawn with 1 / (1 + 1/e) = 0.731
    strategy = DynamoCost(Random(5), temperature=1.0)
    drawn = Counter(choice(strategy, world) for _ in range(2000))

    assert 0.70 < drawn["b"] / 2000 < 0.76


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"prefill_scale": float("inf")}])
def test_dynamo_refuses_what_is_no_weight(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        DynamoCost(**wrong)


def test_preble_exploits_when_more_is_cached_than_not() -> None:
    world = World(0, 0, cached={"a": 501})
    strategy = PrebleE2()
    assert choice(strategy, world) == "a"
    world.prefixes.cached["a"] = 500  # not more than the rest: explores, and b has had nothing yet
    assert choice(strategy, world) == "b"


def test_preble_explores_by_load_eviction_and_prefill() -> None:
    world = World(0, 0, cached={"a": 300}, lost_share={"a": 0.5})
    # a: prefill 10 + 700, eviction 0.5 x (700 + 100) tokens at 1 ms = 400: 1,110; b: 10 + 1000 = 1,010
    assert choice(PrebleE2(), world) == "b"
    world.prefixes.lost_share["a"] = 0.25  # 710 + 200 = 910
    assert choice(PrebleE2(), world) == "a"


def test_preble_hands_on_what_a_holder_with_twice_the_load_would_get() -> None:
    world = World(0, 0, cached={"a": 900})
    strategy = PrebleE2()
    # each on a adds 10 + 100 + 100 x 21 = 2,210 ms; b has none, so nothing is compared with it
    assert [choice(strategy, world) for _ in range(3)] == ["a", "a", "a"]
    world.prefixes.cached.clear()
    assert choice(strategy, world) == "b", "explores: 1,010 + 0 there; it adds 10 + 1000 + 2,100 = 3,110 ms"
    world.prefixes.cached["a"] = 900
    assert choice(strategy, world) == "b", "6,630 ms on a is over twice 3,110"
    assert choice(strategy, world) == "a", "6,630 is not over twice 6,220"


def test_preble_forgets_load_that_is_older_than_its_window() -> None:
    world = World(0, 0, cached={"a": 900})
    strategy = PrebleE2()
    choice(strategy, world)
    world.prefixes.cached.clear()
    world.view.now_s = WINDOW_S + 1.0

    assert choice(strategy, world) == "a", "both have no load, and a comes first"


def test_cache_aware_follows_the_longest_match_over_its_threshold() -> None:
    world = World(60, 0, cached={"a": 301, "b": 100})
    assert choice(CacheAware(), world) == "a"
    world.prefixes.cached["a"] = 300
    strategy = CacheAware()
    # no match over 0.3: the smallest tree, which is a's at first (700 tokens then), then b's
    assert [choice(strategy, world) for _ in range(2)] == ["a", "b"]


def test_cache_aware_balances_when_loads_are_uneven() -> None:
    assert choice(CacheAware(), World(65, 0, cached={"a": 1000})) == "b"
    assert choice(CacheAware(), World(64, 0, cached={"a": 1000})) == "a", "64 over the idlest are not more than 64"
    assert choice(CacheAware(), World(200, 135, cached={"a": 1000})) == "a", "65 more, but not 1.5 times as many"

"""Routing strategies: each one's rule. What holds for all of them stands in conformance/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.errors import ConfigurationError, InvalidRequest, ModelNotFound, NoInstanceAvailable
from control_plane.prediction import LatencyPredictor
from control_plane.router import (
    Affinity,
    LeastResponseTime,
    LoadBalanced,
    LoadBalancer,
    Locality,
    Placement,
    PowerOfTwo,
    RequestRouter,
    RoundRobin,
    RoutingStrategy,
    create_strategy,
)
from control_plane.router.placement import MAX_RECORDED, SAMPLE_SIZE
from control_plane.router.ring import HashRing, RingCache
from control_plane.types import ExecutionInstance, RequestMetadata
from control_plane.view import NoPrefixes, StaticView


def fleet(n: int, **fields) -> list[ExecutionInstance]:
    return [ExecutionInstance(f"i{k}", model_name="m", **fields) for k in range(n)]


def ask(**fields) -> RequestMetadata:
    return RequestMetadata(**{"request_id": "r", "prompt": "hello", "model_name": "m", **fields})


def spread(strategy: RoutingStrategy, instances: list[ExecutionInstance], requests: list[RequestMetadata], *, occupy: bool) -> Counter[str]:
    """Place all; with ``occupy`` each stays in flight where it went."""
    view, counts = StaticView(instances), Counter[str]()
    for request in requests:
        chosen = strategy.place(request, instances, view).instance
        counts[chosen.instance_id] += 1
        if occupy:
            chosen.active_requests += 1
            chosen.outstanding_ms += view.predictor.service_ms(request, chosen)
    return counts


# -- load_balanced ---------------------------------------------------------------------------------------------------------------


def test_load_balanced_spreads_an_idle_fleet() -> None:
    assert spread(LoadBalanced(), fleet(4), [ask()] * 8, occupy=False) == {"i0": 2, "i1": 2, "i2": 2, "i3": 2}


def test_load_balanced_weighs_by_speed() -> None:
    slow = ExecutionInstance("slow", model_name="llama3-70b", tensor_parallel_size=2)
    fast = ExecutionInstance("fast", model_name="llama3-70b", tensor_parallel_size=8)
    counts = spread(LoadBalanced(), [slow, fast], [ask(model_name="llama3-70b")] * 200, occupy=True)

    assert 1.5 < counts["fast"] / counts["slow"] < 8.0


def test_load_balanced_counts_work_not_requests() -> None:
    few_long, many_short = fleet(2)
    few_long.active_requests, few_long.outstanding_ms = 2, 60_000.0
    many_short.active_requests, many_short.outstanding_ms = 8, 4_000.0

    assert LoadBalanced().place(ask(), [few_long, many_short], StaticView([])).instance is many_short


@pytest.mark.parametrize("busy", [{"active_requests": 5}, {"current_load": 0.9}])
def test_load_balanced_believes_what_an_owner_set(busy: dict[str, float]) -> None:
    loaded, free = ExecutionInstance("loaded", model_name="m", **busy), ExecutionInstance("free", model_name="m")

    assert all(LoadBalanced().place(ask(), pair, StaticView([])).instance is free for pair in ([loaded, free], [free, loaded]))


def test_data_parallel_ranks_share_the_work() -> None:
    one, two = ExecutionInstance("one", model_name="m"), ExecutionInstance("two", model_name="m", data_parallel_size=2)
    counts = spread(LoadBalanced(), [one, two], [ask()] * 300, occupy=True)

    assert 1.6 < counts["two"] / counts["one"] < 2.6


# -- the simple ones -------------------------------------------------------------------------------------------------------------


def test_round_robin_takes_turns_per_model() -> None:
    strategy, instances = RoundRobin(), fleet(3)
    view = StaticView(instances)
    places = [strategy.place(ask(model_name=m), instances, view).instance.instance_id for m in ("a", "b", "a", "b", "a", "a")]

    assert places == ["i0", "i0", "i1", "i1", "i2", "i0"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=40))
def test_round_robin_is_fair_when_candidates_change(given_sets: list[set[int]]) -> None:
    strategy, instances = RoundRobin(), fleet(6)
    view, last = StaticView(instances), dict.fromkeys(range(6), 0)
    for turn, present in enumerate(given_sets, 1):
        chosen = strategy.place(ask(), [instances[k] for k in sorted(present)], view).instance
        k = instances.index(chosen)
        assert last[k] == min(last[other] for other in present), "the one that was chosen longest ago"
        last[k] = turn


def test_round_robin_over_a_large_fleet_comes_round() -> None:
    counts = spread(RoundRobin(), fleet(200), [ask()] * 400, occupy=False)

    assert set(counts.values()) == {2}


def test_power_of_two_takes_the_lighter_of_two() -> None:
    instances = fleet(2)
    instances[0].active_requests = 3
    strategy, view = PowerOfTwo(Random(1)), StaticView(instances)

    assert all(strategy.place(ask(), instances, view).instance is instances[1] for _ in range(20))
    assert strategy.place(ask(), instances[:1], view).instance is instances[0]
    counts = spread(PowerOfTwo(Random(1)), fleet(10), [ask()] * 500, occupy=True)
    assert max(counts.values()) - min(counts.values()) <= 10


def test_least_response_time_is_latency_times_what_is_in_flight() -> None:
    quick, slow, fresh = fleet(3)
    quick.avg_latency_ms, quick.active_requests = 100.0, 3
    slow.avg_latency_ms, slow.active_requests = 390.0, 0
    strategy = LeastResponseTime()

    assert strategy.place(ask(), [quick, slow], StaticView([])).instance is slow
    quick.active_requests = 2
    assert strategy.place(ask(), [quick, slow], StaticView([])).instance is quick
    placed = strategy.place(ask(), [fresh], StaticView([]))
    assert placed.predicted_ms > 0.0, "one without an average counts with its prediction, not as free"


# -- rings -----------------------------------------------------------------------------------------------------------------------


def homes(ids: list[str], keys: list[bytes]) -> list[str]:
    ring = HashRing(ids)
    return [next(ring.owners(key)) for key in keys]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000))
def test_an_instance_added_or_lost_moves_only_its_share(n: int, salt: int) -> None:
    ids, keys = [f"{salt}-{k}" for k in range(n)], [b"%d" % k for k in range(600)]
    before, after = homes(ids, keys), homes([*ids, "new"], keys)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]

    assert set(moved) <= {"new"}, "a key moves only to the instance that joined (read backwards: only from the one that left)"
    assert len(moved) / len(keys) < 3.0 / (n + 1)


def test_a_ring_gives_every_instance_a_fair_part() -> None:
    counts = Counter(homes([f"i{k}" for k in range(8)], [b"%d" % k for k in range(8000)]))

    assert len(counts) >= 7
    assert max(counts.values()) < 1.6 * 1000


def test_the_order_after_a_key_names_each_instance_once() -> None:
    ids = [f"i{k}" for k in range(5)]

    assert sorted(HashRing(ids).owners(b"key")) == ids
    assert list(HashRing([]).owners(b"key")) == []


def test_rings_are_kept_and_bounded() -> None:
    cache, instances = RingCache(), fleet(3)
    first = cache.of(instances)

    assert cache.of(list(instances)) is first
    assert cache.of(instances[:2]) is not first
    assert cache.of(instances) is first
    for k in range(100):
        cache.of([ExecutionInstance(f"x{k}")])
    assert len(cache._rings) <= 16


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"session_id": "s", "user_id": "u"}, {"session_id": "s", "user_id": "v"}, True),
        ({"user_id": "u", "prompt": "a"}, {"user_id": "u", "prompt": "b"}, True),
        ({"tenant_id": "t", "prompt": "a"}, {"tenant_id": "t", "prompt": "b"}, True),
        ({"prompt": "same beginning"}, {"prompt": "same beginning"}, True),
        ({"session_id": "x"}, {"user_id": "x"}, False),
    ],
)
def test_affinity_keys(one: dict[str, str], other: dict[str, str], same: bool) -> None:
    strategy = Affinity()

    assert (strategy._key(ask(**one)) == strategy._key(ask(**other))) is same


def test_affinity_keeps_a_user_and_spreads_users() -> None:
    strategy, instances = Affinity(), fleet(8)
    view = StaticView(instances)
    users = [ask(user_id=f"u{k}") for k in range(200)]
    first = [strategy.place(user, instances, view).instance for user in users]

    assert [strategy.place(user, instances, view).instance for user in users] == first
    assert len(set(map(id, first))) == 8


def test_a_home_that_is_full_for_a_moment_keeps_its_keys() -> None:
    strategy, instances = Affinity(), fleet(4)
    view = StaticView(instances)
    users = [ask(user_id=f"u{k}") for k in range(100)]
    first = [strategy.place(user, instances, view).instance for user in users]
    without = [strategy.place(user, instances[1:], view).instance for user in users]

    assert all(now is then for now, then in zip(without, first, strict=True) if then is not instances[0])
    assert [strategy.place(user, instances, view).instance for user in users] == first


def test_a_hot_key_spills_over_at_the_load_bound() -> None:
    counts = spread(Affinity(load_bound=1.25), fleet(8), [ask(session_id="hot")] * 400, occupy=True)

    assert max(counts.values()) <= 1.25 * 400 / 8 + 1
    assert len(counts) >= 7


def test_locality_goes_by_the_prompts_beginning() -> None:
    strategy, instances = Locality(head_bytes=16), fleet(8)
    view = StaticView(instances)

    def place(text: str, user: str) -> ExecutionInstance:
        return strategy.place(ask(prompt=text, user_id=user), instances, view).instance

    assert len({id(place("You are a helpful" + str(n), str(n))) for n in range(20)}) == 1
    assert len({id(place(f"{n} begins anew", "u")) for n in range(50)}) > 3


@pytest.mark.parametrize(
    "make", [lambda: Affinity(load_bound=1.0), lambda: Affinity(load_bound=float("nan")), lambda: Locality(head_bytes=0)]
)
def test_wrong_options_are_refused(make) -> None:
    with pytest.raises(InvalidRequest):
        make()


# -- large fleets ----------------------------------------------------------------------------------------------------------------


class Holders(NoPrefixes):
    """A prefix index that can tell who holds a request's prefix."""

    def __init__(self, held_by: list[ExecutionInstance]) -> None:
        self.held_by = held_by

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        return 100 if instance in self.held_by else 0

    def cached_tokens_of(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
        return [self.cached_tokens(request, instance) for instance in instances]

    def holders(self, request: RequestMetadata, limit: int) -> list[ExecutionInstance]:
        return self.held_by[:limit]


def test_above_the_bound_it_samples_and_says_so() -> None:
    instances = fleet(300, active_requests=1)
    placed = LoadBalanced(Random(2)).place(ask(), instances, StaticView(instances))

    assert f"sampled {SAMPLE_SIZE} of 300" in placed.reason
    assert len(placed.candidates) == MAX_RECORDED


def test_holders_of_the_prefix_are_always_looked_at() -> None:
    instances = fleet(300, active_requests=5)
    holder = instances[217]
    holder.active_requests = 0
    strategy = LoadBalanced(Random(2))
    view = StaticView(instances, prefixes=Holders([holder, ExecutionInstance("not a candidate")]))

    assert all(strategy.place(ask(), instances, view).instance is holder for _ in range(5))


def test_sampling_still_balances() -> None:
    counts = spread(LoadBalanced(Random(3)), fleet(100), [ask()] * 1000, occupy=True)

    assert max(counts.values()) <= 14


# -- the seed's faces ------------------------------------------------------------------------------------------------------------


async def test_select_instance_looks_at_health_room_model_and_phase() -> None:
    router = RequestRouter()
    sick = ExecutionInstance("sick", model_name="m", is_healthy=False)
    full = ExecutionInstance("full", model_name="m", max_concurrent_requests=1, active_requests=1)
    prefill, decode = (
        ExecutionInstance("p", model_name="m", instance_type="prefilling"),
        ExecutionInstance("d", model_name="m", instance_type="decoding"),
    )
    fleet_ = [sick, full, prefill, decode]

    assert router.strategy == router.name == "load_balanced"
    assert (await router.select_instance(ask(), fleet_, phase="prefilling")) is prefill
    assert (await router.select_instance(ask(), fleet_, phase=decode.instance_type)) is decode
    assert (await router.select_instance(ask(), fleet_)) in (prefill, decode)
    with pytest.raises(NoInstanceAvailable):
        await router.select_instance(ask(), [])
    with pytest.raises(NoInstanceAvailable):
        await router.select_instance(ask(), [sick])
    with pytest.raises(ModelNotFound):
        await router.select_instance(ask(model_name="z"), fleet_)


async def test_a_manager_hands_in_its_view() -> None:
    asked = []
    instances = fleet(2)

    def view_of(given):
        asked.append(given)
        return StaticView(instances)

    await RequestRouter("affinity", view_factory=view_of).select_instance(ask(), instances)
    assert asked == [instances]


def test_load_balancer() -> None:
    balancer = LoadBalancer(Random(1))
    a = ExecutionInstance("a", current_load=0.2, active_requests=9, avg_latency_ms=10)
    b = ExecutionInstance("b", current_load=0.2, active_requests=8, avg_latency_ms=100)
    c = ExecutionInstance("c", current_load=0.5, active_requests=1, avg_latency_ms=500)
    gone = ExecutionInstance("gone", is_available=False)

    assert balancer.get_least_loaded_instance([a, b, c, gone]) is b
    assert balancer.least_connections([a, b, c, gone]) is c
    assert balancer.least_response_time([a, b, c, gone]) is a
    assert balancer.power_of_two([a, c]) is c
    assert balancer.get_least_loaded_instance([gone]) is gone
    for method in (balancer.get_least_loaded_instance, balancer.weighted_round_robin, balancer.power_of_two):
        with pytest.raises(NoInstanceAvailable):
            method([])


def test_weighted_round_robin_is_in_proportion_and_even() -> None:
    balancer = LoadBalancer()
    one, three = ExecutionInstance("one"), ExecutionInstance("three", gpu_count=3)
    heavy = ExecutionInstance("heavy", metadata={"weight": 4})
    turns = [balancer.weighted_round_robin([one, three, heavy]).instance_id for _ in range(80)]

    assert Counter(turns) == {"one": 10, "three": 30, "heavy": 40}
    assert max(len(list(run)) for run in _runs(turns)) <= 2


def _runs(items: list[str]) -> list[list[str]]:
    runs: list[list[str]] = [[items[0]]]
    for item in items[1:]:
        runs[-1].append(item) if item == runs[-1][-1] else runs.append([item])
    return runs


# -- routers of the user's own ---------------------------------------------------------------------------------------------------


class Last:
    """Answers with an instance, an id, or a Placement."""

    name = "last"

    def __init__(self, answer: str = "instance") -> None:
        self.answer = answer

    def place(self, request, candidates, view):
        chosen = candidates[-1]
        return {"instance": chosen, "id": chosen.instance_id, "placement": Placement(chosen, 1.0, (), "mine"), "wrong": "nowhere"}[
            self.answer
        ]


class OnlyAsync:
    async def select_instance(self, request, available_instances):
        return available_instances[-1]


class AsyncWithPhase:
    def __init__(self) -> None:
        self.phases: list[str | None] = []

    async def select_instance(self, request, available_instances, phase=None):
        self.phases.append(phase)
        return available_instances[0]


class OwnSubclass(RoutingStrategy):
    async def select_instance(self, request, available_instances, phase=None):
        return available_instances[1]


class OwnRequestRouter(RequestRouter):
    async def select_instance(self, request, available_instances, phase=None):
        return available_instances[1]


@pytest.mark.parametrize("answer", ["instance", "id", "placement"])
def test_an_object_that_places(answer: str) -> None:
    strategy, instances = create_strategy(Last(answer)), fleet(3)
    placed = strategy.place(ask(), instances, StaticView(instances))

    assert placed.instance is instances[-1]
    assert strategy.name == "last"
    assert not strategy.selects_async


def test_an_answer_outside_the_candidates_is_an_error_that_names_it() -> None:
    instances = fleet(2)
    with pytest.raises(ConfigurationError, match="'nowhere'"):
        create_strategy(Last("wrong")).place(ask(), instances, StaticView(instances))


@pytest.mark.parametrize(("router", "expected"), [(OnlyAsync(), 2), (AsyncWithPhase(), 0), (OwnSubclass(), 1), (OwnRequestRouter(), 1)])
async def test_one_that_only_selects(router: object, expected: int) -> None:
    strategy, instances = create_strategy(router), fleet(3)

    assert strategy.selects_async
    assert (await strategy.select_instance(ask(), instances)) is instances[expected]
    assert (await RequestRouter(router).select_instance(ask(), instances)) is instances[expected]


async def test_the_phase_reaches_a_selector_that_takes_it() -> None:
    router, prefill = AsyncWithPhase(), ExecutionInstance("p", instance_type="prefilling")
    await RequestRouter(router).select_instance(ask(), [prefill, *fleet(2)], phase="prefilling")

    assert router.phases == ["prefilling"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("load_balance", "did you mean 'load_balanced'"),
        ("no.such.module:Router", "cannot be imported"),
        ("control_plane.router:NoSuch", "has no 'NoSuch'"),
        (object(), "no routing strategy"),
    ],
)
def test_what_is_no_router_is_named(given: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        create_strategy(given)

    assert refused.value.param == "routing_strategy"


def test_routers_by_path_class_and_object() -> None:
    made = Affinity()

    assert isinstance(create_strategy("control_plane.router:Locality"), Locality)
    assert isinstance(create_strategy(RoundRobin), RoundRobin)
    assert create_strategy(made) is made


def test_a_predictor_that_answers_one_at_a_time_will_do() -> None:
    class OneAtATime:
        def __init__(self) -> None:
            self._own = LatencyPredictor()

        def service_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
            return self._own.service_ms(request, instance)

    instances = fleet(3)
    instances[0].active_requests = instances[1].active_requests = 4
    view = StaticView(instances, predictor=OneAtATime())  # type: ignore[arg-type]

    placed = LoadBalanced().place(ask(), instances, view)
    assert placed.instance is instances[2]
    others = LoadBalanced().place(ask(), instances, StaticView(instances)).candidates
    assert [each.instance_id for each in placed.candidates] == [each.instance_id for each in others]

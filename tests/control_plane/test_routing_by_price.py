"""What a placement costs, by part, and what the routers that go by it do. Numbers are those of RoundNumbers."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing_world import RoundNumbers, ToldPrefixes, World, asking

from control_plane.clock import ManualClock
from control_plane.policies import decide
from control_plane.prediction import LatencyPredictor
from control_plane.router import AdaptiveRouting, PredictedLatency, PrefixAware, create_strategy
from control_plane.router.adaptive import LEAST_COMPARED, LOOK_EVERY
from control_plane.router.placement import MAX_HOLDERS, SAMPLE_SIZE
from control_plane.router.pricing import PARTS, batches_of, priced
from control_plane.types import ExecutionInstance
from control_plane.view import StaticView

BOTH = pytest.mark.parametrize("name", ["prefix_aware", "predicted_latency"])


def test_a_price_has_five_parts() -> None:
    world = World(0, 4, cached={"b": 900}, lost_share={"b": 0.5})
    world.queued("b", 300)
    prices = priced(asking(1000), world.instances, world.view)

    # a: idle, nothing cached: 10 + 1000 of prefill, 100 steps of 21 ms; it takes 1000 ms, which two who will come (the mean batch) lose
    assert prices.parts_of(0) == {
        "waiting": 0.0,
        "prefill": 1010.0,
        "decode": 2100.0,
        "delay": 2000.0,
        "eviction": 0.0,
        "cached_tokens": 0.0,
    }
    # b: 300 ms of prefill ahead, 100 tokens of its own, steps of 25 ms; 4 others and 2 who will come are stalled for 100 ms, each of 100
    # steps gets 1 ms longer for the 4, and five who come behind it wait for 300 ms; half of 200 tokens are computed again, for all 7
    expected = {"waiting": 300.0, "prefill": 110.0, "decode": 2500.0, "delay": 2500.0, "eviction": 700.0, "cached_tokens": 900.0}
    assert prices.parts_of(1) == pytest.approx(expected)
    assert prices.totals()[1] == pytest.approx(sum(expected[part] for part in PARTS))
    assert prices.first_tokens() == [1010.0, 410.0]


def test_a_prompt_on_top_of_others_stalls_more_than_the_first_of_a_step() -> None:
    clock = ManualClock(100.0)
    predictor = LatencyPredictor(clock)
    instance = ExecutionInstance("a", model_name="m", profile="h100-llama3-8b", active_requests=4)

    def send(tokens: int) -> None:
        predictor.began(asking(tokens), instance, clock.now_s(), streamed=True)

    [(none_ahead_ms, own_ms, first_ms, *_)] = predictor.newcomers_ms([instance], [0], 100)
    send(1000)
    send(1000)
    [(ahead_ms, still_own_ms, on_top_ms, *_)] = predictor.newcomers_ms([instance], [0], 100)

    assert none_ahead_ms == 0.0
    assert ahead_ms > 3.0 * own_ms
    assert still_own_ms == pytest.approx(own_ms, rel=0.1)
    assert 0.0 < first_ms < 0.7 * on_top_ms
    told = predictor.queued(instance)
    assert (told.prompts, told.prompt_tokens) == (2.0, 2000.0)


def test_a_full_kv_cache_is_waited_for() -> None:
    world = World(10, 10)
    full, free = world.instances
    for instance, usage in ((full, 0.95), (free, 0.5)):
        instance.engine.kv_block_count, instance.engine.kv_block_size_tokens = 1000, 10
        instance.engine.kv_cache_usage, instance.avg_latency_ms = usage, 8000.0
    prices = priced(asking(1350), world.instances, world.view)

    # 9,500 of 10,000 tokens are used and 1,450 wanted: 950 too many, a tenth of what is used, so a tenth of the mean latency
    assert prices.waiting == pytest.approx([800.0, 0.0])


def test_predicted_latency_takes_the_least_loss_of_all() -> None:
    # a holds half but serves many: 510 + 100 x 51 + (30 + 15.5) x 500 + 30 x 100 = 31,360
    # against 1,010 + 2,200 + (1 + 15.5) x 1,000 + 1 x 100 = 19,810
    world = World(30, 1, cached={"a": 500})
    strategy = PredictedLatency(Random(1))

    assert strategy.place(asking(1000), world.instances, world.view).instance.instance_id == "b"
    world.instances[0].active_requests = 2
    assert strategy.place(asking(1000), world.instances, world.view).instance.instance_id == "a"


def test_prefix_aware_takes_the_soonest_first_token_whatever_the_batch() -> None:
    world = World(30, 1, cached={"a": 900})
    strategy = PrefixAware()
    assert strategy.place(asking(1000), world.instances, world.view).instance.instance_id == "a"
    world.queued("a", 1001)

    assert strategy.place(asking(1000), world.instances, world.view).instance.instance_id == "b"


def test_prefix_aware_tells_equals_apart_by_the_whole_price() -> None:
    world = World(7, 3, 5)

    assert PrefixAware().place(asking(1000), world.instances, world.view).instance.instance_id == "b"


@BOTH
def test_a_hot_prefix_is_replicated_rather_than_queued_behind(name: str) -> None:
    world, strategy = World(0, 0, 0, cached={"a": 900}), create_strategy(name, Random(0))
    went: list[str] = []
    for _ in range(30):  # all at once, none of them done before the last has come
        chosen = strategy.place(asking(1000), world.instances, world.view).instance
        went.append(chosen.instance_id)
        chosen.active_requests += 1
        world.queued(chosen.instance_id, 1000 - world.prefixes.cached.get(chosen.instance_id, 0))
        world.prefixes.cached[chosen.instance_id] = 900

    assert went[0] == "a"
    assert set(went) == {"a", "b", "c"}
    assert max(map(went.count, "abc")) <= 20, "and then they share it"


@BOTH
def test_sessions_stay_when_instances_join(name: str) -> None:
    instances = [ExecutionInstance(f"i{k}", model_name="m", active_requests=8) for k in range(4)]
    strategy = create_strategy(name, Random(0))
    joined = [*instances, *(ExecutionInstance(f"new{k}", model_name="m", active_requests=7) for k in range(4))]
    for home in instances:  # a session's turns of 3,000 tokens, of which its home holds 2,700
        view = StaticView(joined, predictor=RoundNumbers(), prefixes=ToldPrefixes({home.instance_id: 2700}))
        assert strategy.place(asking(3000), joined, view).instance is home
    view = StaticView(joined, predictor=RoundNumbers())
    assert strategy.place(asking(3000), joined, view).instance.instance_id.startswith("new"), "a new session goes to the new ones"


@BOTH
def test_a_decision_shows_each_candidates_parts(name: str) -> None:
    world = World(3, 1, cached={"a": 500})
    request = asking(1000)
    placement = create_strategy(name, Random(0)).place(request, world.instances, world.view)
    decision = decide(request, placement, world.view, router=name).written_out("r")

    assert set(decision.parts) == {"a", "b"} == {candidate.instance_id for candidate in decision.candidates}
    for candidate in decision.candidates:
        parts = decision.parts[candidate.instance_id]
        summed = PARTS if name == "predicted_latency" else ("waiting", "prefill")
        assert sum(parts[part] for part in summed) == pytest.approx(candidate.predicted_ms)
    assert f"{placement.predicted_ms:.0f} ms" in decision.reason


@BOTH
def test_a_large_fleet_is_sampled_with_its_holders_and_that_is_said(name: str) -> None:
    instances = [ExecutionInstance(f"i{k}", model_name="m", active_requests=5) for k in range(400)]

    class ManyHold(ToldPrefixes):
        def holders(self, request: object, limit: int) -> list[ExecutionInstance]:
            return [instances[k] for k in range(100, 130)][:limit]

    strategy = create_strategy(name, Random(3))
    view = StaticView(instances, predictor=RoundNumbers(), prefixes=ManyHold({f"i{k}": 900 for k in range(100, 130)}))
    placement = strategy.place(asking(1000), instances, view)

    assert placement.instance.instance_id in {f"i{k}" for k in range(100, 100 + MAX_HOLDERS)}
    looked_at = int(placement.reason.split("sampled ")[1].split()[0])
    assert SAMPLE_SIZE <= looked_at <= SAMPLE_SIZE + MAX_HOLDERS
    assert placement.reason.endswith(f"(sampled {looked_at} of 400)")


# -- several control planes ------------------------------------------------------------------------------------------------------


def seen_by_two(ours: int, others: float, at_scrape: int) -> ExecutionInstance:
    made = ExecutionInstance("x", model_name="m", active_requests=ours)
    made.others_requests, made.engine.ours = others, at_scrape
    return made


def test_others_are_taken_to_have_done_since_the_scrape_as_we_have() -> None:
    # 10 of ours and 20 of theirs in all: for each of ours that came or went since, two of theirs
    filled, emptied = seen_by_two(7, 10.0, 4), seen_by_two(3, 10.0, 5)

    assert batches_of([filled, emptied]) == [7 + 10 + 2 * 3, 3 + 10 - 2 * 2]


def test_alone_only_our_own_count() -> None:
    assert batches_of([seen_by_two(7, 0.0, 1), seen_by_two(3, 0.0, 9)]) == [7.0, 3.0]


@given(
    rows=st.lists(st.tuples(st.integers(0, 200), st.floats(0, 200), st.integers(0, 200)), min_size=1, max_size=12),
)
def test_a_batch_is_never_less_than_what_is_ours(rows: list[tuple[int, float, int]]) -> None:
    instances = [seen_by_two(*row) for row in rows]

    assert all(batch >= instance.active_requests for batch, instance in zip(batches_of(instances), instances, strict=True))


# -- adaptive --------------------------------------------------------------------------------------------------------------------


def told(predictor: LatencyPredictor, predicted_ms: float, observed_ms: float, times: int) -> None:
    for _ in range(times):
        predictor.calibration["tpot_ms"].observe(predicted_ms, predicted_ms, observed_ms)


def test_adaptive_leaves_prices_while_predictions_are_wrong_and_says_so() -> None:
    instances = [ExecutionInstance(f"i{k}", model_name="m") for k in range(3)]
    strategy, predictor = AdaptiveRouting(Random(0)), LatencyPredictor()
    view = StaticView(instances, predictor=predictor)

    def look() -> str:
        for _ in range(LOOK_EVERY):
            strategy.place(asking(100, session_id="s"), instances, view)
        return strategy.place(asking(100, session_id="s"), instances, view).reason

    told(predictor, 20.0, 10.0, LEAST_COMPARED - 1)
    assert look().startswith("least predicted loss"), "too few were compared"
    told(predictor, 20.0, 10.0, 1)
    reason = look()
    assert reason.startswith("home of its session")
    assert re.search(r"predictions are off by (9\d|10\d)%", reason)
    told(predictor, 16.0, 10.0, 20_000)
    assert look().startswith("home of its session"), "60 % is better, not good"
    told(predictor, 11.0, 10.0, 20_000)
    assert look().startswith("least predicted loss")

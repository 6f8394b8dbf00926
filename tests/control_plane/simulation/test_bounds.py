"""What stands beside the arms of a comparison: one LRU cache of the fleet's size, and a control plane that knows the lengths of answers."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.prediction import LatencyPredictor
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.known_lengths import know_lengths
from control_plane.simulator.lru_bound import LruCache, cache_tokens, lru_hit_rate
from control_plane.simulator.run import Simulation, simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.workload import TraceRequest, Workload
from control_plane.types import RequestMetadata

FLEET = parse_fleet("1xh100-llama3-8b")
CHAINS = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=5, unique=True), max_size=30)


def matches_by_hand(chains: Sequence[Sequence[int]], room: int) -> list[int]:
    """A list in order of last use, the newest last; what is too much goes from its front."""
    order: list[int] = []
    found = []
    for chain in chains:
        count = 0
        while count < len(chain) and chain[count] in order:
            count += 1
        found.append(count)
        for block in chain[::-1]:
            if block in order:
                order.remove(block)
            order.append(block)
        order = order[max(0, len(order) - room) :]
    return found


@given(CHAINS, st.integers(1, 8))
def test_the_cache_finds_what_a_list_in_order_of_use_finds(chains: list[list[int]], room: int) -> None:
    cache = LruCache(room)
    found = []
    for chain in chains:
        ids = tuple(chain)
        found.append(cache.match(ids))
        cache.use(ids)
    assert found == matches_by_hand(chains, room)


def test_of_one_prompt_the_end_goes_first() -> None:
    cache = LruCache(3)
    cache.use((1, 2, 3))
    cache.use((9,))
    assert cache.match((1, 2, 3)) == 2


def test_whole_blocks_before_the_last_token_count_and_answers_stay_as_far_as_they_are_known() -> None:
    first = TraceRequest(0.0, 128, 64, (1, 2, 3))
    again = TraceRequest(1.0, 128, 64, (1, 2, 4))  # its second block holds its last token, which is always computed
    further = TraceRequest(2.0, 200, 64, (1, 2, 3, 5))  # the answer to the first is its third block
    stream = Workload("by hand", [first, again, further], 64)
    assert lru_hit_rate(FLEET, stream, (0.0, 1.5)) == 64 / 256
    assert lru_hit_rate(FLEET, stream, (1.5, 3.0)) == 192 / 200  # what came before the window has filled it
    assert lru_hit_rate(FLEET, stream, (5.0, 9.0)) == 0.0


def test_the_size_is_that_of_all_engines() -> None:
    one, mixed = cache_tokens(FLEET), cache_tokens(parse_fleet("2xh100-llama3-8b,1xa100x2-llama3-8b"))
    assert mixed > 3 * one
    blocks = one // 64
    long = tuple(range(blocks))
    stream = Workload("by hand", [TraceRequest(float(at), 64 * blocks, 0, long) for at in range(2)], 64)
    assert lru_hit_rate(FLEET, stream, (1.0, 2.0)) == (blocks - 1) / blocks
    longer = Workload("by hand", [TraceRequest(float(at), 128 * blocks, 0, tuple(range(2 * blocks))) for at in range(2)], 64)
    assert lru_hit_rate(FLEET, longer, (1.0, 2.0)) == pytest.approx(0.5, abs=1e-3)


def test_one_engine_with_one_request_at_a_time_finds_just_that() -> None:
    """The yardstick and the engine's model reckon alike."""
    rng = Random(3)
    requests = []
    for at in range(60):
        kind = rng.randrange(4)
        ids = tuple(kind * 1000 + place if place < 3 + kind else 100_000 + 100 * at + place for place in range(10))
        requests.append(TraceRequest(at * 20.0, rng.randrange(64, 600), 20, ids))
    stream = Workload("by hand", requests, 64)
    result = simulate(Scenario(FLEET, stream), Arm("fifo", "round_robin"))
    assert result.prefix_hits_tokens > 0
    assert result.prefix_hits_tokens / result.prefix_queries_tokens == lru_hit_rate(FLEET, stream, (0.0, 1e6))


# ---- the clairvoyant


def test_who_knows_lengths_predicts_them_exactly_whatever_has_been_seen() -> None:
    predictor = LatencyPredictor()
    know_lengths(predictor)
    for tokens in (1, 2, 17, 999):
        request = RequestMetadata("r", prompt="hello", max_tokens=tokens)
        for _ in range(100):
            predictor.observe_length("m", request, 3)
        assert predictor.output_tokens(request) == tokens
        assert predictor.output_tokens_p50(request) == tokens
        assert predictor.output_tokens_p90(request) == tokens
        assert predictor.remaining_tokens(request, tokens - 1) == 1


def test_without_a_limit_lengths_are_predicted_as_always() -> None:
    plain, knowing = LatencyPredictor(), LatencyPredictor()
    know_lengths(knowing)
    request = RequestMetadata("r", prompt="hello", max_tokens=None)
    for predictor in (plain, knowing):
        for _ in range(100):
            predictor.observe_length("", request, 30)
    assert knowing.output_tokens(request) == plain.output_tokens(request) == 30


def test_the_clairvoyant_arm_is_right_about_every_answer_and_the_engines_do_the_same_work() -> None:
    rng = Random(0)
    requests = [TraceRequest(at * 0.1, 500, rng.choice((5, 50, 500))) for at in range(200)]
    scenario = Scenario(parse_fleet("2xh100-llama3-8b"), Workload("by hand", requests))
    runs = {known: Simulation(scenario, Arm("slo_aware", "predicted_latency", known_lengths=known)) for known in (False, True)}
    results = {known: run.run() for known, run in runs.items()}
    assert runs[True].manager.predictor.calibration["output_tokens"].pinball_p50 == 0.0
    assert runs[False].manager.predictor.calibration["output_tokens"].pinball_p50 > 10.0
    for result in results.values():
        assert list(result.outcomes.output_tokens) == [request.output_tokens for request in requests]
    assert results[True].event_digest != results[False].event_digest


def test_an_arm_is_called_in_rows_what_it_is_called() -> None:
    arm = Arm("fifo", "round_robin", named="by turns")
    result = simulate(Scenario(FLEET, Workload("by hand", [TraceRequest(0.0, 10, 2)])), arm)
    assert (result.scheduling_policy, result.routing_strategy, arm.label) == ("fifo", "by turns", "fifo+by turns")
    assert Arm("fifo", "round_robin").label == "fifo+round_robin"

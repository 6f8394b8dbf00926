"""What is believed to be on an instance: the engine's late figures and our own early ones, merged."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.fleet.load import load_of, pressure_of, trust_of
from control_plane.live_state import InFlight
from control_plane.types import EngineStats, ExecutionInstance


def instance(active: int = 0, **stats: Any) -> ExecutionInstance:
    told = EngineStats(**{"at_s": 100.0, **stats})
    return ExecutionInstance(instance_id="a", model_name="m", active_requests=active, engine=told)


class TestRequests:
    def test_never_scraped_it_has_what_we_sent(self) -> None:
        load = load_of(instance(7, at_s=0.0), 100.0)
        assert (load.requests, load.running, load.waiting, load.others) == (7, 7, 0, 0)
        assert (load.trust, load.kv_usage, load.age_s) == (0.0, None, math.inf)

    def test_others_are_added_to_ours(self) -> None:
        load = load_of(instance(10, running=14, ours=10, others=4), 100.0)
        assert (load.requests, load.others, load.waiting) == (14, 4, 0)

    def test_what_we_sent_since_is_there_and_waits_where_the_batch_was_full(self) -> None:
        then = instance(40, running=32, waiting=8, ours=40)
        assert load_of(then, 101.0).waiting == 8
        then.active_requests = 45
        assert load_of(then, 101.0)[:3] == (45, 32, 13)

    def test_what_ended_since_lets_the_waiting_in(self) -> None:
        then = instance(40, running=32, waiting=8, ours=40)
        then.active_requests = 36
        assert load_of(then, 101.0)[:3] == (36, 32, 4)
        then.active_requests = 3
        assert load_of(then, 101.0)[:3] == (3, 3, 0)

    @given(st.integers(0, 500), st.integers(0, 300), st.integers(0, 300), st.integers(0, 100), st.floats(0, 1e6))
    def test_never_less_than_ours_nor_more_than_ours_and_theirs(
        self, active: int, running: int, waiting: int, others: int, age_s: float
    ) -> None:
        load = load_of(instance(active, running=running, waiting=waiting, others=others), 100.0 + age_s)
        assert active <= load.requests <= active + others
        assert load.running >= 0
        assert 0 <= load.waiting <= load.requests
        assert load.running + load.waiting == pytest.approx(load.requests)


class TestAge:
    def test_believed_for_a_while_then_less_and_less(self) -> None:
        stats = EngineStats(at_s=100.0, fresh_s=4.0)
        assert [trust_of(stats, 100.0 + age_s) for age_s in (0, 4, 6, 8)] == [1.0, 1.0, 0.5, 0.25]
        assert trust_of(stats, 1e9) < 1e-9

    def test_old_figures_fade_and_ours_stay(self) -> None:
        old = instance(10, running=14, waiting=6, ours=10, others=10, kv_cache_usage=0.8)
        load = load_of(old, 1000.0)
        assert load.requests == pytest.approx(10)
        assert load.waiting == pytest.approx(0)
        assert load.kv_usage == pytest.approx(0.0, abs=1e-6)


class TestKvCache:
    size: ClassVar = {"kv_block_count": 100, "kv_block_size_tokens": 16}

    def test_it_grows_with_our_tokens_since(self) -> None:
        then = instance(2, kv_cache_usage=0.5, ours_context_tokens=800, **self.size)
        then.in_flight.opened(960, 100.0)
        assert load_of(then, 101.0).kv_usage == pytest.approx(0.6)

    def test_others_tokens_stay_while_the_scrape_is_fresh(self) -> None:
        then = instance(0, kv_cache_usage=0.5, ours_context_tokens=320, **self.size)
        assert load_of(then, 101.0).kv_usage == pytest.approx(0.3)
        assert load_of(then, 106.0).kv_usage == pytest.approx(0.15)

    def test_shared_prefixes_are_not_counted_as_often_as_they_are_used(self) -> None:
        then = instance(4, kv_cache_usage=0.25, ours_context_tokens=1600, **self.size)
        for _ in range(2):
            then.in_flight.opened(800, 100.0)
        assert load_of(then, 101.0).kv_usage == pytest.approx(0.25)
        then.in_flight.closed(800, 0, 100.0)
        assert load_of(then, 101.0).kv_usage == pytest.approx(0.125)

    def test_never_more_than_all(self) -> None:
        then = instance(1, kv_cache_usage=0.9, ours_context_tokens=100, **self.size)
        then.in_flight.opened(10**6, 100.0)
        assert load_of(then, 101.0).kv_usage == 1.0


class TestPressure:
    @pytest.mark.parametrize(
        ("stats", "preempted", "before", "expected"),
        [
            ({}, 0, 0.0, (0.0, "")),
            ({"running": 64, "waiting": 9}, 0, 0.0, (0.0, "")),
            ({"running": 64, "kept_waiting": 4}, 0, 0.0, (0.5, "waiting")),
            ({"running": 64, "kept_waiting": 80}, 0, 0.0, (1.0, "waiting")),
            ({"kv_cache_usage": 0.9}, 0, 0.0, (0.0, "")),
            ({"kv_cache_usage": 1.0}, 0, 0.0, (1.0, "kv cache")),
            ({"kv_cache_usage": 0.5}, 3, 0.0, (1.0, "preemptions")),
            ({}, 0, 1.0, (0.5, "preemptions")),
            ({}, 0, 0.01, (0.0, "")),
        ],
    )
    def test_the_greatest_signal_counts(self, stats: dict[str, Any], preempted: int, before: float, expected: tuple[float, str]) -> None:
        pressure, by = pressure_of(EngineStats(**stats), preempted, before)
        assert (pytest.approx(pressure), by) == expected


class TestInFlight:
    def test_tokens_and_age_of_what_is_there(self) -> None:
        books = InFlight()
        books.opened(100, 10.0)
        books.opened(300, 14.0)
        assert (books.requests, books.waiting, books.waiting_tokens, books.context_tokens) == (2, 2, 400, 400)
        assert books.mean_age_s(20.0) == 8.0
        books.begun(100)
        books.context_tokens += 7
        assert (books.waiting, books.waiting_tokens, books.context_tokens) == (1, 300, 407)
        books.closed(100, 7, 10.0)
        assert (books.requests, books.context_tokens, books.mean_age_s(20.0)) == (1, 300, 6.0)
        books.begun(300)
        books.closed(300, 0, 14.0)
        assert (books.requests, books.waiting, books.waiting_tokens, books.context_tokens, books.mean_age_s(20.0)) == (0, 0, 0, 0, 0.0)

    def test_a_copy_of_an_instance_has_nothing_in_flight(self) -> None:
        original = instance()
        original.in_flight.opened(5, 1.0)
        for made in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert made.in_flight.requests == 0
            assert made.instance_id == "a"

"""What every routing strategy of the table keeps: a new one is tested the day it is listed."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.router import ROUTERS, RequestRouter, create_strategy
from control_plane.router.placement import MAX_RECORDED
from control_plane.types import ExecutionInstance, RequestMetadata
from control_plane.view import StaticView

pytestmark = pytest.mark.parametrize("name", list(ROUTERS))


def instance(k: int, active: int, load: float, tp: int) -> ExecutionInstance:
    made = ExecutionInstance(f"i{k}", model_name="m", active_requests=active, current_load=load, tensor_parallel_size=tp)
    made.outstanding_ms = active * 1500.0
    made.avg_latency_ms = 100.0 * (k % 3)
    return made


FLEETS = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1), st.sampled_from([1, 2, 8])), min_size=1, max_size=90).map(
    lambda rows: [instance(k, *row) for k, row in enumerate(rows)]
)
REQUESTS = st.builds(
    RequestMetadata,
    request_id=st.just("r"),
    model_name=st.sampled_from([None, "m"]),
    prompt=st.text(max_size=20),
    input_tokens=st.one_of(st.none(), st.integers(0, 10_000)),
    user_id=st.one_of(st.none(), st.text(max_size=5)),
    session_id=st.one_of(st.none(), st.text(max_size=5)),
    max_tokens=st.one_of(st.none(), st.integers(0, 4000)),
)


def test_it_is_listed_under_its_name(name: str) -> None:
    assert create_strategy(name).name == name == RequestRouter(name).strategy
    assert not create_strategy(name).selects_async


@settings(max_examples=40, deadline=None)
@given(fleet=FLEETS, requests=st.lists(REQUESTS, min_size=1, max_size=5))
def test_a_placement_is_a_candidate_with_its_reasons(name: str, fleet: list[ExecutionInstance], requests: list[RequestMetadata]) -> None:
    strategy, view = create_strategy(name, Random(7)), StaticView(fleet)
    for request in requests:
        placed = strategy.place(request, fleet, view)
        costs = [c.predicted_ms for c in placed.candidates]
        ids = [c.instance_id for c in placed.candidates]
        assert placed.instance in fleet
        assert 1 <= len(ids) <= MAX_RECORDED
        assert len(set(ids)) == len(ids)
        assert placed.instance.instance_id in ids
        assert dict(placed.candidates)[placed.instance.instance_id] == placed.predicted_ms
        assert all(0.0 <= cost < math.inf for cost in costs)
        assert costs == sorted(costs) or (len(fleet) > MAX_RECORDED and costs[:-1] == sorted(costs[:-1]))
        assert placed.reason


@settings(max_examples=20, deadline=None)
@given(fleet=FLEETS, requests=st.lists(REQUESTS, min_size=1, max_size=8))
def test_the_same_seed_makes_the_same_choices(name: str, fleet: list[ExecutionInstance], requests: list[RequestMetadata]) -> None:
    def run() -> list[str]:
        strategy, view = create_strategy(name, Random(11)), StaticView(fleet)
        return [strategy.place(request, fleet, view).instance.instance_id for request in requests]

    assert run() == run()


@settings(max_examples=20, deadline=None)
@given(fleet=FLEETS)
def test_placing_changes_no_instance(name: str, fleet: list[ExecutionInstance]) -> None:
    before = [dict(vars(each)) for each in fleet]
    create_strategy(name, Random(1)).place(RequestMetadata(prompt="x"), fleet, StaticView(fleet))

    assert [dict(vars(each)) for each in fleet] == before


def test_candidates_the_view_does_not_know_are_placed_too(name: str) -> None:
    fleet = [instance(k, 0, 0.0, 1) for k in range(3)]

    assert create_strategy(name).place(RequestMetadata(prompt="x"), fleet, StaticView([])).instance in fleet


async def test_through_the_seeds_face(name: str) -> None:
    fleet = [instance(k, 0, 0.0, 1) for k in range(3)]

    assert (await RequestRouter(name, rng=Random(1)).select_instance(RequestMetadata(prompt="x"), fleet)) in fleet

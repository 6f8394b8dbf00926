"""Requests and instances whose classes a user extends, copies, or keeps: their compiled bases must not show."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
from scripted_world import Make

from control_plane import ExecutionInstance, RequestMetadata, RequestPriority, compiled
from control_plane.live_state import LIVE_FIELDS, REQUEST_FIELDS, LiveState, RequestFields


@dataclass
class Ticket(RequestMetadata):
    max_tokens: int | None = 7
    rack: str = "r1"


@dataclass(eq=False)
class Machine(ExecutionInstance):
    max_concurrent_requests: int | None = 3
    rack: str = "r2"


COPIES = [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record)), dataclasses.replace]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_have_every_field(copied: Any) -> None:
    for made in (
        RequestMetadata(prompt="x", priority=RequestPriority.HIGH, tags={"a": 1}, input_tokens=5),
        Ticket(prompt="y", rack="r9"),
        ExecutionInstance(instance_id="i", port=8123, active_requests=2, max_concurrent_requests=9, metadata={"b": 2}),
        Machine(instance_id="m", current_load=0.5),
    ):
        again = copied(made)
        assert type(again) is type(made)
        assert again is not made
        had, has = dataclasses.asdict(made), dataclasses.asdict(again)
        had.pop("in_flight", None)  # what a copy has in flight is its own: nothing (test_load.py)
        has.pop("in_flight", None)
        assert has == had


def test_another_default_in_a_subclass_is_the_field() -> None:
    assert (Ticket().max_tokens, Ticket(max_tokens=9).max_tokens, Ticket().rack) == (7, 9, "r1")
    machine = Machine(instance_id="m")
    assert (machine.max_concurrent_requests, machine.concurrency_limit, machine.rack) == (3, 3, "r2")
    machine.max_concurrent_requests = 5
    assert machine.concurrency_limit == 5


async def test_a_subclass_serves(make: Make) -> None:
    world = make("")
    world.manager.register_instance(Machine(instance_id="a", model_name="m"))
    await world.manager.start()
    await world.manager.submit_request(Ticket(request_id="t", model_name="m", prompt="x"))
    assert world.open_on("a")


def test_the_bases_have_what_they_list() -> None:
    assert set(REQUEST_FIELDS) == {one.name for one in dataclasses.fields(RequestMetadata)}
    assert set(LIVE_FIELDS) <= {one.name for one in dataclasses.fields(ExecutionInstance)}
    if not compiled.in_use():
        assert tuple(LiveState.__annotations__) == LIVE_FIELDS
        assert set(RequestFields.__annotations__) == set(REQUEST_FIELDS)
    for name in LIVE_FIELDS:  # a default of the class would hide it
        assert name not in vars(ExecutionInstance)


def test_what_is_begun_is_what_the_constructor_makes() -> None:
    begun: Any = RequestMetadata.__new__(RequestMetadata)
    fields: RequestFields = begun
    fields.begin(RequestPriority.NORMAL)
    assert begun == RequestMetadata()
    assert begun.tags is not RequestMetadata().tags


def test_no_other_attribute_can_be_set_on_a_request() -> None:
    with pytest.raises(AttributeError):
        RequestMetadata().max_token = 5  # type: ignore[attr-defined]

"""The approximate prefix index: what it believes, what it forgets, and what the dispatch window makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedCall, ScriptedEngine

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.fleet import HealthSettings, PrefixIndex
from control_plane.fleet.prefix.pieces import PIECE_BYTES

A = ExecutionInstance(instance_id="a", model_name="m")
B = ExecutionInstance(instance_id="b", model_name="m")
TOKENS = PIECE_BYTES // 4


def prompt(text: str, model: str = "m") -> RequestMetadata:
    return RequestMetadata(prompt=text, model_name=model)


@given(shared=st.integers(0, 5000), first=st.integers(0, 2000), second=st.integers(0, 2000))
def test_whole_shared_pieces_count_and_nothing_else(shared: int, first: int, second: int) -> None:
    index = PrefixIndex()
    index.sent(prompt("s" * shared + "1" * first), A)
    expected = min(shared // PIECE_BYTES, 8) * TOKENS
    assert index.cached_tokens(prompt("s" * shared + "2" * second), A) == expected
    assert index.cached_tokens(prompt("s" * shared), B) == 0
    assert index.cached_tokens(prompt("s" * shared, model="other"), A) == 0


def test_the_oldest_go_first_and_a_chain_loses_its_end_first() -> None:
    index = PrefixIndex()
    small = ExecutionInstance(instance_id="small", model_name="m")
    small.engine.kv_block_size_tokens, small.engine.kv_block_count = 16, 4 * TOKENS // 16
    for letter in "xy":
        index.sent(prompt(letter * PIECE_BYTES * 3), small)
    assert index.cached_tokens(prompt("x" * PIECE_BYTES * 3), small) == TOKENS
    assert index.cached_tokens(prompt("y" * PIECE_BYTES * 3), small) == 3 * TOKENS


def test_nothing_is_believed_of_an_engine_that_restarted_or_does_not_cache() -> None:
    index = PrefixIndex()
    here = ExecutionInstance(instance_id="here", model_name="m")
    index.sent(prompt("x" * 600), here)
    assert index.cached_tokens(prompt("x" * 600), here) == TOKENS
    here.engine.prefix_caching = False
    assert index.cached_tokens(prompt("x" * 600), here) == 0
    here.engine.prefix_caching = True
    index.forget("here")
    assert index.cached_tokens(prompt("x" * 600), here) == 0


@pytest.mark.parametrize(("window", "second"), [(1, "cold"), (64, "warm")])
async def test_the_window_takes_the_warm_request_and_window_one_is_strict(window: int, second: str) -> None:
    engines: list[ScriptedEngine] = []

    def make(instance: ExecutionInstance) -> ScriptedEngine:
        engines.append(ScriptedEngine(instance))
        return engines[-1]

    manager = ControlPlaneManager(
        scheduling_policy="fifo", dispatch_window=window, engine_factory=make, health=HealthSettings(probe_interval_s=30.0)
    )
    manager.register_instance(ExecutionInstance(instance_id="a", model_name="m", max_concurrent_requests=1))
    async with manager:
        shared = "shared " * 600
        for name, text in (("first", shared + "1"), ("cold", "another " * 600), ("warm", shared + "2")):
            await manager.submit_request(RequestMetadata(request_id=name, prompt=text, max_tokens=4, slo_deadline_ms=600_000))
        order: list[str] = []
        end: Callable[[ScriptedCall], None] = ScriptedCall.answer
        while engines[0].open:
            call = engines[0].open[0]
            order.append(call.request.request_id)
            end(call)
    assert order[:2] == ["first", second]
    assert sorted(order) == ["cold", "first", "warm"]

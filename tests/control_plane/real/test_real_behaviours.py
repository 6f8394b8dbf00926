"""What the model of an engine is held to, asked of a real one: the same questions, the same answers, where they do not hang on speed.

How near the times come is measured by `benchmarks/calibration.py` (docs/CALIBRATION.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator

import engine_behaviours as behaviours
import pytest
from vllm_server import MODEL, VllmServer

from control_plane.calibration import Given, HttpLoad, ModelLoad, Options, calibrate
from control_plane.calibration.server import ask_server
from control_plane.clock import SystemClock
from control_plane.profile_file import load
from control_plane.roofline import EngineProfile, profile
from control_plane.simulator.loop import VirtualLoop

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

#: 17 blocks of 128 tokens, of which one is vLLM's own; so few that a small load throws sequences out
TIGHT = ("--num-gpu-blocks-override", "17", "--max-num-seqs", "4", "--max-model-len", "2048", "--scheduling-policy", "priority")


@pytest.fixture(scope="module")
def tight_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    flags = ("--enable-prompt-tokens-details", *TIGHT)
    server = VllmServer("tight", (os.cpu_count() or 1) - 1, tmp_path_factory.mktemp("vllm"), flags)
    with server.up():
        yield server


@pytest.fixture
async def tight(tight_server: VllmServer) -> AsyncIterator[HttpLoad]:
    load = HttpLoad(tight_server.url, SystemClock(), most=16)
    load.model = MODEL
    yield load
    await load.close()


@pytest.fixture
async def roomy(server: VllmServer) -> AsyncIterator[HttpLoad]:
    load = HttpLoad(server.url, SystemClock(), most=16)
    load.model = MODEL
    yield load
    await load.close()


def modelled(behaviours_profile: EngineProfile) -> tuple[VirtualLoop, ModelLoad]:
    loop = VirtualLoop()
    return loop, ModelLoad(loop, behaviours_profile, most=16, scheduling="priority")


async def test_prefix_hits_are_the_models_block_by_block(roomy: HttpLoad) -> None:
    seed = time.time_ns()
    loop, model = modelled(behaviours.tight_profile(kv_block_count=4_096, max_num_seqs=8, max_model_len=4_096))
    assert await behaviours.prefix_hits(roomy, seed, 128) == loop.run(behaviours.prefix_hits(model, seed, 128))


async def test_as_many_sequences_are_thrown_out_as_by_the_model(tight: HttpLoad) -> None:
    seed = time.time_ns()
    loop, model = modelled(behaviours.tight_profile())
    real = await behaviours.preemptions(tight, seed, 300, 300, 4)
    assert real == loop.run(behaviours.preemptions(model, seed, 300, 300, 4))
    assert real[0] > 0
    assert real[1] == [300] * 4


async def test_priorities_come_in_the_models_order(tight: HttpLoad) -> None:
    loop, model = modelled(behaviours.tight_profile())
    seed = time.time_ns()
    assert await behaviours.order_by_priority(tight, seed, 4) == [1, 3, 5, 7, 9]
    assert loop.run(behaviours.order_by_priority(model, seed, 4)) == [1, 3, 5, 7, 9]


async def test_what_is_cancelled_gives_back_its_blocks(roomy: HttpLoad) -> None:
    _, _, left = await behaviours.cancelled(roomy, time.time_ns(), 8)
    loop, model = modelled(behaviours.tight_profile(kv_block_count=4_096, max_num_seqs=8, max_model_len=4_096))
    _, _, of_the_model = loop.run(behaviours.cancelled(model, 1, 8))
    # the one that stays may be a block further
    assert left == pytest.approx(of_the_model, abs=0.03)


async def test_streams_run_together(roomy: HttpLoad) -> None:
    longer, all_begun_before_one_ended = await behaviours.batched(roomy, time.time_ns(), 6)
    assert all_begun_before_one_ended
    assert longer < 6.0


async def test_a_server_tells_what_calibration_asks(roomy: HttpLoad) -> None:
    served = await ask_server(roomy, Given())
    assert (served.model, served.block_size_tokens, served.max_model_len_tokens) == (MODEL, 128, 4_096)
    assert served.kv_block_count == 4_096
    assert served.prefix_caching
    assert not served.simulated


async def test_a_real_server_is_calibrated_into_a_profile(roomy: HttpLoad, tmp_path: object) -> None:
    """That it works; not how well: tests do not measure speed."""
    from datetime import UTC, datetime
    from pathlib import Path

    from control_plane.calibration.report import profile_of

    found = await calibrate(roomy, Options(seed=1, rounds=1, quick=True, budget_s=200.0))
    assert (found.limits.max_num_seqs, found.limits.max_num_seqs_how) == (8, "measured")
    path = Path(str(tmp_path)) / "real.yaml"
    at = datetime.now(UTC)
    profile_of("real", None, found.served, found.limits, found.fitted, found.readings, url=roomy.url, at=at, seed=1).write(path)
    assert profile(str(path)).max_num_seqs == 8
    assert load(str(path)).measured["version"]

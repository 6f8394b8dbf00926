"""Calibration: a server whose step times are known is measured and they are found again; what is sent stays within what was said."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import engine_behaviours as behaviours
import pytest
from child_environment import child_environment

from control_plane.calibration import CannotCalibrate, Given, HttpLoad, ModelLoad, Options, ServerTime, calibrate
from control_plane.calibration.limits import Limits, learn_limits
from control_plane.calibration.plan import Kind, make_plan
from control_plane.calibration.run import Calibrated, bounds_of
from control_plane.calibration.server import Prompts, Served, ask_server, token_pool
from control_plane.calibration.streams import Stream
from control_plane.calibration.windows import Prompted, chunk_sizes, decode_window, prompt_window
from control_plane.clock import SystemClock
from control_plane.errors import InvalidRequest
from control_plane.fitted_step import FittedStep, StepShape
from control_plane.profile_file import ProfileFile
from control_plane.roofline import EngineProfile, profile
from control_plane.sim_engine import SimEngine
from control_plane.simulator.loop import VirtualLoop

STEP = FittedStep(
    overhead_s=3.5e-3,
    prefill_token_s=8e-5,
    prefill_pair_s=2e-8,
    prefill_context_s=1e-7,
    decode_sequence_s=3e-4,
    decode_context_s=6e-8,
    sequence_s=2e-4,
    mixed_s=1e-3,
    prompt_s=4e-4,
)
SERVER = ServerTime(request_s=0.004, serial_s=0.002, prompt_token_s=2e-6, text_token_s=1e-5, chunk_s=1e-4)


def engine(step: FittedStep = STEP, **sizes: Any) -> EngineProfile:
    limits = {
        "max_num_seqs": 24,
        "max_num_batched_tokens": 2_048,
        "max_model_len_tokens": 4_096,
        "kv_block_count_override": 4_096,
        "block_size_tokens": 128,
    }
    return replace(profile("h100-llama3-8b"), name="known", fitted=step, **(limits | sizes))


def measure(of: EngineProfile, *, most: int = 32, options: Options | None = None, **how: Any) -> tuple[Calibrated, ModelLoad, list[str]]:
    loop = VirtualLoop()
    load = ModelLoad(loop, of, most=most, server=SERVER, **how)
    said: list[str] = []
    found = loop.run(calibrate(load, options or Options(seed=1, rounds=1), say=said.append))
    return found, load, said


# ---- what is found


def test_known_step_times_limits_and_costs_are_found_again() -> None:
    found, _, _ = measure(engine())
    step, server = found.fitted.step, found.fitted.server
    for name in ("overhead_s", "prefill_token_s", "prefill_pair_s", "prefill_context_s", "decode_context_s", "mixed_s"):
        assert getattr(step, name) == pytest.approx(getattr(STEP, name), rel=0.01), name
    # what a sequence of either kind costs is found as what each kind costs
    assert step.decode_sequence_s == pytest.approx(STEP.decode_sequence_s + STEP.sequence_s, rel=0.01)
    assert step.prompt_s == pytest.approx(STEP.prompt_s + STEP.sequence_s, rel=0.01)
    for name in ("request_s", "prompt_token_s", "text_token_s", "chunk_s"):
        assert getattr(server, name) == pytest.approx(getattr(SERVER, name), rel=0.02), name
    # of requests at once each also waits for the step in progress, which is as long as two of them
    assert server.serial_s == pytest.approx(SERVER.serial_s, rel=0.2)
    assert (found.limits.max_num_seqs, found.limits.max_num_seqs_how) == (24, "measured")
    assert (found.limits.max_num_batched_tokens, found.limits.max_num_batched_tokens_how) == (2_048, "measured")
    assert found.readings.lost == 0
    assert found.foreign_tokens == 0


def test_noise_of_steps_averages_out() -> None:
    found, _, _ = measure(engine(), options=Options(seed=2, rounds=3), jitter=0.05, rng=Random(3))
    for tokens, sequences in ((0, 1), (0, 12), (512, 1), (1_500, 6)):
        shape: dict[str, int] = {
            "prefill_tokens": tokens,
            "prefill_context_tokens": 0,
            "decode_sequences": sequences,
            "decode_context_tokens": 300 * sequences,
        }
        assert found.fitted.step(**shape) == pytest.approx(STEP(**shape), rel=0.05)


@pytest.mark.parametrize("budget", [512, 2_048, 3_000])
def test_the_token_budget_is_found_also_where_it_is_an_odd_one(budget: int) -> None:
    found, _, _ = measure(engine(max_num_batched_tokens=budget), options=Options(seed=1, rounds=1, quick=True))
    assert found.limits.max_num_batched_tokens == pytest.approx(budget, rel=0.02)
    assert found.limits.max_num_batched_tokens_how.startswith("measured")


@pytest.mark.parametrize("seed", range(1, 9))
def test_the_token_budget_is_found_where_steps_of_a_kind_last_twice_as_long_as_others(seed: int) -> None:
    """A busy machine; one wrong answer of a prompt would lead the whole search astray."""
    loop = VirtualLoop()
    load = ModelLoad(loop, engine(), most=32, server=SERVER, jitter=0.5, rng=Random(seed))

    async def learn() -> Limits:
        served = await ask_server(load, Given())
        return await learn_limits(load, Prompts(await token_pool(load), Random(seed)), served, Given(max_num_seqs=24))

    found = loop.run(learn())
    assert found.max_num_batched_tokens == pytest.approx(2_048, rel=0.02)
    assert found.max_num_batched_tokens_how.startswith("measured")


def test_what_cannot_be_learned_is_said_to_be_assumed_and_can_be_given() -> None:
    wide = engine(max_num_seqs=128, max_num_batched_tokens=8_192)
    found, _, _ = measure(wide, options=Options(seed=1, rounds=1, quick=True))
    assert found.limits.max_num_seqs_how.startswith("assumed; it runs at least 32")
    assert found.limits.max_num_batched_tokens_how.startswith("assumed; a prompt of 4095 tokens is computed in one step")
    given = Given(max_num_seqs=128, max_num_batched_tokens=8_192)
    found, _, _ = measure(wide, options=Options(given=given, seed=1, rounds=1, quick=True))
    assert (found.limits.max_num_seqs, found.limits.max_num_seqs_how) == (128, "given")
    assert (found.limits.max_num_batched_tokens, found.limits.max_num_batched_tokens_how) == (8_192, "given")


def test_without_prefix_caching_nothing_is_measured_behind_a_cached_prefix() -> None:
    found, _, _ = measure(engine(), caching=False, options=Options(seed=1, rounds=1, quick=True))
    assert not any(row.point.kind is Kind.PREFIX for row in found.fitted.rows)
    assert found.fitted.step.decode_sequence_s + found.fitted.step.sequence_s == pytest.approx(5e-4, rel=0.02)


def test_the_same_seed_measures_the_same() -> None:
    first, _, _ = measure(engine(), jitter=0.05, rng=Random(1))
    again, _, _ = measure(engine(), jitter=0.05, rng=Random(1))
    assert first.fitted == again.fitted


# ---- what is sent


@pytest.mark.parametrize(("most", "quick"), [(4, True), (32, False)])
def test_no_more_is_sent_than_was_said(most: int, quick: bool) -> None:
    found, load, said = measure(engine(), most=most, options=Options(seed=1, rounds=2, quick=quick))
    requests, prompt_tokens, _ = bounds_of(make_plan(found.served, most=most, rounds=2, quick=quick), found.served, most)
    assert load.requests <= requests
    assert load.prompt_tokens <= prompt_tokens
    assert f"at most {requests:,} requests with {prompt_tokens:,} prompt tokens" in said[1]
    assert f"{most} requests at once" in said[1]
    assert load.active == 0


def test_a_time_that_is_up_keeps_what_was_measured_or_says_that_it_was_too_little() -> None:
    found, _, said = measure(engine(), options=Options(seed=1, rounds=50, quick=True, budget_s=60.0))
    assert 1 <= found.readings.rounds_done < 50
    assert any("the time is up" in line and "--budget-s" in line for line in said)
    with pytest.raises(CannotCalibrate, match="--budget-s"):
        measure(engine(), options=Options(seed=1, budget_s=0.5))


async def test_a_calibration_that_is_stopped_leaves_no_request_running() -> None:
    server = SimEngine(engine(), model_name="known")
    await server.start()
    load = HttpLoad(server.url, SystemClock(), most=8)
    begun = asyncio.Event()
    work = asyncio.create_task(calibrate(load, Options(seed=1), told=lambda what, share: begun.set() if "round" in what else None))
    try:
        await begun.wait()
        await asyncio.sleep(0.05)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await load.close()
        while server.open_requests:
            await asyncio.sleep(0.01)
    finally:
        await server.stop()


# ---- what is refused


class Told(ModelLoad):
    """A server that tells something else on some pages."""

    def __init__(self, pages: dict[str, tuple[int, bytes]]) -> None:
        super().__init__(VirtualLoop(), engine(), most=4)
        self.pages = pages

    async def get(self, path: str) -> tuple[int, bytes]:
        return self.pages[path] if path in self.pages else await super().get(path)


@pytest.mark.parametrize(
    ("pages", "given", "said"),
    [
        ({"/v1/models": (404, b"")}, Given(), "--engine is the server's URL without a path"),
        ({"/v1/models": (200, b'{"data": []}')}, Given(), "serves no model"),
        ({}, Given(model="other"), "--model may be known"),
        ({"/v1/completions": (404, b"")}, Given(), "no /v1/completions"),
        ({"/v1/completions": (401, b"")}, Given(), "--api-key"),
        ({"/metrics": (404, b"")}, Given(), "--block-size"),
        ({"/metrics": (404, b"")}, Given(block_size_tokens=16), "--kv-blocks"),
        ({"/v1/models": (200, b'{"data": [{"id": "known"}]}')}, Given(), "--max-model-len"),
        ({"/metrics": (200, b"vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n")}, Given(), "works on 4 requests of others"),
    ],
)
async def test_a_server_that_cannot_be_measured_is_refused_with_the_mend(
    pages: dict[str, tuple[int, bytes]], given: Given, said: str
) -> None:
    with pytest.raises(CannotCalibrate, match=said):
        await ask_server(Told(pages), given)


async def test_what_the_server_does_not_tell_may_be_given() -> None:
    load = Told({"/metrics": (404, b""), "/v1/models": (200, b'{"data": [{"id": "known"}]}')})
    served = await ask_server(load, Given(block_size_tokens=16, kv_block_count=100, max_model_len_tokens=1_000))
    assert (served.block_size_tokens, served.kv_block_count, served.max_model_len_tokens, served.model) == (16, 100, 1_000, "known")


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(CannotCalibrate, match="--max-num-batched-tokens and --max-num-seqs"):
        measure(engine(), options=Options(given=Given(max_num_seqs=64, max_num_batched_tokens=32), seed=1))


# ---- from tokens to steps


def stream_of(prompt_tokens: int, times: list[float]) -> Stream:
    stream = Stream(prompt_tokens, lambda: 0.0, lambda stream: None)
    stream.token_s = times
    return stream


def test_prompts_are_found_in_the_steps_that_computed_them() -> None:
    assert chunk_sizes(5_000, 2_047) == [2_047, 2_047, 906]
    assert chunk_sizes(4, 4) == [4]
    clock = stream_of(100, [0.00, 0.01, 0.02, 0.12, 0.20, 0.21, 0.22])
    # its first token came just after the tick of the step, or just before
    for first_s in (0.2003, 0.1997):
        sample = prompt_window([clock], [Prompted(0.02, first_s, 150)], budget_tokens=101)
        assert sample is not None
        assert sample.seconds == pytest.approx(0.20)
        assert [shape.prefill_tokens for shape in sample.steps] == [0, 100, 50, 0]
        assert [shape.prefill_context_tokens for shape in sample.steps] == [0, 0, 100, 0]
        assert [shape.decode_context_tokens for shape in sample.steps] == [102, 103, 104, 105]
    assert prompt_window([clock], [Prompted(0.2, 0.22, 10)], budget_tokens=101) is None, "there is no tick after it"
    late = stream_of(100, [0.00, 0.01, 0.200, 0.201, 0.202, 0.203, 0.204, 0.205])
    assert prompt_window([late], [Prompted(0.02, 0.2035, 10)], budget_tokens=101) is None, "ticks that came late, all at once"


def test_a_batch_is_looked_at_while_all_of_it_decodes() -> None:
    early, late = stream_of(10, [0.01 * n for n in range(20)]), stream_of(20, [0.01 * n for n in range(5, 25)])
    sample = decode_window([early, late])
    assert sample is not None
    (shape,) = sample.steps
    assert isinstance(shape, StepShape)
    assert sample.seconds / shape.repeats == pytest.approx(0.01)
    assert shape.decode_sequences == 2
    assert shape.repeats == 12
    assert decode_window([early, stream_of(20, [0.01 * n for n in range(15, 35)])]) is None, "too few steps together"


def test_the_plan_keeps_within_what_a_server_holds() -> None:
    small = Served("m", 512, 16, 64, True, "", False)
    plan = make_plan(small, most=16, rounds=1, quick=False)
    for point in plan.points:
        assert point.prompts * point.prompt_tokens + point.batch * point.context_tokens <= small.kv_tokens
        assert point.prompt_tokens < small.max_model_len_tokens
        assert point.kind is not Kind.DECODE or point.context_tokens + point.output_tokens <= small.max_model_len_tokens


# ---- the model behind the same face, and what it does


def behave(work: Callable[[ModelLoad], Any], **sizes: int) -> Any:
    loop = VirtualLoop()
    return loop.run(work(ModelLoad(loop, behaviours.tight_profile(**sizes), most=16, scheduling="priority")))


def test_the_model_behaves_as_vllm_did_when_it_was_asked() -> None:
    """What real/test_real_behaviours.py asks of a vLLM 0.32, with its answers."""
    roomy = {"kv_block_count": 4_096, "max_num_seqs": 8, "max_model_len": 4_096}
    assert behave(lambda load: behaviours.prefix_hits(load, 1, 128), **roomy) == [640, 0, 128, 256, 384, 512, 640, 128, 256]
    assert behave(lambda load: behaviours.order_by_priority(load, 1, 4)) == [1, 3, 5, 7, 9]
    assert behave(lambda load: behaviours.chunks(load, 1, 4_000), **roomy) == 2
    assert behave(lambda load: behaviours.chunks(load, 1, 1_500), **roomy) == 1
    before_s, after_s, left = behave(lambda load: behaviours.cancelled(load, 1, 8), **roomy)
    assert after_s < before_s
    assert left == pytest.approx(6 / 40), "five blocks each; the one that stays has gone on to its sixth"
    thrown_out, tokens = behave(lambda load: behaviours.preemptions(load, 1, 300, 300, 4))
    assert thrown_out > 0
    assert tokens == [300] * 4
    longer, together = behave(lambda load: behaviours.batched(load, 1, 8), **roomy)
    assert together
    assert 1.0 < longer < 2.5


# ---- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "control_plane.cli", "calibrate", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=50, env=child_environment())


async def test_the_command_writes_a_profile_that_is_one(tmp_path: Path) -> None:
    # of a server of which only limits are asserted: on a busy machine its times are anything
    server = SimEngine(engine(max_model_len_tokens=1_024, max_num_seqs=6, max_num_batched_tokens=512), model_name="known")
    await server.start()
    out = tmp_path / "found.yaml"
    arguments = ("--engine", server.url, "--out", str(out), "--quick", "--max-concurrency", "8", "--max-num-batched-tokens", "512")
    try:
        done = await asyncio.to_thread(command, *arguments)
    finally:
        await server.stop()
    assert done.returncode == 0, done.stderr + done.stdout
    assert "at most" in done.stdout
    assert "max_num_seqs 6 (measured)" in done.stdout
    found = profile(str(out))
    assert (found.name, found.max_num_seqs, found.max_num_batched_tokens) == (str(out), 6, 512)
    assert (found.block_size_tokens, found.kv_block_count, found.max_model_len_tokens) == (128, 4_096, 1_024)
    assert found.fitted is not None
    assert found.fitted.overhead_s > 0.0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--engine", "http://127.0.0.1:9", "--out", "p.yaml"), 1, "--engine http://HOST:PORT"),
        (("--engine", "http://127.0.0.1:9", "--out", "p.txt"), 2, "does not end in .yaml"),
        (("--engine", "http://127.0.0.1:9", "--out", "/nowhere/p.yaml"), 2, "there is no folder /nowhere"),
        (("--engine", "http://127.0.0.1:9", "--out", "p.yaml", "--base", "h100-lama3-8b"), 2, "did you mean 'h100-llama3-8b'"),
        (("--engine", "nonsense", "--out", "p.yaml"), 2, "nonsense"),
        (("--engine", "http://127.0.0.1:9", "--out", "p.yaml", "--rounds", "0"), 2, "a whole number from 1"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(arguments: tuple[str, ...], status: int, said: str) -> None:
    done = command(*arguments)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_profile_that_cannot_be_written_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    done = command("--engine", "http://127.0.0.1:9", "--out", str(folder))
    assert done.returncode == 1
    assert f"Is a directory: '{folder}'" in done.stderr
    assert "127.0.0.1" not in done.stderr


def test_a_profile_holds_the_points_it_comes_from(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from control_plane.calibration.report import profile_of

    found, _, _ = measure(engine(), options=Options(seed=1, rounds=1, quick=True))
    written = profile_of(
        "mine", None, found.served, found.limits, found.fitted, found.readings, url="http://x", at=datetime(2026, 1, 1, tzinfo=UTC), seed=1
    )
    assert isinstance(written, ProfileFile)
    path = tmp_path / "mine.yaml"
    written.write(path)
    assert profile(str(path)).fitted == found.fitted.step
    assert len(written.measured["points"]) == len(found.fitted.rows)
    assert written.measured["beside_steps"]["request_s"] == pytest.approx(0.004, rel=0.02)
    assert profile(str(path)).request_s == pytest.approx(0.004, rel=0.02)
    assert profile(str(path)).prompt_token_s == pytest.approx(2e-6, rel=0.02)


def test_the_simulator_charges_what_a_request_costs_beside_the_steps(tmp_path: Path) -> None:
    from control_plane.simulator.fleet_spec import parse_fleet
    from control_plane.simulator.run import simulate
    from control_plane.simulator.scenario import Arm, Scenario
    from control_plane.simulator.workload import TraceRequest, Workload

    path = tmp_path / "server.yaml"
    given = Workload("one", [TraceRequest(0.0, 1_000, 4)])

    def ttft_ms(row: int = 0, **costs: float) -> float:
        ProfileFile("server", base="h100-llama3-8b", step_time=STEP, **costs).write(path)
        return simulate(Scenario(parse_fleet(f"1x{path}"), given, jitter=0.0), Arm()).outcomes.ttft_ms(row)

    assert ttft_ms(request_s=0.004, prompt_token_s=2e-6) - ttft_ms() == pytest.approx(6.0, abs=0.01)
    given = Workload("two at once", [TraceRequest(0.0, 10, 1), TraceRequest(0.0, 10, 1)])
    later = ttft_ms(1, request_s=0.1, request_serial_s=0.05)
    assert later - ttft_ms(0, request_s=0.1, request_serial_s=0.05) == pytest.approx(50.0, abs=0.01)
    path.write_text(path.read_text().replace("request_s: 0.1", "request_s: soon"))
    with pytest.raises(InvalidRequest, match="request_s 'soon' is not a number of seconds"):
        profile(str(path))

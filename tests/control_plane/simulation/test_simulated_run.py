"""One run of the real manager over engines that are models: it repeats exactly, loses nothing, and stops where nobody can go on."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from control_plane.errors import InvalidRequest
from control_plane.policies import POLICIES
from control_plane.router import ROUTERS, RoutingStrategy
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.loop import Deadlock
from control_plane.simulator.outcome import COMPLETED, FAILED, LIVE, REJECTED, UNSENT, RunResult
from control_plane.simulator.rows import curves_of, row_of
from control_plane.simulator.run import BEGIN_S, Simulation, simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import parse_slo
from control_plane.simulator.workload import TraceRequest, Workload

FLEET = "3xh100-llama3-8b"


def workload(count: int = 200, rate_rps: float = 40.0, *, seed: int = 0, sessions: int = 0) -> Workload:
    rng = Random(seed)
    at_s, requests = 0.0, []
    for number in range(count):
        at_s += rng.expovariate(rate_rps)
        prompt = rng.randrange(50, 3000)
        session = rng.randrange(sessions) if sessions else 0
        blocks = tuple(session * 100 + place for place in range(-(-prompt // 512))) if sessions else ()
        requests.append(TraceRequest(at_s, prompt, rng.randrange(1, 300), blocks, tenant=f"t{number % 3}"))
    return Workload("by hand", requests)


def run(arm: Arm | None = None, given: Workload | None = None, fleet: str = FLEET, **options: Any) -> RunResult:
    return simulate(Scenario(parse_fleet(fleet), given or workload(), **options), arm or Arm())


def test_every_request_ends_with_the_tokens_that_it_asked_for() -> None:
    given = workload()
    result = run(given=given)
    out = result.outcomes
    assert set(out.state) == {COMPLETED}
    assert list(out.output_tokens) == [request.output_tokens for request in given.requests]
    assert list(out.prompt_tokens) == [request.prompt_tokens for request in given.requests]
    for row, request in enumerate(given.requests):
        assert out.arrival_s[row] == BEGIN_S + request.arrival_s
        assert out.arrival_s[row] < out.first_s[row] <= out.end_s[row]
        assert (out.first_s[row] < out.end_s[row]) == (request.output_tokens > 1)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_runs_and_repeats(policy: str) -> None:
    first, second = (run(Arm(policy, "load_balanced"), workload(120, 120.0)) for _ in range(2))
    assert first.event_digest == second.event_digest
    assert set(first.outcomes.state) == {COMPLETED}


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_runs_and_repeats(router: str) -> None:
    given = workload(120, 60.0, sessions=8)
    first, second = (run(Arm("fifo", router), given) for _ in range(2))
    assert first.event_digest == second.event_digest
    assert set(first.outcomes.state) == {COMPLETED}


def test_the_seed_decides() -> None:
    assert run(seed=1).event_digest != run(seed=2).event_digest


def test_the_event_log_is_what_the_digest_is_of() -> None:
    import hashlib

    written = io.StringIO()
    result = simulate(Scenario(parse_fleet(FLEET), workload(20)), Arm(), events=written)
    text = written.getvalue()
    assert hashlib.blake2b(text.encode(), digest_size=16).hexdigest() == result.event_digest
    lines = text.splitlines()
    assert len(lines) == result.events == 20 * 4
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)
    assert {line.split()[1] for line in lines} == {"arrive", "place", "first", "end"}


PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from test_simulated_run import FLEET, run, workload
from control_plane.simulator.scenario import Arm
for policy, router in (("adaptive", "load_balanced"), ("priority", "locality"), ("slo_aware", "affinity"), ("fifo", "random")):
    print(run(Arm(policy, router), workload(150, 120.0, sessions=6), seed=7).event_digest)
"""


def test_the_same_digest_in_other_processes_whatever_their_hash_seed_compiled_or_not() -> None:
    program = PROGRAM.format(here=os.path.dirname(__file__))
    printed = []
    for changes in ({"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "4711", "CONTROL_PLANE_PURE": "1"}):
        environment = {**os.environ, **changes}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, timeout=120)
        printed.append(done.stdout)
    assert printed[0].count("\n") == 4
    assert len(set(printed)) == 1


def test_prefixes_are_found_again_where_they_were_computed() -> None:
    result = run(Arm("fifo", "locality"), workload(300, 20.0, sessions=5))
    shared = row_of(result, 1.0)["prefix_hit_rate"]
    spread = row_of(run(Arm("fifo", "locality"), workload(300, 20.0)), 1.0)["prefix_hit_rate"]
    assert shared > 0.6
    assert spread == 0.0
    off = run(Arm("fifo", "locality"), workload(300, 20.0, sessions=5), prefix_caching=False)
    assert sum(off.outcomes.cached_tokens) == 0


@pytest.mark.parametrize(("trace_tokens", "engine_tokens"), [(64, 16), (64, 128), (48, 128), (512, 48), (16, 16), (100, 16)])
def test_prefixes_are_found_whatever_the_sizes_of_blocks(trace_tokens: int, engine_tokens: int, tmp_path: Path) -> None:
    """A session of three turns of 960, 1,920 and 2,880 tokens, and beside it one that shares its first 480 tokens with it."""
    engine = tmp_path / "engine.yaml"
    engine.write_text(f"version: 1\nname: e\nbase: h100-llama3-8b\nblock_size_tokens: {engine_tokens}\nkv_block_count: 4000\n")
    shared = 480 // trace_tokens
    requests = []
    for turn, tokens in enumerate((960, 1_920, 2_880)):
        requests.append(TraceRequest(10.0 * turn, tokens, 1, tuple(range(tokens // trace_tokens))))
    other = [number if number < shared else 1_000 + number for number in range(960 // trace_tokens)]
    requests.append(TraceRequest(40.0, 960, 1, tuple(other)))
    given = Workload("turns", requests, block_tokens=trace_tokens)
    out = run(given=given, fleet=f"1x{engine}").outcomes
    step = max(trace_tokens, engine_tokens) * 2
    for row, tokens in enumerate((0, 960, 1_920, shared * trace_tokens)):
        assert tokens - step < out.cached_tokens[row] <= tokens
        assert out.cached_tokens[row] % engine_tokens == 0


def test_only_what_arrives_in_the_window_is_judged() -> None:
    result = run(given=workload(400, 20.0), warmup_s=5.0, duration_s=10.0)
    judged = list(result.judged())
    assert judged
    assert all(BEGIN_S + 5 <= result.outcomes.arrival_s[row] < BEGIN_S + 15 for row in judged)
    assert all(result.outcomes.state[row] == COMPLETED for row in judged)
    assert UNSENT in result.outcomes.state  # the run ends when the judged ones have ended
    row = row_of(result, 1.0)
    assert row["requests"] == len(judged)
    assert row["rate_rps"] == len(judged) / 10.0


def test_turns_of_a_session_wait_for_the_answer_before_them() -> None:
    turns = [TraceRequest(0.0, 100, 50, session_id="s", think_s=None if turn == 0 else 2.0) for turn in range(4)]
    out = run(given=Workload("turns", turns)).outcomes
    for turn in range(1, 4):
        assert out.arrival_s[turn] == pytest.approx(out.end_s[turn - 1] + 2.0)


def test_a_turn_does_not_come_before_its_time() -> None:
    turns = [TraceRequest(0.0, 100, 5, session_id="s"), TraceRequest(100.0, 100, 5, session_id="s", think_s=1.0)]
    assert run(given=Workload("turns", turns)).outcomes.arrival_s[1] == BEGIN_S + 100.0


def test_a_request_that_no_engine_can_hold_fails_and_the_rest_goes_on() -> None:
    requests = [TraceRequest(0.0, 100_000, 10), TraceRequest(0.1, 100, 10)]
    result = run(given=Workload("long", requests))
    assert list(result.outcomes.state) == [FAILED, COMPLETED]


def test_a_full_queue_refuses() -> None:
    requests = [TraceRequest(0.0, 1000, 200) for _ in range(400)]
    arm = Arm(options={"queue_max_requests": 10})
    given = Scenario(parse_fleet("1xh100-llama3-8b"), Workload("burst", requests))
    simulation = Simulation(given, arm)
    simulation.manager.get_instances()[0].max_concurrent_requests = 5
    result = simulation.run()
    assert result.codes == {"queue_full": 385}
    assert list(result.outcomes.state).count(REJECTED) == 385
    row = row_of(result, 1.0)
    assert (row["completed"], row["rejected"], row["failed"]) == (15, 385, 0)
    assert row["slo_attainment"] <= 15 / 400


def test_requests_survive_an_engine_that_dies_and_it_serves_again_when_it_is_back() -> None:
    simulation = Simulation(Scenario(parse_fleet(FLEET), workload(600, 30.0)), Arm())
    dies = simulation.engines[1]
    simulation.loop.wake_at(5.0, dies.crash)
    simulation.loop.wake_at(9.0, dies.recover)
    out = simulation.run().outcomes
    assert LIVE not in out.state
    # what had begun to answer there is lost, as it is with a real engine; everything else is run elsewhere
    failed = [row for row in range(600) if out.state[row] == FAILED]
    assert all(out.first_s[row] and out.first_s[row] <= 5.0 for row in failed)
    on_it = [row for row in range(600) if out.instance[row] == 1 and out.state[row] == COMPLETED]
    assert any(out.end_s[row] < 5.0 for row in on_it)
    assert any(out.arrival_s[row] > 9.0 for row in on_it)
    assert not any(5.0 <= out.end_s[row] <= 9.0 for row in on_it)


class Undecided(RoutingStrategy):
    """A router of somebody's own that waits for what never comes."""

    async def select_instance(self, request: Any, available_instances: Any, phase: str | None = None) -> Any:
        await asyncio.Event().wait()


def test_when_nobody_can_go_on_the_run_ends_and_says_who_waits_for_what() -> None:
    with pytest.raises(Deadlock) as raised:
        run(Arm("fifo", Undecided()), workload(5))
    told = str(raised.value)
    assert "5 requests are live, every engine is idle" in told
    assert "policy fifo, router Undecided" in told
    assert "with room: e000, e001, e002" in told
    assert "asyncio/locks.py" in told  # the event that it waits for
    assert "a future that nobody has resolved" in told


def test_roles_of_a_fleet_reach_the_instances() -> None:
    fleet = parse_fleet("2xh100-llama3-8b:prefilling,3xh200-llama3-8b:decoding")
    assert [str(instance.instance_type) for instance, _ in fleet.instances()] == ["prefilling"] * 2 + ["decoding"] * 3
    assert fleet.instance_count == 5
    assert fleet.price_per_hour_usd == pytest.approx(2 * 2.69 + 3 * 3.59)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100-llama3-8b", "COUNTxPROFILE"),
        ("0xh100-llama3-8b", "0 engines"),
        ("2xh100-llama9-8b", "did you mean 'h100-llama3-8b'"),
        ("2xh100-llama3-8b:reading", "'reading' is not one of"),
        ("2xh100-llama3-8b,2xh100-qwen3-8b", "mixes models"),
        ("", "COUNTxPROFILE"),
    ],
)
def test_a_fleet_that_cannot_be_read_is_told(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_fleet(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no class"),
        ("a", "is not CLASS="),
        ("a=ttft:-1", "not a number above 0"),
        ("a=ttft:x", "not a number above 0"),
        ("a=speed:1", "is not one of ttft"),
        ("a=ttft:1;a=ttft:2", "twice"),
        ("a=ttft:1,share:0", "all shares are 0"),
    ],
)
def test_targets_that_cannot_be_read_are_told(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_slo(text)


def test_classes_are_drawn_by_their_shares_and_sessions_keep_theirs() -> None:
    slo = parse_slo("quick=ttft:100,tpot:20,share:0.75;slow=e2e:60000,share:0.25,priority:low")
    requests = [TraceRequest(float(n), 10, 10, session_id=f"s{n // 4}") for n in range(4000)]
    classes = slo.assign(requests, Random(3))
    for n in range(0, 4000, 4):
        assert len({one.name for one in classes[n : n + 4]}) == 1
    share = sum(one.name == "quick" for one in classes) / 4000
    assert 0.7 < share < 0.8
    named = slo.assign([TraceRequest(0.0, 1, 1, slo_class="slow")], Random(0))
    assert named[0].e2e_ms == 60000
    with pytest.raises(InvalidRequest, match="'batch'"):
        slo.assign([TraceRequest(0.0, 1, 1, slo_class="batch")], Random(0))


def test_a_request_that_brought_targets_is_judged_by_those_alone() -> None:
    slo = parse_slo("quick=ttft:1,tpot:1,priority:high;slow=e2e:60000,share:0")
    brought = [
        TraceRequest(0.0, 1, 1, ttft_slo_ms=500.0),
        TraceRequest(0.0, 1, 1, slo_class="quick", tpot_slo_ms=40.0, slo_deadline_ms=9000.0),
        TraceRequest(0.0, 1, 1, slo_class="nowhere else", slo_deadline_ms=9000.0),
        TraceRequest(0.0, 1, 1),
    ]
    classes = slo.assign(brought, Random(0))
    assert [(one.name, one.ttft_ms, one.tpot_ms, one.e2e_ms) for one in classes] == [
        ("recorded", 500.0, None, None),
        ("quick", None, 40.0, 9000.0),
        ("nowhere else", None, None, 9000.0),
        ("quick", 1.0, 1.0, None),
    ]
    assert [one.priority.name for one in classes] == ["NORMAL", "HIGH", "NORMAL", "HIGH"]
    met = row_of(run(given=Workload("brought", brought), slo=slo), 1.0)
    assert met["slo_attainment_by_class"] == {"nowhere else": 1.0, "quick": 0.5, "recorded": 1.0}


def test_the_control_plane_is_told_what_a_request_asked_for() -> None:
    given = Workload("late", [TraceRequest(0.0, 1000, 500, slo_deadline_ms=10.0)])
    told: list[float | None] = []

    class Listening:
        """In the place of a compiled class, whose methods cannot be replaced one by one."""

        def __init__(self, lifecycle: Any) -> None:
            self.lifecycle = lifecycle

        def accept(self, request: Any, *rest: Any, **more: Any) -> Any:
            told.append(request.slo_deadline_ms)
            return self.lifecycle.accept(request, *rest, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.lifecycle, name)

    simulation = Simulation(Scenario(parse_fleet(FLEET), given), Arm("fifo", "random"))
    simulation.manager.lifecycle = Listening(simulation.manager.lifecycle)  # type: ignore[assignment]
    simulation.run()
    assert told == [10.0]


def test_the_row_is_counted_from_the_outcomes() -> None:
    slo = parse_slo("quick=ttft:60,tpot:10")
    result = run(given=workload(300, 60.0), slo=slo, delay_s=0.0)
    out, row = result.outcomes, row_of(result, "60rps")
    met = [n for n in range(300) if out.ttft_ms(n) <= 60 and out.tpot_ms(n) <= 10]
    assert 0 < len(met) < 300
    assert row["slo_attainment"] == len(met) / 300
    assert row["slo_attainment_by_class"] == {"quick": len(met) / 300}
    assert row["goodput_rps"] == pytest.approx(len(met) / result.window_length_s)
    times = sorted(out.ttft_ms(n) for n in range(300))
    assert times[149] <= row["ttft_ms"]["p50"] <= times[150]
    assert row["ttft_ms"]["p50"] <= row["ttft_ms"]["p90"] <= row["ttft_ms"]["p99"]
    assert row["event_digest"] == result.event_digest
    by_tenant = [sum(n in set(met) for n in range(t, 300, 3)) / 100 for t in range(3)]
    assert row["fairness_jain"] == pytest.approx(sum(by_tenant) ** 2 / (3 * sum(x * x for x in by_tenant)))
    assert row["cost_usd"] == pytest.approx(3 * 2.69 * result.window_length_s / 3600)


def test_the_curves_agree_with_the_row() -> None:
    result = run(given=workload(300, 60.0))
    row, curves = row_of(result, 1.0), curves_of(result)
    assert curves["window_s"] == [0.0, result.window_s[1] - BEGIN_S]
    assert curves["cdf"]["ttft"][50] == row["ttft_ms"]["p50"]
    assert curves["cdf"]["e2e"][99] == row["e2e_ms"]["p99"]
    assert sum(curves["placement"]["requests"]) == 300
    assert sum(map(sum, curves["placement"]["by_class"].values())) == 300
    assert len(curves["timeline"]["running"]) == 3
    assert len(curves["timeline"]["running"][0]) == len(curves["timeline"]["at_s"])


@pytest.mark.parametrize("block_tokens", [512, 500], ids=["whole blocks of the engine", "no whole blocks of the engine"])
def test_told_of_blocks_the_index_expects_what_the_engines_find(block_tokens: int) -> None:
    errors = {}
    for told in (True, False):
        given = replace(workload(300, 4.0, sessions=12), block_tokens=block_tokens)
        scenario = Scenario(parse_fleet("2xh100-llama3-8b"), given, kv_events=told, seed=3)
        simulation = Simulation(scenario, Arm("fifo", "locality"))
        simulation.run()
        report = simulation.manager.get_prefix_report()
        kind = 0 if told else 2
        errors[told] = report.errors[kind]
        assert report.fed == (2 if told else 0)
        assert report.requests[kind] >= 250
    assert errors[True].cached_tokens > 0
    assert errors[True].over_tokens == 0, "what an engine tells of is there"
    assert errors[True].under_tokens <= 0.1 * errors[True].cached_tokens, "only what ends within a piece, and answers"

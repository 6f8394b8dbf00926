"""The comparison: paired arrivals, intervals, capacity found once, results kept and taken up, its files and its messages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control_plane.errors import ControlPlaneError, InvalidRequest
from control_plane.simulator import capacity as capacities
from control_plane.simulator import compare as comparing
from control_plane.simulator.capacity import capacity_rps
from control_plane.simulator.compare import Comparison, base_of, document_of, prepare, run_all
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Row
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import parse_slo
from control_plane.simulator.stats import METRICS, interval, is_clear, summarise
from control_plane.simulator.workload import TraceRequest, Workload

TRACE = "poisson:rate_rps=2,duration_s=120"
SMALL = Comparison(
    TRACE,
    "2xh100-llama3-8b",
    scheduling_policies=("fifo",),
    routing_strategies=("load_balanced", "random"),
    rates=("2rps", "6rps"),
    seeds=2,
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 20 s instead of 300: what is looked at here is not how much they say."""
    monkeypatch.setattr(comparing, "LEAST_S", 20.0)
    monkeypatch.setattr(comparing, "LEAST_E2E", 0.1)
    monkeypatch.setattr(comparing, "TAIL_S", 5.0)


def small(**changes: Any) -> Comparison:
    return replace(SMALL, warmup_s=5.0, **changes)


def compared(comparison: Comparison, **options: Any) -> dict[str, Any]:
    plan = prepare(comparison)
    return document_of(plan, run_all(plan, processes=1, **options), ["control-plane", "compare"])


def test_every_arm_runs_at_every_rate_with_every_seed_on_the_same_arrivals() -> None:
    document = compared(small())
    rows = document["runs"]
    assert [(row["routing_strategy"], row["rate"], row["seed"]) for row in rows] == [
        (router, rate, seed) for seed in (0, 1) for rate in ("2rps", "6rps") for router in ("load_balanced", "random")
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["requests"] == second["requests"]
        assert first["rate_rps"] == second["rate_rps"]
        assert first["event_digest"] != second["event_digest"]
    assert set(rows[0]) == set(Row.__annotations__)
    assert document["version"] == 1
    assert document["simulated"] is True
    json.dumps(document)


def test_the_rate_is_what_was_asked_for() -> None:
    for row in compared(small(rates=("20rps",), seeds=1))["runs"]:
        assert row["rate_rps"] == pytest.approx(20.0, rel=0.05)


def test_a_rate_without_a_unit_is_a_share_of_the_capacity() -> None:
    rows = compared(small(rates=("0.5",), seeds=1, capacity_rps=40.0))["runs"]
    assert [row["rate"] for row in rows] == [0.5, 0.5]
    assert rows[0]["rate_rps"] == pytest.approx(20.0, rel=0.2)


def test_halves_of_a_trace_are_all_of_it() -> None:
    whole, first, second = (base_of(small(half=half))[0].workload for half in (0, 1, 2))
    lengths = [(request.prompt_tokens, request.output_tokens) for request in whole.requests]
    assert [(one.prompt_tokens, one.output_tokens) for half in (first, second) for one in half.requests] == lengths
    assert 0 < len(first.requests) < len(whole.requests)
    assert second.requests[0].arrival_s < first.requests[-1].arrival_s


def test_arms_of_ones_own_stand_beside_the_pairs_under_their_names() -> None:
    mine = Arm("fifo", "random", {"dispatch_window": 1}, named="mine")
    rows = compared(small(rates=("6rps",), seeds=1, more_arms=(mine,)))["runs"]
    assert [row["routing_strategy"] for row in rows] == ["load_balanced", "random", "mine"]
    assert len({row["requests"] for row in rows}) == 1


def test_the_capacity_is_that_of_the_arm_named_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def found(base: Scenario, *, arm: Arm, **others: Any) -> float:
        asked.append(arm.label)
        return 6.0

    monkeypatch.setattr(comparing, "capacity_rps", found)
    prepare(small(rates=("0.5",), seeds=1, capacity_arm=("fifo", "random")))
    assert asked == ["fifo+random"]


def test_rows_of_shared_beginnings_tell_what_one_cache_would_find() -> None:
    rows = compared(small(trace="sessions:rate_rps=2,duration_s=120", rates=("4rps",), seeds=2))["runs"]
    assert all(0.3 < row["lru_hit_rate"] < 1.0 for row in rows)
    assert [row["lru_hit_rate"] for row in rows[::2]] == [row["lru_hit_rate"] for row in rows[1::2]]
    assert rows[0]["lru_hit_rate"] != rows[2]["lru_hit_rate"]


def test_the_same_comparison_gives_the_same_digests_in_one_process_and_in_two() -> None:
    plan = prepare(small())
    here = [row["event_digest"] for _, row, _ in run_all(plan, processes=1)]
    there = [row["event_digest"] for _, row, _ in run_all(plan, processes=2)]
    assert here == there


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    store = tmp_path / "results.jsonl"

    def open_store() -> ResultFile:
        return ResultFile(store, {"trace": TRACE, "seeds": 2})

    class Stopped(Exception):
        """As by Ctrl-C."""

    ran: list[str] = []

    def stop_at_three(job: comparing.Job, row: Row) -> None:
        ran.append(job.key)
        if len(ran) == 3:
            raise Stopped

    kept = open_store()
    plan = prepare(small(), results=kept)
    with pytest.raises(Stopped):
        run_all(plan, processes=1, kept=kept, on_row=stop_at_three)
    with store.open("a") as file:
        file.write('{"key": "cut off in the mid')  # the machine went down in the middle of a line

    kept = open_store()
    assert len(kept.results) == 3
    before = {key: row["event_digest"] for key, (row, _) in kept.results.items()}
    again: list[str] = []
    results = run_all(prepare(small(), results=kept), processes=1, kept=kept, on_row=lambda job, row: again.append(job.key))
    assert len(results) == 8
    assert sorted(again) == sorted(job.key for job in plan.jobs)
    assert all(row["event_digest"] == before[job.key] for job, row, _ in results if job.key in before)
    assert len(open_store().results) == 8
    assert len(store.read_text().splitlines()) == 1 + 8 + 1  # the torn line stays, and does no harm


def test_the_file_of_another_comparison_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "results.jsonl"
    ResultFile(store, {"trace": "a", "seeds": 2}).begin(10.0, 300.0, "")
    with pytest.raises(InvalidRequest, match="begun with seeds 2, and this is 3"):
        ResultFile(store, {"trace": "a", "seeds": 3})


@pytest.mark.parametrize(
    "content", [b"hello\n", b"\xff\xfe\x00\n", b"\xff", b'{"comparison": 5}\n', b'{"comparison": {"trace": "a"}}\n', b"[]\n", b"{}", b"\n"]
)
def test_what_is_no_file_of_a_comparison_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    store = tmp_path / "other"
    store.write_bytes(content)
    with pytest.raises(InvalidRequest, match="not the file of a comparison"):
        ResultFile(store, {"trace": "a"})
    assert store.read_bytes() == content


@pytest.mark.parametrize("content", ['{"compar', '{"comparison": {"trace": "poi'])
def test_one_that_was_cut_off_in_its_head_begins_anew(content: str, tmp_path: Path) -> None:
    store = tmp_path / "results"
    store.write_text(content)
    kept = ResultFile(store, {"trace": "a"})
    assert not kept.begun
    kept.begin(10.0, 300.0, "inputs")
    assert ResultFile(store, {"trace": "a"}).begun


def test_kept_results_that_are_none_are_run_again(tmp_path: Path) -> None:
    store = tmp_path / "results"
    kept = ResultFile(store, {"trace": "a"})
    kept.begin(10.0, 300.0, "")
    with store.open("a") as file:
        file.write('{"key": "k", "row": 5, "curves": {}}\n{"key": "l", "row": {}, "curves": {"cdf": 1}}\n{"key": [], "row": {}}\n7\n')
    assert ResultFile(store, {"trace": "a"}).results == {}


def test_a_trace_that_has_become_another_is_not_taken_up(tmp_path: Path) -> None:
    trace, store = tmp_path / "trace.csv", tmp_path / "results"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{n},100,20\n" for n in range(60)))
    asked = small(trace=str(trace), seeds=1)
    prepare(asked, results=ResultFile(store, {}))
    assert prepare(asked, results=ResultFile(store, {})).jobs
    with trace.open("a") as file:
        file.write("60,100,20\n")
    with pytest.raises(InvalidRequest, match="when the trace or a profile of the fleet was another"):
        prepare(asked, results=ResultFile(store, {}))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_trace_is_read_once(processes: int, tmp_path: Path) -> None:
    """It may be a pipe, or a recording that grows."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{n},100,20\n" for n in range(60)))
    plan = prepare(small(trace=str(trace), seeds=1))
    trace.unlink()
    assert len(run_all(plan, processes=processes)) == 4


def test_capacity_and_duration_are_those_that_it_was_begun_with(tmp_path: Path) -> None:
    kept = ResultFile(tmp_path / "results", {"trace": TRACE})
    plan = prepare(small(rates=("2.0",), capacity_rps=1.0))
    kept.begin(12.5, 33.0, plan.base.digest())
    plan = prepare(small(rates=("2.0",)), results=ResultFile(tmp_path / "results", {"trace": TRACE}))
    assert (plan.capacity_rps, plan.duration_s) == (12.5, 33.0)
    assert {job.rate_rps for job in plan.jobs} == {25.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trace": "azure_convo"}, "azure_conv"),
        ({"fleet": "8xh100-llama3-9b"}, "did you mean"),
        ({"rates": ("fast",)}, "neither a share"),
        ({"rates": ("-1",)}, "neither a share"),
        ({"rates": ("nan",)}, "neither a share"),
        ({"rates": ("2rps", "2.0rps")}, "'2.0rps' is given twice"),
        ({"rates": ("0.5", "1rps", "0.50"), "capacity_rps": 9.0}, "'0.50' is given twice"),
        ({"scheduling_policies": ("fifi",)}, "fifo"),
        ({"routing_strategies": ("no.such:Thing",)}, "no.such"),
        ({"slo": "a=ttft:x"}, "not a number above 0"),
        ({"duration_s": 10.0}, "below 20"),
        ({"seeds": 0}, "seeds 0"),
        ({"seeds": 1000, "rates": tuple(f"{rate}rps" for rate in range(1, 101))}, "over 100000"),
        ({"engine_scheduling": "lifo"}, "fcfs, priority"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_runs(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ControlPlaneError, match=says):
        prepare(small(**changes))


def test_requests_that_no_engine_holds_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{n},{100 if n % 4 else 50000},20\n" for n in range(60)))
    plan = prepare(small(trace=str(trace)))
    assert (plan.left_out, len(plan.base.workload.requests)) == (15, 45)
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,50000,20\n1,50000,20\n")
    with pytest.raises(InvalidRequest, match="no request of"):
        prepare(small(trace=str(trace)))


def test_capacity_is_where_the_fleet_stops_keeping_up_and_is_found_once(tmp_path: Path) -> None:
    scenario = Scenario(parse_fleet("1xl40s-llama3-8b"), workload_of("azure_conv", seed=0))
    store, told = tmp_path / "kept" / "capacity.json", list[str]()
    found = capacity_rps(scenario, told=told.append, kept=store, probe_s=60.0)
    assert len(told) > 2
    two = capacity_rps(replace(scenario, fleet=parse_fleet("2xl40s-llama3-8b")), probe_s=60.0)
    assert two == pytest.approx(2 * found, rel=0.15)
    told.clear()
    assert capacity_rps(scenario, told=told.append, kept=store, probe_s=60.0) == found
    assert len(told) == 1
    assert "found before" in told[0]
    store.write_text("no json")
    assert capacity_rps(scenario, kept=store, probe_s=60.0) == found


def test_the_capacity_of_a_thin_trace_is_where_a_fleet_under_it_saturates() -> None:
    """Far above the trace's own rate, where a crowd at the end of the window would pass for a fleet that falls behind."""
    scenario = Scenario(parse_fleet("1xh100-llama3-8b"), workload_of("poisson:rate_rps=1,duration_s=300", seed=0))
    found = capacity_rps(scenario)

    def ttft_p99_ms(rate: float) -> float:
        asked = Comparison("poisson:rate_rps=1,duration_s=300", "1xh100-llama3-8b", rates=(f"{rate * found}rps",), seeds=1)
        return float(compared(replace(asked, duration_s=150.0))["runs"][0]["ttft_ms"]["p99"])

    assert ttft_p99_ms(0.6) < 1_000
    assert ttft_p99_ms(1.4) > 5_000


@pytest.mark.parametrize(
    "changes",
    [
        {"think_s": 3.0},
        {"session_id": "s"},
        {"slo_class": "batch"},
        {"priority": "low"},
        {"ttft_slo_ms": 100.0},
        {"block_ids": (1,)},
    ],
)
def test_a_kept_capacity_is_of_that_very_scenario(changes: dict[str, Any]) -> None:
    requests = [TraceRequest(float(n), 100, 10) for n in range(5)]
    scenario = Scenario(parse_fleet("1xh100-llama3-8b"), Workload("w", requests))
    same = Scenario(parse_fleet("1xh100-llama3-8b"), Workload("named otherwise", list(requests)))
    other = replace(scenario, workload=Workload("w", [*requests[:4], replace(requests[4], **changes)]))
    assert scenario.digest() == same.digest()
    assert scenario.digest() != other.digest()
    assert scenario.digest() != replace(scenario, workload=Workload("w", requests, block_tokens=64)).digest()
    assert scenario.digest() != replace(scenario, slo=parse_slo("a=ttft:1")).digest()


def test_a_fleet_that_keeps_up_with_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacities, "_keeps_up", lambda *given: False)
    scenario = Scenario(parse_fleet("1xh100-llama3-8b"), workload_of(TRACE, seed=0))
    with pytest.raises(InvalidRequest, match="keeps up with no rate"):
        capacity_rps(scenario)


def test_an_interval_is_students() -> None:
    # by hand: mean 3, deviation sqrt(2.5), t(4) = 2.776
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert found == {"mean": 3.0, "low": pytest.approx(3.0 - half), "high": pytest.approx(3.0 + half)}
    assert interval([7.0]) == {"mean": 7.0, "low": None, "high": None}


def row(router: str, seed: int, goodput_rps: float, rate: float = 1.0) -> Row:
    quantiles = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    found: dict[str, Any] = dict.fromkeys(Row.__annotations__, 0)
    found |= {"scheduling_policy": "fifo", "routing_strategy": router, "rate": rate, "seed": seed, "goodput_rps": goodput_rps}
    found |= {"ttft_ms": quantiles, "tpot_ms": quantiles, "e2e_ms": quantiles}
    return found  # type: ignore[return-value]


def test_pairing_finds_a_small_difference_under_large_swings() -> None:
    rows = [row(name, seed, 10.0 * seed + (0.5 if name == "b" else 0.0) + 0.01 * (seed % 2)) for seed in range(5) for name in ("a", "b")]
    first, second = summarise(rows)
    assert "against_first" not in first
    against = second["against_first"]["goodput_rps"]
    assert against["difference"] == pytest.approx(0.5)
    assert is_clear(against)
    # the intervals of the means themselves overlap by far
    assert second["goodput_rps"]["low"] < first["goodput_rps"]["high"]
    assert set(second["against_first"]) == set(METRICS)


def test_one_seed_is_never_clear() -> None:
    _, second = summarise([row("a", 0, 1.0), row("b", 0, 2.0)])
    assert second["against_first"]["goodput_rps"] == {"difference": 1.0, "low": None, "high": None}
    assert not is_clear(second["against_first"]["goodput_rps"])

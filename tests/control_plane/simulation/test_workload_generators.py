"""Generators: the rate, the spread and the sharing that their docstrings tell, the same from the same seed, and what is wrong is named."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.errors import InvalidRequest
from control_plane.simulator.generators import GENERATORS, arguments_of, workload_of
from control_plane.simulator.workload import TraceRequest, Workload
from control_plane.types import RequestPriority


def rate_of(spec: str, seeds: int = 6) -> float:
    return sum(workload_of(spec, seed=seed).rate_rps for seed in range(seeds)) / seeds


def gaps_of(workload: Workload) -> list[float]:
    return [b.arrival_s - a.arrival_s for a, b in pairwise(workload.requests)]


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / mean


def by_session(workload: Workload) -> dict[str, list[TraceRequest]]:
    found: dict[str, list[TraceRequest]] = {}
    for one in workload.requests:
        found.setdefault(one.session_id, []).append(one)
    return found


@pytest.mark.parametrize("name", GENERATORS)
@given(seed=st.integers(0, 2**40), duration_s=st.floats(20, 200), rate_rps=st.floats(0.5, 20))
@settings(max_examples=15)
def test_every_generator_makes_a_workload(name: str, seed: int, duration_s: float, rate_rps: float) -> None:
    spec = f"{name}:rate_rps={rate_rps},duration_s={duration_s}"
    try:
        workload = workload_of(spec, seed=seed)
    except InvalidRequest:
        assert rate_rps * duration_s < 100  # by chance none came
        return
    assert workload == workload_of(spec, seed=seed)
    assert workload.name == name
    assert workload.duration_s == duration_s
    assert f"seed {seed}" in workload.source
    last_s = 0.0
    for one in workload.requests:
        assert last_s <= one.arrival_s < duration_s
        last_s = one.arrival_s
        assert one.prompt_tokens >= 1 and one.output_tokens >= 1  # noqa: PT018
        assert len(one.block_ids) in (0, -(-(one.prompt_tokens + one.output_tokens) // workload.block_tokens))
        RequestPriority.parse(one.priority)
    for members in by_session(workload).values():
        if members[0].session_id:
            assert members[0].think_s is None
            assert all(b.think_s is not None and b.arrival_s - a.arrival_s == pytest.approx(b.think_s) for a, b in pairwise(members))


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_is_described_and_seeded(name: str) -> None:
    assert len(GENERATORS[name].__doc__ or "") > 200
    assert {"rate_rps", "duration_s"} <= set(arguments_of(name))
    assert workload_of(f"{name}:duration_s=100", seed=1).requests != workload_of(f"{name}:duration_s=100", seed=2).requests


@pytest.mark.parametrize("name", sorted({*GENERATORS} - {"greedy"}))
def test_the_rate_is_the_one_asked_for(name: str) -> None:
    assert rate_of(f"{name}:rate_rps=8,duration_s=1800{',period_s=600' if name == 'diurnal' else ''}") == pytest.approx(8, rel=0.06)


def test_gaps_are_exponential_or_burstier() -> None:
    assert variation(gaps_of(workload_of("poisson:duration_s=2000", seed=1))) == pytest.approx(1.0, abs=0.05)
    assert variation(gaps_of(workload_of("gamma:duration_s=4000,cv=4", seed=1))) == pytest.approx(4.0, rel=0.1)
    assert variation(gaps_of(workload_of("gamma:duration_s=2000,cv=0.25", seed=1))) == pytest.approx(0.25, rel=0.1)


def test_a_day_begins_at_night() -> None:
    counted = Counter(int(one.arrival_s // 900) for one in workload_of("diurnal:rate_rps=10,depth=0.9", seed=1).requests)
    night, morning, evening, late = (counted[quarter] for quarter in range(4))
    assert min(morning, evening) > 2.5 * max(night, late)


def test_a_conversation_repeats_all_before_it() -> None:
    workload = workload_of("sessions:rate_rps=5,turns=6,system_tokens=640", seed=1)
    system = workload.requests[-1].block_ids[:10]
    found = [members for members in by_session(workload).values() if len(members) > 1]
    assert sum(map(len, found)) > 1_000
    for members in found:
        for a, b in pairwise(members):
            assert b.prompt_tokens > a.prompt_tokens + a.output_tokens
            assert b.block_ids[: len(a.block_ids)] == a.block_ids
        assert members[0].block_ids[:10] == system
    owner: dict[int, str] = {}
    for one in workload.requests:
        for block in one.block_ids[10:]:
            assert owner.setdefault(block, one.session_id) == one.session_id


def test_agents_of_a_kind_share_their_system_prompt_and_pause_for_seconds() -> None:
    workload = workload_of("agents:rate_rps=20,kinds=3", seed=1)
    heads = {(one.tenant, one.block_ids[:20]) for one in workload.requests}
    assert len(heads) == 3
    counts = Counter(one.tenant for one in workload.requests)
    assert counts["agents0"] > counts["agents1"] > counts["agents2"]
    pauses = sorted(one.think_s for one in workload.requests if one.think_s is not None)
    assert pauses[len(pauses) // 2] == pytest.approx(2.0, rel=0.15)
    assert sorted(one.prompt_tokens for one in workload.requests)[0] > 3_000


def test_questions_share_their_document_and_nothing_else() -> None:
    workload = workload_of("documents", seed=1)
    for members in by_session(workload).values():
        shared = set.intersection(*(set(one.block_ids) for one in members))
        if len(members) > 1:
            assert len(shared) * 64 > 0.5 * min(one.prompt_tokens for one in members)
    assert sorted(one.prompt_tokens for one in workload.requests)[len(workload.requests) // 2] > 15_000


def test_tenants_have_deadlines_of_their_own() -> None:
    workload = workload_of("tenants:batch_share=0.25", seed=1)
    kinds = {(one.tenant, one.slo_class, one.priority) for one in workload.requests}
    assert kinds == {("chat", "interactive", "high"), ("search", "interactive", "normal"), ("reports", "batch", "low")}
    batch = sum(one.slo_class == "batch" for one in workload.requests)
    assert batch / len(workload.requests) == pytest.approx(0.25, abs=0.05)
    assert {one.slo_class for one in workload_of("tenants:batch_share=0", seed=1).requests} == {"interactive"}


def test_one_is_greedy_in_the_middle_third() -> None:
    workload = workload_of("greedy:rate_rps=18,duration_s=900,modest=8,factor=10", seed=1)
    middle = Counter(one.tenant for one in workload.requests if 300 <= one.arrival_s < 600)
    outside = Counter(one.tenant for one in workload.requests if not 300 <= one.arrival_s < 600)
    assert middle["greedy"] / middle["modest1"] == pytest.approx(10, rel=0.2)
    assert outside["greedy"] / outside["modest1"] == pytest.approx(1, rel=0.2)
    assert len(outside) == 9


@pytest.mark.parametrize(
    ("spec", "field", "told"),
    [
        ("poison:rate_rps=1", "trace", "did you mean poisson"),
        ("azure_cod", "trace", "did you mean azure_code"),
        ("nothing", "trace", "generators are"),
        ("zzz:a=1", "trace", "generators are"),
        ("poisson:rate=1", "rate", "did you mean rate_rps"),
        ("poisson:x=1", "x", "it takes rate_rps"),
        ("poisson:rate_rps=0", "rate_rps", "from 1e-06"),
        ("poisson:rate_rps=nan", "rate_rps", "'nan'"),
        ("poisson:rate_rps", "rate_rps", "''"),
        ("poisson:rate_rps=1,rate_rps=2", "rate_rps", "twice"),
        ("poisson:prompt_tokens=1.5", "prompt_tokens", "a whole number"),
        ("poisson:rate_rps=1e6,duration_s=1e8", "trace", "at most 20,000,000"),
        ("poisson:rate_rps=0.001", "trace", "less than one request"),
        ("missing/file.csv", "trace", "is no file"),
    ],
)
def test_what_is_wrong_is_named(spec: str, field: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        workload_of(spec, seed=0)
    assert told in str(caught.value)
    assert caught.value.param == field


def test_one_function_for_traces_files_and_generators(tmp_path: Path) -> None:
    path = tmp_path / "some:file"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    assert len(workload_of(str(path), seed=0).requests) == 1
    assert workload_of("azure_code", seed=0).name == "azure_code"
    assert workload_of("poisson", seed=0).name == "poisson"

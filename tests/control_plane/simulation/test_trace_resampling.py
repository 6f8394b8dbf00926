"""Another rate is another draw of whole sessions: gaps within them stay, prefixes are shared within a copy and between none."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from control_plane.errors import InvalidRequest
from control_plane.simulator.generators import workload_of
from control_plane.simulator.resample import at_rate, at_rate_in, piece, pieces, unroll
from control_plane.simulator.traces import load_trace
from control_plane.simulator.workload import TraceRequest, Workload

SYSTEM = (0, 1)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Sessions with growing chains behind a system prompt of two blocks, and lone requests with and without blocks. One at least is
    named: where none is, sessions are guessed."""
    found = []
    next_id = 2
    for number in range(draw(st.integers(1, 12))):
        at_s = draw(st.floats(0, 100))
        ids = SYSTEM
        lone = number > 0 and draw(st.booleans())
        for turn in range(1 if lone else draw(st.integers(1, 6))):
            ids = (*ids, next_id)
            next_id += 1
            session = "" if lone else f"chat{number}"
            blocks = () if lone and number % 2 else ids
            found.append(
                TraceRequest(at_s, 1000 * number + turn + 1, turn, blocks, session, f"tenant{number}", think_s=1.0 if turn else None)
            )
            at_s += draw(st.floats(0.1, 20))
    found.sort(key=lambda one: one.arrival_s)
    return Workload("made", found, 512, duration_s=found[-1].arrival_s + 1.0)


def copies_of(workload: Workload) -> dict[str, list[TraceRequest]]:
    found: dict[str, list[TraceRequest]] = {}
    for place, one in enumerate(workload.requests):
        found.setdefault(one.session_id or f"lone {place}", []).append(one)
    return found


@given(workload=workloads(), rate_rps=st.floats(0.05, 5), duration_s=st.floats(20, 400), seed=st.integers(0, 2**32))
@settings(max_examples=100)
def test_sessions_stay_whole_in_order_and_apart(workload: Workload, rate_rps: float, duration_s: float, seed: int) -> None:
    assume(round(rate_rps * duration_s) >= 1 and workload.requests[0].arrival_s < duration_s)
    drawn = at_rate(workload, rate_rps, duration_s, Random(seed))
    assert [one.arrival_s for one in drawn.requests] == sorted(one.arrival_s for one in drawn.requests)
    assert all(0 <= one.arrival_s < duration_s for one in drawn.requests)
    assert (drawn.duration_s, drawn.block_tokens) == (duration_s, workload.block_tokens)
    # the rate, as nearly as whole sessions allow
    largest = max(len(members) for members in copies_of(workload).values())
    assert abs(len(drawn.requests) - round(rate_rps * duration_s)) <= largest
    originals = {members[0].tenant: members for members in copies_of(workload).values()}
    holder: dict[int, str] = {}
    for name, members in copies_of(drawn).items():
        original = originals[members[0].tenant]
        # its first turns, with their lengths and the gaps between them
        assert [one.prompt_tokens for one in members] == [one.prompt_tokens for one in original[: len(members)]]
        assert [one.think_s for one in members] == [one.think_s for one in original[: len(members)]]
        for (a, b), (c, d) in zip(pairwise(members), pairwise(original), strict=False):
            assert b.arrival_s - a.arrival_s == pytest.approx(d.arrival_s - c.arrival_s, abs=1e-6)
        # only what comes after the end is missing
        if len(members) < len(original):
            offset_s = original[len(members)].arrival_s - original[0].arrival_s
            assert members[0].arrival_s + offset_s >= duration_s - 1e-6
        # prefixes are shared in it as they were, and with no other copy but for the system prompt
        assert [len(one.block_ids) for one in members] == [len(one.block_ids) for one in original[: len(members)]]
        for a, b in pairwise(members):
            assert b.block_ids[: len(a.block_ids)] == a.block_ids
        for one in members:
            for block in one.block_ids:
                if block not in SYSTEM:
                    assert holder.setdefault(block, name) == name
    alone = len(copies_of(workload)) == 1
    if not alone and sum(bool(members[0].block_ids) for members in copies_of(workload).values()) > 1:
        assert all(one.block_ids[:2] == SYSTEM for one in drawn.requests if one.block_ids)


def test_no_copy_loses_its_end_to_rounding() -> None:
    """Found by hypothesis: copies may begin within a few units of the last place only, and half of them rounded past the end."""
    times = (0.0, 1.0, 18.999999999999996)
    talk = [TraceRequest(at_s, 10, 1, (), "talk", think_s=1.0) for at_s in times]
    lone = [TraceRequest(0.0, 10, 1, (), "") for _ in range(3)]
    workload = Workload("made", sorted((*talk, *lone), key=lambda one: one.arrival_s), 512, duration_s=times[-1] + 1.0)
    for seed in range(20):
        assert abs(len(at_rate(workload, 3.0, 21.0, Random(seed)).requests) - 63) <= 1


@pytest.mark.parametrize("name", ["azure_code", "azure_conv", "mooncake_conversation"])
@pytest.mark.parametrize(("rate_rps", "duration_s"), [(0.5, 600), (3.0, 2400), (25.0, 300), (4.0, 9_000)])
def test_any_rate_for_any_time(name: str, rate_rps: float, duration_s: float) -> None:
    drawn = at_rate(load_trace(name), rate_rps, duration_s, Random(3))
    assert len(drawn.requests) == pytest.approx(rate_rps * duration_s, abs=2)
    assert f"{rate_rps:g} requests/s" in drawn.source


def minutes(workload: Workload) -> list[int]:
    counted = Counter(int(one.arrival_s // 120) for one in workload.requests)
    return [counted[minute] for minute in range(int(workload.duration_s // 120))]


def test_the_shape_of_the_load_is_kept() -> None:
    original = load_trace("azure_code")
    drawn = at_rate(original, 10 * original.rate_rps, original.duration_s, Random(1))
    for was, now in zip(minutes(original), minutes(drawn), strict=True):
        assert now == pytest.approx(10 * was, rel=0.15, abs=100)


@pytest.mark.parametrize("rate_rps", [0.2, 4.0])
def test_an_even_load_stays_even_from_beginning_to_end(rate_rps: float) -> None:
    original = Workload("even", [TraceRequest(10.0 * number, 10, 10) for number in range(60)], duration_s=600)
    counted = Counter(int(one.arrival_s // 60) for seed in range(40) for one in at_rate(original, rate_rps, 420.0, Random(seed)).requests)
    for minute in range(7):
        assert counted[minute] / 40 / 60 == pytest.approx(rate_rps, rel=0.2)


@pytest.mark.parametrize("name", ["azure_conv", "mooncake_conversation", "diurnal:rate_rps=5,duration_s=1200,period_s=1200"])
def test_the_rate_of_a_window_is_the_one_asked_for_although_the_trace_is_thinner_there(name: str) -> None:
    original = workload_of(name, seed=1)
    for seed in range(3):
        drawn = at_rate_in((60.0, 360.0), original, 20.0, 420.0, f"{seed}")
        came = sum(60.0 <= one.arrival_s < 360.0 for one in drawn.requests)
        assert came / 300.0 == pytest.approx(20.0, rel=0.04)
    assert at_rate_in((60.0, 360.0), original, 20.0, 420.0, "2").requests == drawn.requests


def test_a_window_in_which_nothing_comes_makes_no_flood() -> None:
    lull = Workload("lull", [TraceRequest(float(n), 1, 1) for n in (*range(50), *range(400, 450))], duration_s=450)
    drawn = at_rate_in((100.0, 300.0), lull, 1.0, 450.0, "s")
    assert len(drawn.requests) <= 4 * 450 + 1


def test_a_copy_keeps_what_its_original_asked_for() -> None:
    asked = TraceRequest(1.0, 10, 10, ttft_slo_ms=1.0, tpot_slo_ms=2.0, slo_deadline_ms=3.0)
    for one in at_rate(Workload("w", [asked], duration_s=2.0), 5, 10, Random(1)).requests:
        assert (one.ttft_slo_ms, one.tpot_slo_ms, one.slo_deadline_ms) == (1.0, 2.0, 3.0)


def test_bursts_grow_with_the_rate() -> None:
    original = workload_of("gamma:rate_rps=5,duration_s=2000,cv=4", seed=1)
    drawn = at_rate(original, 50, 2000, Random(1))

    def spread(workload: Workload) -> float:
        counted = Counter(int(one.arrival_s // 20) for one in workload.requests)
        counts = [counted[place] for place in range(100)]
        mean = sum(counts) / len(counts)
        return math.sqrt(sum((count - mean) ** 2 for count in counts) / len(counts)) / mean

    assert spread(drawn) == pytest.approx(spread(original), rel=0.3)


def test_round_after_round_has_ids_of_its_own() -> None:
    original = load_trace("mooncake_conversation")
    drawn = at_rate(original, original.rate_rps, 3 * original.duration_s, Random(1))
    rounds: dict[int, int] = {}
    for one in drawn.requests:
        for block in one.block_ids:
            rounds[block] = rounds.get(block, 0) + 1
    hits = sum(count - 1 for count in rounds.values()) / sum(rounds.values())
    # an ideal cache would hit nothing more than in the trace itself
    assert hits == pytest.approx(0.35, abs=0.02)


def test_a_seed_is_a_sample() -> None:
    original = load_trace("mooncake_conversation")
    one, same, other = (at_rate(original, 2, 300, Random(seed)) for seed in (1, 1, 2))
    assert one.requests == same.requests
    assert one.requests != other.requests


def test_a_million_requests_come_one_by_one() -> None:
    stream = unroll(load_trace("azure_conv"), 2_000, 500, Random(1))
    last_s, count = 0.0, 0
    for one in islice(stream, 50_000):
        assert one.arrival_s >= last_s
        last_s, count = one.arrival_s, count + 1
    assert count == 50_000


def test_the_workload_itself_is_left_as_it_was() -> None:
    requests = [TraceRequest(float(n), 600, 1, (0, n + 1)) for n in range(20)]
    workload = Workload("w", requests, duration_s=20)
    at_rate(workload, 1, 20, Random(1))
    assert all(not one.session_id for one in requests)


def test_sessions_are_found_where_a_workload_names_none() -> None:
    """40 users with the same system prompt, three turns each."""
    requests = [
        TraceRequest(float(10 * turn), 600, 1, (0, *range(3 * user + 1, 3 * user + 2 + turn))) for turn in range(3) for user in range(40)
    ]
    drawn = at_rate(Workload("w", requests, duration_s=30), 2, 30, Random(1))
    assert set(Counter(one.session_id for one in drawn.requests).values()) == {3}


@pytest.mark.parametrize(
    ("rate_rps", "duration_s", "field"),
    [
        (0, 10, "rate_rps"),
        (-1, 10, "rate_rps"),
        (math.nan, 10, "rate_rps"),
        (math.inf, 1, "rate_rps"),
        (1, 0, "duration_s"),
        (0.01, 10, "rate_rps"),
    ],
)
def test_rates_that_are_none(rate_rps: float, duration_s: float, field: str) -> None:
    workload = Workload("w", [TraceRequest(0.0, 1, 1), TraceRequest(1.0, 1, 1)])
    with pytest.raises(InvalidRequest) as caught:
        unroll(workload, rate_rps, duration_s, Random(1))
    assert caught.value.param == field


def test_what_comes_at_once_has_no_rate() -> None:
    with pytest.raises(InvalidRequest, match="at once"):
        at_rate(Workload("w", [TraceRequest(0.0, 1, 1)] * 3), 1, 10, Random(1))


def test_nothing_comes_in_that_time() -> None:
    with pytest.raises(InvalidRequest, match="comes at 20 s"):
        at_rate(Workload("w", [TraceRequest(20.0, 1, 1)]), 1, 10, Random(1))


def test_pieces() -> None:
    workload = Workload("w", [TraceRequest(float(at), 1, 1, (at,), "a", think_s=1.0 if at else None) for at in (0, 1, 5, 6, 25)])
    found = piece(workload, 5, 10)
    assert [(one.arrival_s, one.think_s, one.block_ids) for one in found.requests] == [(0.0, None, (5,)), (1.0, 1.0, (6,))]
    assert found.duration_s == 10
    assert [[one.arrival_s for one in part.requests] for part in pieces(workload, 5)] == [[0.0, 1.0], [0.0, 1.0], [0.0]]
    with pytest.raises(InvalidRequest, match="nothing"):
        piece(workload, 10, 5)
    with pytest.raises(InvalidRequest):
        pieces(workload, 0)


def test_the_hash_seed_changes_nothing() -> None:
    program = (
        "import hashlib; from random import Random; from control_plane.simulator.generators import GENERATORS, workload_of\n"
        "from control_plane.simulator.resample import at_rate; from control_plane.simulator.texts import prompt_head\n"
        "digest = hashlib.sha256()\n"
        "for name in (*GENERATORS, 'mooncake_conversation'):\n"
        "    for one in at_rate(workload_of(name, seed=5), 2, 200, Random(7)).requests:\n"
        "        digest.update(repr(one).encode() + prompt_head(one, 256))\n"
        "print(digest.hexdigest())"
    )

    def run(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    assert run("1") == run("2")

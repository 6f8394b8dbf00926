"""Traces: those of the package have the counts and lengths told, files are known by what is in them, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.errors import InvalidRequest
from control_plane.simulator.sessions import WIDE_CONTINUATIONS, name_sessions
from control_plane.simulator.traces import TRACES, load_trace, save_trace
from control_plane.simulator.workload import TraceRequest, Workload


def quantiles(values: list[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return tuple(ordered[int(share * (len(ordered) - 1) + 0.5)] for share in (0.5, 0.9, 0.99))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "count", "span_s", "prompts", "outputs"),
    [
        ("azure_code", 7_491, 2_393, (1_465, 5_177, 7_436), (13, 55, 249)),
        ("azure_conv", 14_453, 2_451, (1_015, 4_073, 4_121), (115, 421, 598)),
        ("mooncake_conversation", 8_125, 2_475, (7_184, 27_879, 89_869), (355, 605, 1_170)),
    ],
)
def test_the_traces_of_the_package_are_whole(
    name: str, count: int, span_s: int, prompts: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    workload = load_trace(name)
    assert (workload.name, len(workload.requests), round(workload.duration_s)) == (name, count, span_s)
    assert workload.rate_rps == pytest.approx(count / span_s, rel=1e-3)
    for found, told in ((quantiles([one.prompt_tokens for one in workload.requests]), prompts),):
        assert found == pytest.approx(told, rel=0.005)
    assert quantiles([one.output_tokens for one in workload.requests]) == pytest.approx(outputs, rel=0.02)
    assert [one.arrival_s for one in workload.requests] == sorted(one.arrival_s for one in workload.requests)
    assert "CC-BY" in workload.source or "Apache" in workload.source


def test_mooncakes_blocks_are_kept_and_make_sessions() -> None:
    workload = load_trace("mooncake_conversation")
    requests = workload.requests
    assert workload.block_tokens == 512
    assert all(len(one.block_ids) == -(-one.prompt_tokens // 512) for one in requests)
    assert requests[1].block_ids == (0, *range(14, 28))
    seen: set[int] = set()
    hits = 0
    for one in requests:
        hits += sum(block in seen for block in one.block_ids)
        seen.update(one.block_ids)
    assert hits / sum(len(one.block_ids) for one in requests) == pytest.approx(0.35, abs=0.01)
    # block 0 is everybody's system prompt and joins nobody; others that share a block are one session
    alone = sum(not one.session_id for one in requests)
    sessions = {one.session_id for one in requests if one.session_id}
    assert (alone, len(sessions)) == (3_572, 1_530)
    owner: dict[int, str] = {}
    for place, one in enumerate(requests):
        for block in one.block_ids[1:]:
            assert owner.setdefault(block, one.session_id or str(place)) == (one.session_id or str(place))


def test_the_package_tells_where_its_traces_come_from() -> None:
    import control_plane.simulator

    told = (Path(control_plane.simulator.__file__).parent / "data" / "SOURCES.md").read_text(encoding="utf-8")
    for carried in TRACES.values():
        assert f"`{carried.file}`" in told


CSV = "arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.25,200,20\n"
SAME = {
    "csv": CSV,
    "columns in another order, and more of them": "output_tokens,note,arrival_s,prompt_tokens\n10,x,0.5,100\n20,y,1.25,200\n",
    "unordered": "arrival_s,prompt_tokens,output_tokens\n1.25,200,20\n0.5,100,10\n",
    "windows": "﻿" + CSV.replace("\n", "\r\n"),
    "tabs and blank lines": CSV.replace(",", "\t").replace("\n", "\n\n"),
    "semicolons": CSV.replace(",", ";"),
    "quoted": 'arrival_s,prompt_tokens,output_tokens,note\n0.5,100,10,"a,b"\n"1.25","200",20,\n',
    "json lines": '{"arrival_s":0.5,"prompt_tokens":100,"output_tokens":10}\n{"arrival_s":1.25,"prompt_tokens":200,"output_tokens":20.0}\n',
    "mooncake": '{"timestamp":500,"input_length":100,"output_length":10,"hash_ids":[7]}\n'
    '{"timestamp":1250,"input_length":200,"output_length":20,"hash_ids":[7]}\n',
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", SAME)
def test_a_file_is_known_by_its_content(kind: str, packed: bool, tmp_path: Path) -> None:
    data = SAME[kind].encode()
    path = tmp_path / "no.suffix-that-tells"
    path.write_bytes(gzip.compress(data) if packed else data)
    workload = load_trace(path)
    assert [(one.arrival_s, one.prompt_tokens, one.output_tokens) for one in workload.requests] == [(0.5, 100, 10), (1.25, 200, 20)]
    assert str(path) in workload.source


def test_azures_own_header_and_its_times(tmp_path: Path) -> None:
    path = tmp_path / "AzureLLMInferenceTrace_code.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-16 18:18:04,110,27\n"
    )
    workload = load_trace(path)
    assert [(round(one.arrival_s, 3), one.prompt_tokens, one.output_tokens) for one in workload.requests] == [
        (0.0, 4808, 10),
        (0.052, 3180, 8),
        (60.02, 110, 27),
    ]


def test_clock_times_are_counted_from_the_first_request(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n1700000001.5,9,9\n1700000000,9,9\n")
    assert [one.arrival_s for one in load_trace(path).requests] == [0.0, 1.5]


def test_milliseconds_may_be_a_time_of_day_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"timestamp":{1_700_000_000_000 + ms},"input_length":9,"output_length":9}}\n' for ms in (0, 1_500)))
    assert [one.arrival_s for one in load_trace(path).requests] == [0.0, 1.5]


def test_targets_that_were_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens,ttft_slo_ms,tpot_slo_ms,slo_deadline_ms\n0,9,9,900,,1e4\n1,9,9,,40.5,\n2,9,9,,,\n"
    )
    assert load_trace(path).requests == [
        TraceRequest(0.0, 9, 9, ttft_slo_ms=900.0, slo_deadline_ms=10_000.0),
        TraceRequest(1.0, 9, 9, tpot_slo_ms=40.5),
        TraceRequest(2.0, 9, 9),
    ]


def test_all_fields_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "# block_tokens=64\narrival_s,prompt_tokens,output_tokens,block_ids,session_id,tenant,slo_class,priority,think_s\n"
        '0,100,20,8 9,a,t,batch,LOW,\n1,200,20,8;9;10 11,a,t,,,2.5\n2,64,0,"[8]",b,t,,,\n3,64,1,f00,c,t,,,\n'
    )
    workload = load_trace(path)
    assert workload.block_tokens == 64
    assert workload.requests == [
        TraceRequest(0.0, 100, 20, (0, 1), "a", "t", "batch", "low"),
        TraceRequest(1.0, 200, 20, (0, 1, 2, 3), "a", "t", think_s=2.5),
        TraceRequest(2.0, 64, 0, (0,), "b", "t"),
        TraceRequest(3.0, 64, 1, (4,), "c", "t"),
    ]


def test_ids_are_equal_only_where_all_before_is(tmp_path: Path) -> None:
    """A file may name blocks by their content alone; what counts is the whole beginning."""
    path = tmp_path / "t.jsonl"
    rows = [{"arrival_s": 0, "prompt_tokens": 1500, "output_tokens": 1, "block_ids": ids} for ids in ([1, 2, 3], [2, 3], [1, 2, 4])]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [one.block_ids for one in load_trace(path).requests] == [(0, 1, 2), (3, 4), (0, 1, 5)]


HEAD = "arrival_s,prompt_tokens,output_tokens\n"
WRONG = {
    "": (None, "empty"),
    "\n \n": (None, "empty"),
    HEAD: (None, "no requests"),
    "a,b,c\n1,2,3\n": ("arrival_s", "line 1"),
    "arrival,prompt_tokens,output_tokens\n1,2,3\n": ("arrival_s", "'arrival'"),
    "arrival_s,prompt_tokens,output_tokens,tenant,tenant\n": ("tenant", "twice"),
    HEAD + "1,2\n": (None, "line 2: 2 values for 3 columns"),
    HEAD + "0,1,1\n\n-1,2,3\n": ("arrival_s", "line 4: arrival_s is -1"),
    HEAD + "nan,2,3\n": ("arrival_s", "nan"),
    HEAD + "inf,2,3\n": ("arrival_s", "inf"),
    HEAD + "1e300,2,3\n": ("arrival_s", "1e300"),
    HEAD + "soon,2,3\n": ("arrival_s", "soon"),
    HEAD + ",2,3\n": ("arrival_s", "empty"),
    HEAD + "2023-13-16 18:17:03,2,3\n": ("arrival_s", "2023-13-16"),
    HEAD + "1,-2,3\n": ("prompt_tokens", "-2"),
    HEAD + "1,0,3\n": ("prompt_tokens", "from 1"),
    HEAD + "1,1.5,3\n": ("prompt_tokens", "1.5"),
    HEAD + "1,nan,3\n": ("prompt_tokens", "nan"),
    HEAD + "1,2,-1\n": ("output_tokens", "-1"),
    HEAD + "1,2,99999999999999999999\n": ("output_tokens", "9999"),
    HEAD + "1,2," + "9" * 6000 + "\n": ("output_tokens", "..."),
    "arrival_s,prompt_tokens,output_tokens,priority\n1,2,3,urgent\n": ("priority", "critical, high, normal"),
    "arrival_s,prompt_tokens,output_tokens,think_s\n1,2,3,-5\n": ("think_s", "-5"),
    "arrival_s,prompt_tokens,output_tokens,ttft_slo_ms\n1,2,3,0\n": ("ttft_slo_ms", "milliseconds above 0"),
    "arrival_s,prompt_tokens,output_tokens,slo_deadline_ms\n1,2,3,soon\n": ("slo_deadline_ms", "soon"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3,"tpot_slo_ms":1e99}\n': ("tpot_slo_ms", "at most"),
    '{"timestamp":1e15,"input_length":2,"output_length":3}\n': ("arrival_s", "milliseconds from 0 to 1e+14"),
    "arrival_s,prompt_tokens,output_tokens,tenant\n1,2,3," + "x" * 300 + "\n": ("tenant", "256"),
    "arrival_s,prompt_tokens,output_tokens,block_ids\n1,2,3,1 2 3\n": ("block_ids", "block_tokens"),
    "arrival_s,prompt_tokens,output_tokens,block_ids\n1,2,3,[1}\n": ("block_ids", "[1}"),
    "# block_tokens=0\n" + HEAD + "1,2,3\n": ("block_tokens", "line 1"),
    '{"arrival_s":1,"prompt_tokens":2}\n': ("output_tokens", "line 1: output_tokens is missing"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3}\n{"arrival_s":\n': (None, "line 2: not JSON"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3}\n7\n': (None, "line 2: not an object"),
    '[{"arrival_s":1}]\n': (None, "one JSON object a line"),
    '{"arrival_s":NaN,"prompt_tokens":2,"output_tokens":3}\n': (None, "line 1: not JSON"),
    '{"arrival_s":true,"prompt_tokens":2,"output_tokens":3}\n': ("arrival_s", "True"),
    '{"arrival_s":1,"prompt_tokens":[],"output_tokens":3}\n': ("prompt_tokens", "[]"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3,"block_ids":{}}\n': ("block_ids", "{}"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3,"block_ids":[-1]}\n': ("block_ids", "-1"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3,"block_ids":[null]}\n': ("block_ids", "None"),
    '{"arrival_s":1,"prompt_tokens":2,"output_tokens":3,"tenant":[1]}\n': ("tenant", "a name"),
    '{"timestamp":-5,"input_length":2,"output_length":3}\n': ("arrival_s", "-5"),
    '{"trace":1,"block_tokens":"many"}\n': ("block_tokens", "many"),
    "{" * 100_000: (None, "line 1: not JSON"),
}


@pytest.mark.parametrize("content", WRONG, ids=[f"{number}" for number in range(len(WRONG))])
def test_what_is_wrong_is_named(content: str, tmp_path: Path) -> None:
    field, told = WRONG[content]
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        load_trace(path)
    message = str(caught.value)
    assert "bad.csv" in message
    assert told in message
    assert len(message) < 1_000
    assert caught.value.param == (field or "trace")


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    for data, told in ((b"\x00\xff\xfe", "line 1: not UTF-8"), (gzip.compress(CSV.encode())[:-12], "broken"), (b"\x1f\x8bxx", "broken")):
        path.write_bytes(data)
        with pytest.raises(InvalidRequest, match=told):
            load_trace(path)


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="did you mean azure_code"):
        load_trace("azure-code")
    with pytest.raises(InvalidRequest, match="is no file and no trace"):
        load_trace(tmp_path / "missing.csv")
    with pytest.raises(InvalidRequest, match="is a folder"):
        load_trace(tmp_path)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_trace_or_an_invalid_request(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    with pytest.raises(InvalidRequest):
        load_trace(path)


names = st.text(alphabet="abc", max_size=3)
requests = st.builds(
    TraceRequest,
    arrival_s=st.floats(0, 1e4).map(lambda at: round(at, 6)),
    prompt_tokens=st.integers(64, 10_000),
    output_tokens=st.integers(0, 1_000),
    block_ids=st.just(()),
    session_id=st.text(alphabet="abc", min_size=1, max_size=3),
    tenant=names,
    slo_class=names,
    priority=st.sampled_from(["critical", "high", "normal", "low", "background"]),
    think_s=st.none() | st.floats(0, 1e4),
    ttft_slo_ms=st.none() | st.floats(0.1, 1e6),
    tpot_slo_ms=st.none() | st.floats(0.1, 1e6),
    slo_deadline_ms=st.none() | st.floats(0.1, 1e6),
)


@given(made=st.lists(requests, min_size=1, max_size=20), block_tokens=st.integers(1, 2048), suffix=st.sampled_from(["", ".gz"]))
def test_what_is_saved_is_loaded(
    made: list[TraceRequest], block_tokens: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made.sort(key=lambda one: one.arrival_s)
    next_id = 0
    for one in made:
        count = one.prompt_tokens // block_tokens
        one.block_ids = tuple(range(next_id, next_id + count))
        next_id += count
    path = tmp_path_factory.getbasetemp() / f"saved{suffix}"
    save_trace(Workload("w", made, block_tokens), path)
    loaded = load_trace(path)
    assert (loaded.requests, loaded.block_tokens) == (made, block_tokens)


# ---- sessions


def chain(*ids: int) -> TraceRequest:
    return TraceRequest(0.0, 512 * len(ids), 1, ids)


def test_requests_that_share_a_chain_are_one_session_and_a_system_prompt_joins_none() -> None:
    chats = [chain(0, 100 * n, 100 * n + 1) for n in range(1, 40)]
    again = [chain(0, 100, 101, 102), chain(0, 100, 103)]
    other = [chain(5)]
    requests = [*chats, *again, *other]
    assert name_sessions(requests) == 1
    assert [place for place, one in enumerate(requests) if one.session_id == "s1"] == [0, 39, 40]


def test_below_the_width_sharing_is_a_session() -> None:
    few = [chain(0, n) for n in range(1, WIDE_CONTINUATIONS + 1)]
    assert name_sessions(few) == 1
    many = [chain(0, n) for n in range(1, WIDE_CONTINUATIONS + 2)]
    assert name_sessions(many) == 0


def test_sessions_that_a_file_tells_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"arrival_s": 0, "prompt_tokens": 1024, "output_tokens": 1, "block_ids": [0, n % 2], "session_id": f"mine{n}"} for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [one.session_id for one in load_trace(path).requests] == ["mine0", "mine1", "mine2", "mine3"]

"""Reading requests: what is taken from body and headers, what goes on, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.errors import EngineError, InvalidRequest
from control_plane.gateway.endpoints import ANY, CHAT, ENDPOINTS, GENERIC, MESSAGES, RESPONSES, Endpoint
from control_plane.gateway.forms import form_fields
from control_plane.gateway.openai import HEAD_BYTES, Ask, read
from control_plane.gateway.request_ids import RequestIds
from control_plane.gateway.routing_members import NamesNoModel
from control_plane.types import ExecutionInstance, RequestKind, RequestPriority

COMPLETION = ENDPOINTS["/v1/completions"]
HELLO = b'{"model":"m","messages":[{"role":"user","content":"Hello"}]}'


def no_model(_: None) -> str:
    raise InvalidRequest("which model?", param="model")


def ask(body: bytes | dict[str, object], endpoint: Endpoint = CHAT, **headers: str) -> Ask:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return read(endpoint, raw, named, no_model)


# ---- the body that goes on


@pytest.mark.parametrize(
    "body",
    [
        HELLO,
        b' {"model" : "m",\n "messages":[], "unknown":{"a":[1,2.50,null]},"temperature": 1e-3 }\r\n',
        '{"model":"m","prompt":"你好 \\u00e9","guided_json":{"type":"object"}}'.encode(),
        b'{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}',
        b'{"model":"m","messages":[],"max_tokens":"many","n":[]}',
    ],
)
def test_a_body_that_needs_no_change_goes_on_as_the_very_object_that_came(body: bytes) -> None:
    found = ask(body)

    assert found.body is body
    assert not found.hide_usage


def test_usage_is_asked_of_streams_and_hidden() -> None:
    found = ask(b' {"model":"m","messages":[],"stream":true, "x" : 1 }')

    assert found.body == b'{"stream_options":{"include_usage":true},"model":"m","messages":[],"stream":true, "x" : 1 }'
    assert found.stream
    assert found.hide_usage


def test_other_stream_options_stay_when_usage_is_asked_for() -> None:
    found = ask({"model": "m", "stream": True, "stream_options": {"continuous_usage_stats": False, "include_usage": False}})

    assert json.loads(found.body)["stream_options"] == {"continuous_usage_stats": False, "include_usage": True}
    assert found.hide_usage


@pytest.mark.parametrize("options", [b'{"continuous_usage_stats":true}', b'{"include_usage":false,"continuous_usage_stats":true}'])
def test_counts_in_every_event_are_not_switched_on_for_who_did_not_ask_for_counts(options: bytes) -> None:
    found = ask(b'{"model":"m","stream":true,"stream_options":' + options + b"}")

    assert json.loads(found.body)["stream_options"] == {"include_usage": True}
    assert found.hide_usage


@pytest.mark.parametrize("value", ["1", '"true"', '"yes"', "[]"])
def test_an_include_usage_that_is_no_boolean_is_the_engines_to_judge(value: str) -> None:
    body = f'{{"model":"m","stream":true,"stream_options":{{"include_usage":{value}}}}}'.encode()

    found = ask(body)

    assert found.body is body
    assert not found.hide_usage


def test_stream_options_that_are_no_object_are_the_engines_to_judge() -> None:
    body = b'{"model":"m","stream":true,"stream_options":"yes"}'

    found = ask(body)

    assert found.body is body
    assert not found.hide_usage


def test_null_stream_options_are_like_none() -> None:
    found = ask(b'{"model":"m","stream":true,"stream_options":null}')

    assert json.loads(found.body)["stream_options"] == {"include_usage": True}


def test_usage_is_not_asked_where_it_is_off_or_the_path_has_its_own_way() -> None:
    body = b'{"model":"m","stream":true,"input":"x","messages":[]}'

    assert read(CHAT, body, {}, no_model, ask_usage=False).body is body
    assert ask(body, RESPONSES).body is body
    assert ask(body, MESSAGES).body is body


def test_own_fields_are_taken_out_and_all_others_keep_their_bytes() -> None:
    body = (
        b'{"model":"m", "priority":"high","x":{"a" : 1.50},"request_id":"abc","slo_deadline_ms":1500,"ttft_slo_ms":200.5,'
        b'"tpot_slo_ms":50,"cost_budget":0.25,"session_id":"s","when_late":"reject","y":"\\u00e9"}'
    )

    found = ask(body)
    request = found.request

    assert found.body == b'{"model":"m","x":{"a" : 1.50},"y":"\\u00e9"}'
    assert request.priority is RequestPriority.HIGH
    assert request.request_id == "abc"
    assert (request.slo_deadline_ms, request.ttft_slo_ms, request.tpot_slo_ms) == (1500, 200.5, 50)
    assert request.cost_budget == 0.25
    assert request.session_id == "s"
    assert request.when_late == "reject"


def test_null_is_taken_out_like_a_value() -> None:
    found = ask(b'{"model":"m","slo_deadline_ms":null,"priority":null}')

    assert found.body == b'{"model":"m"}'
    assert found.request.slo_deadline_ms is None
    assert found.request.priority is RequestPriority.NORMAL


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (-5, RequestPriority.CRITICAL),
        (-1, RequestPriority.HIGH),
        (0, RequestPriority.NORMAL),
        (1, RequestPriority.LOW),
        (7, RequestPriority.BACKGROUND),
        ("Critical", RequestPriority.CRITICAL),
        ("-1", RequestPriority.HIGH),
    ],
)
def test_priority_by_name_or_vllms_integer(value: object, wanted: RequestPriority) -> None:
    by_body = ask({"model": "m", "priority": value})
    by_header = ask(HELLO, x_priority=str(value))

    assert by_body.request.priority is wanted
    assert json.loads(by_body.body) == {"model": "m"}
    assert by_header.request.priority is wanted
    assert by_header.body is HELLO


@pytest.mark.parametrize("body", [b'{"messages":[]}', b'{"model":null,"messages":[]}', b'{"model":"","messages":[]}', b"{}"])
def test_a_missing_model_is_named_by_the_manager_and_added(body: bytes) -> None:
    found = read(CHAT, body, {}, lambda _: "only")

    assert found.request.model_name == "only"
    assert json.loads(found.body) == json.loads(body) | {"model": "only"}


def test_a_missing_model_that_nobody_can_name_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="which model"):
        ask(b'{"messages":[]}')


def test_other_paths_are_relayed_only_by_their_model() -> None:
    assert ask(b'{"model":"m","x":1}', GENERIC).request.model_name == "m"
    with pytest.raises(NamesNoModel):
        read(GENERIC, b'{"x":1}', {}, lambda _: "only")


# ---- what is read


def test_what_routing_needs_is_read() -> None:
    found = ask({"model": "m", "messages": [{"role": "user", "content": "x" * 40}], "max_tokens": 7, "user": "ann", "n": 3})
    request = found.request

    assert (request.model_name, request.max_tokens, request.user_id, request.kind) == ("m", 7, "ann", RequestKind.CHAT)
    assert request.extra_body == {"n": 3}
    assert request.prompt_bytes == len('[{"role": "user", "content": ""}]') + 40
    assert request.head() == b'[{"role": "user", "content": "' + b"x" * 40 + b'"}]'
    assert request.input_tokens is None


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
@pytest.mark.parametrize(("value", "wanted"), [(5, 5), (0, None), (-1, None), ("many", None), (None, None), (10**30, None), (1.5, None)])
def test_the_length_of_the_answer_is_read_where_it_makes_sense(field: str, value: object, wanted: int | None) -> None:
    body = json.dumps({"model": "m", field: value}).encode()

    found = ask(body)

    assert found.request.max_tokens == wanted
    assert found.body is body


def test_heads_of_equal_prefixes_are_equal_and_bounded() -> None:
    start = [{"role": "system", "content": "s" * 9000}]

    heads = {ask({"model": "m", "messages": [*start, {"role": "user", "content": text}]}).request.head() for text in ("a", "b")}

    assert len(heads) == 1
    assert len(heads.pop()) == HEAD_BYTES


def test_a_preamble_comes_before_the_prompt() -> None:
    found = ask({"model": "m", "system": "be brief", "messages": []}, MESSAGES)

    assert found.request.head() == b'"be brief"[]'
    assert found.request.prompt_bytes == len(b'"be brief"[]')


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_token_ids_are_counted(prompt: list[object]) -> None:
    assert ask({"model": "m", "prompt": prompt}, COMPLETION).request.input_tokens == 4


def test_tools_count_as_prompt() -> None:
    without = ask({"model": "m", "messages": []}).request.prompt_bytes

    assert ask({"model": "m", "messages": [], "tools": [1, 2]}).request.prompt_bytes == without + len("[1, 2]")


def test_an_image_is_not_counted_as_text() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 20_000}}
    text = {"type": "text", "text": "what is this? " * 100}

    found = ask({"model": "m", "messages": [{"role": "user", "content": [text, image]}]})

    assert 1400 < found.request.prompt_bytes < 6000


def test_long_text_is_counted_in_full() -> None:
    text = "so he said;base64, is what they call it. " * 2000

    assert ask({"model": "m", "messages": [{"role": "user", "content": text}]}).request.prompt_bytes > len(text)


def test_anthropics_user() -> None:
    assert ask({"model": "m", "messages": [], "metadata": {"user_id": "ann"}}, MESSAGES).request.user_id == "ann"
    assert ask({"model": "m", "messages": [], "metadata": {"user_id": 7}}, MESSAGES).request.user_id is None
    assert ask({"model": "m", "messages": [], "metadata": {"user_id": "ann"}}, CHAT).request.user_id is None


# ---- headers


def test_headers_set_what_the_body_does_not() -> None:
    request = ask(
        HELLO,
        x_slo_deadline_ms="1500",
        x_slo_ttft_ms="200",
        x_slo_tpot_ms="50.5",
        x_cost_budget_usd="0.01",
        x_user_id="ann",
        x_session_id="s1",
        x_when_late="reject",
        x_gateway_inference_fairness_id="team",
        x_gateway_inference_objective="low",
    ).request

    assert (request.slo_deadline_ms, request.ttft_slo_ms, request.tpot_slo_ms, request.cost_budget) == (1500, 200, 50.5, 0.01)
    assert (request.user_id, request.session_id, request.when_late) == ("ann", "s1", "reject")
    assert request.tenant == "team"
    assert request.priority is RequestPriority.LOW
    assert request.tags == {"objective": "low"}


def test_the_body_wins_over_headers() -> None:
    body = {"model": "m", "slo_deadline_ms": 1, "user": "body", "priority": 0, "when_late": "serve", "cost_budget": 2}

    request = ask(body, x_slo_deadline_ms="9", x_user_id="header", x_priority="high", x_when_late="reject", x_cost_budget_usd="9").request

    assert (request.slo_deadline_ms, request.user_id, request.priority) == (1, "body", RequestPriority.NORMAL)
    assert (request.when_late, request.cost_budget) == ("serve", 2)


def test_an_objective_that_is_no_class_is_only_a_tag() -> None:
    request = ask(HELLO, x_gateway_inference_objective="food-review").request

    assert request.priority is RequestPriority.NORMAL
    assert request.tags == {"objective": "food-review"}


@pytest.mark.parametrize(
    ("header", "value", "param"),
    [
        ("x_slo_deadline_ms", "soon", "x-slo-deadline-ms"),
        ("x_slo_deadline_ms", "nan", "x-slo-deadline-ms"),
        ("x_slo_ttft_ms", "-1", "x-slo-ttft-ms"),
        ("x_slo_tpot_ms", "inf", "x-slo-tpot-ms"),
        ("x_cost_budget_usd", "-0.1", "x-cost-budget-usd"),
        ("x_priority", "urgent", "x-priority"),
        ("x_when_late", "maybe", "x-when-late"),
        ("x_session_id", "s" * 300, "x-session-id"),
    ],
)
def test_a_wrong_header_is_named(header: str, value: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ask(HELLO, **{header: value})

    assert raised.value.param == param


def test_null_in_the_body_is_as_not_sent() -> None:
    body = {"model": "m", "priority": None, "when_late": None, "slo_deadline_ms": None, "request_id": None}
    found = ask(body, x_priority="high", x_when_late="reject", x_slo_deadline_ms="9")

    assert found.request.priority is RequestPriority.HIGH
    assert (found.request.when_late, found.request.slo_deadline_ms) == ("reject", 9.0)
    assert json.loads(found.body) == {"model": "m"}


def test_when_late_is_read_in_any_case() -> None:
    assert ask({"model": "m", "when_late": "Reject"}).request.when_late == "reject"
    assert ask(HELLO, x_when_late="REJECT").request.when_late == "reject"


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":7}', "model"),
        (b'{"model":["m"]}', "model"),
        (b'{"model":"m","stream":"yes please"}', "stream"),
        (b'{"model":"m","stream":1}', "stream"),
        (b'{"model":"m","user":{}}', "user"),
        (b'{"model":"m","priority":"urgent"}', "priority"),
        (b'{"model":"m","priority":1.5}', "priority"),
        (b'{"model":"m","priority":true}', "priority"),
        (b'{"model":"m","slo_deadline_ms":"soon"}', "slo_deadline_ms"),
        (b'{"model":"m","slo_deadline_ms":0}', "slo_deadline_ms"),
        (b'{"model":"m","slo_deadline_ms":1e999}', "slo_deadline_ms"),
        (b'{"model":"m","cost_budget":-1}', "cost_budget"),
        (b'{"model":"m","when_late":"maybe"}', "when_late"),
        (b'{"model":"m","request_id":7}', "request_id"),
        (b'{"model":"m","previous_response_id":7}', "previous_response_id"),
    ],
)
def test_a_routing_field_of_the_wrong_type_is_named(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ask(body)

    assert raised.value.param == param


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"not json", "not valid JSON"),
        (b'{"model":"m"', "not valid JSON"),
        (b'{"model":"m"} trailing', "not valid JSON"),
        (b'{"model":"m",}', "not valid JSON"),
        (b'{"model":"m\x00"}', "not valid JSON"),
        (b'{"messages":"a\x00b","model":"m"}', "not valid JSON"),
        (b'{"temperature":NaN,"model":"m"}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model":"\xff"}', "not valid UTF-8"),
        (b'{"model":"m","messages":"\xff\xfe"}', "not valid UTF-8"),
        (b'{"model":"m","x":"\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"model":"m","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        ask(body)


def test_of_a_member_that_comes_twice_the_last_counts_as_in_pythons_parser() -> None:
    body = b'{"model":"a","stream":true,"model":"b","stream":false,"messages":[]}'

    found = ask(body)

    assert found.request.model_name == json.loads(body)["model"] == "b"
    assert not found.stream
    assert found.body is body


def test_an_edit_keeps_the_last_of_two_equal_members() -> None:
    found = ask(b'{"model":"a","x":1,"priority":0,"x":2,"model":"b"}')

    assert json.loads(found.body) == {"model": "b", "x": 2}


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    try:
        found = ask(body)
    except InvalidRequest:
        return
    assert found.request.model_name


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(st.sampled_from(["messages", "max_tokens", "n", "tools", "stop", "a", "é", "stream_options"]), JSON_VALUES),
    stream=st.booleans(),
    deadline=st.none() | st.integers(1, 10**6),
)
def test_edits_change_nothing_else(fields: dict[str, object], stream: bool, deadline: int | None) -> None:
    sent = {"model": "m", "stream": stream, **fields}

    found = ask(sent | ({"slo_deadline_ms": deadline} if deadline is not None else {}))
    received = json.loads(found.body)

    if found.hide_usage:
        assert received["stream_options"]["include_usage"] is True
        received.pop("stream_options")
        sent.pop("stream_options", None)
    assert received == sent


# ---- forms


def form(*parts: tuple[bytes, bytes], boundary: bytes = b"b0", tail: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, value) for head, value in parts) + b"--" + boundary + tail


AUDIO = (b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav', b"\x00\xff\r\n--almost\r\n")
MODEL = (b'content-disposition: form-data; name="model"', b"whisper")


def test_a_form_is_routed_by_its_model() -> None:
    body = form(AUDIO, MODEL, (b'Content-Disposition: form-data; name="stream"', b"true"))

    found = read(ANY, body, {b"content-type": b"multipart/form-data; boundary=b0"}, no_model)

    assert (found.request.model_name, found.stream, found.request.kind) == ("whisper", True, RequestKind.ANY)
    assert found.body is body


def test_a_file_cannot_pose_as_a_field() -> None:
    inside = b'--other\r\ncontent-disposition: form-data; name="model"\r\n\r\nevil\r\n'
    fields = form_fields(b'multipart/form-data; boundary="b0"', form(MODEL, (AUDIO[0], inside)))
    posing = form_fields(
        b"multipart/form-data; boundary=b0", form((b'content-disposition: form-data; name="model"; filename="m"', b"evil"), MODEL)
    )

    assert fields == {b"model": "whisper"}
    assert posing == {b"model": "whisper"}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (b"multipart/form-data", form(MODEL)),
        (b"multipart/form-data; boundary=zz", form(MODEL)),
        (b"multipart/form-data; boundary=b0", form(MODEL, tail=b"\r\n")),
        (b"multipart/form-data; boundary=b0", b""),
        (b"multipart/form-data; boundary=b0", b"--b0--"),
        (b"multipart/form-data; boundary=b0", form(AUDIO)),
        (b"multipart/form-data; boundary=b0", form((MODEL[0], b"x" * 2000))),
        (b"multipart/form-data; boundary=b0", form((MODEL[0], b"\xff"))),
        (b"multipart/form-data; boundary=b0", form(*[AUDIO] * 1100)),
    ],
)
def test_a_broken_form_is_refused(content_type: bytes, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(ANY, body, {b"content-type": content_type}, no_model)


@given(st.binary(max_size=300))
def test_no_form_raises_anything_else(body: bytes) -> None:
    try:
        fields = form_fields(b"multipart/form-data; boundary=b", b"--b\r\n" + body)
    except InvalidRequest:
        return
    assert fields.keys() <= {b"model", b"stream", b"user"}


# ---- request ids


def test_a_fit_request_id_is_kept_and_others_replaced() -> None:
    ids = RequestIds("p-")

    assert ids.take(b"abc-123") == "abc-123"
    assert ids.take(None) == "p-1"
    assert ids.take(b"") == "p-2"
    assert ids.take(b"with space") == "p-3"
    assert ids.take(b"line\r\nbreak") == "p-4"
    assert ids.take(b"x" * 129) == "p-5"
    assert ids.take("é".encode()) == "p-6"


def test_two_makers_make_different_ids() -> None:
    assert RequestIds().new() != RequestIds().new()


def test_deep_nesting_leaves_the_stack_as_it_was() -> None:
    limit = sys.getrecursionlimit()

    for _ in range(3):
        with pytest.raises(InvalidRequest):
            ask(b"[" * 200_000)

    assert sys.getrecursionlimit() == limit
    assert ask(HELLO).request.model_name == "m"


# ---- what is remembered and quoted is bounded


HUGE = "x" * 1_000_000


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [], "user": HUGE}),
        ("/v1/messages", {"messages": [], "max_tokens": 1, "metadata": {"user_id": HUGE}}),
        ("/v1/chat/completions", {"messages": [], "request_id": HUGE}),
    ],
)
def test_nothing_huge_is_remembered_of_a_request(path: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    request = read(ENDPOINTS[path], body, {}, lambda _: "m").request

    assert request.user_id in (None, HUGE[:256])
    assert (request.model_name, request.session_id, request.tags, request.extra_body) == ("m", None, {}, {})


@pytest.mark.parametrize("name", ["session_id", "priority", "when_late"])
def test_a_huge_member_is_refused_without_an_echo_of_it(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(ENDPOINTS["/v1/completions"], json.dumps({"model": "m", "prompt": "", name: HUGE}).encode(), {}, lambda _: "m")

    assert refused.value.param == name
    assert len(refused.value.message) < 500


async def test_a_huge_model_name_is_refused_without_an_echo_of_it(stand: Any, make_stand: Any) -> None:
    answer = await stand.ask("POST", "/v1/completions", {"model": HUGE, "prompt": ""})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert len(answer.body) < 1000

    # a server that has not told its model may serve any, but none of such a name
    unknown = await make_stand(engines=0)
    unknown.manager.register_instance(ExecutionInstance("silent", url="http://127.0.0.1:9"))
    answer = await unknown.ask("POST", "/v1/completions", {"model": HUGE, "prompt": ""})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


async def test_of_a_long_error_of_an_engine_the_client_gets_all_and_little_is_kept(stand: Any) -> None:
    body = json.dumps({"error": {"message": HUGE}}).encode()
    stand.engine.answer = lambda exchange: exchange.respond(400, [(b"content-type", b"application/json")], body)

    answer = await stand.ask("POST", "/v1/completions", {"model": "m", "prompt": ""}, x_request_id="r1")

    assert (answer.status, answer.body) == (400, body)
    kept = (await stand.manager.result("r1")).error
    assert isinstance(kept, EngineError)
    assert len(kept.body) <= 4000
    assert len(kept.message) < 5000

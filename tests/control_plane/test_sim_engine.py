"""The simulated engine over HTTP: answers, streams, errors, faults, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from control_plane.errors import ConfigurationError, InstanceFailed, InvalidRequest
from control_plane.sim_engine import SimEngine
from control_plane.sim_engine.chat import ChatReply
from control_plane.transport import ClientLimits, HttpClient

JSON = ((b"content-type", b"application/json"),)
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "ignore_eos": True}
TEXT = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    engine = SimEngine(model_name="tiny", max_model_len=4096, speed=50.0)
    await engine.start()
    yield engine
    await engine.stop()


async def post(engine: SimEngine, path: str, body: Any, headers: Any = JSON) -> tuple[int, dict[bytes, bytes], Any]:
    client = HttpClient(engine.url, limits=ClientLimits(connect_timeout_s=20.0))
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, found, content = await client.fetch("POST", path, headers=headers, body=raw, timeout_s=20)
    finally:
        await client.close()
    stream = dict(found).get(b"content-type", b"").startswith(b"text/event-stream")
    return status, dict(found), content.decode() if stream else json.loads(content)


async def get(engine: SimEngine, path: str) -> tuple[int, dict[bytes, bytes], bytes]:
    client = HttpClient(engine.url, limits=ClientLimits(connect_timeout_s=20.0))
    try:
        status, headers, content = await client.fetch("GET", path)
    finally:
        await client.close()
    return status, dict(headers), content


def events(text: str) -> list[Any]:
    """The JSON of each event; ``[DONE]`` as it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def open_stream(engine: SimEngine, body: Any) -> AsyncIterator[asyncio.StreamReader]:
    """A chat request on a connection of its own, which is closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port, limit=1 << 22)
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    try:
        yield reader
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def read_rest(reader: asyncio.StreamReader) -> bytes:
    with suppress(ConnectionResetError):
        return await reader.read()
    return b""


# ---------------------------------------------------------------------------------------------------------------- the small paths


async def test_everything_says_that_it_is_simulated(engine: SimEngine) -> None:
    for path in ("/health", "/ping", "/version", "/load", "/v1/models", "/metrics", "/nowhere"):
        assert (await get(engine, path))[1][b"x-simulated"] == b"1", path
    assert (await post(engine, "/v1/chat/completions", CHAT))[1][b"x-simulated"] == b"1"
    status, _, body = await get(engine, "/v1/models")
    card = json.loads(body)["data"][0]
    assert (status, card["id"], card["simulated"], card["owned_by"], card["max_model_len"]) == (200, "tiny", True, "simulated", 4096)


async def test_health_is_empty_and_unknown_paths_and_methods_are_refused(engine: SimEngine) -> None:
    status, headers, body = await get(engine, "/health")
    assert (status, body) == (200, b"")
    assert b"content-type" not in headers
    status, _, body = await get(engine, "/nowhere")
    assert (status, body) == (404, b'{"detail":"Not Found"}')
    status, headers, body = await get(engine, "/v1/chat/completions")
    assert (status, headers[b"allow"], body) == (405, b"POST", b'{"detail":"Method Not Allowed"}')


async def test_tokenize_and_back(engine: SimEngine) -> None:
    _, _, answer = await post(engine, "/tokenize", {"prompt": "Once upon a time", "return_token_strs": True})
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["token_strs"][1] == "Ġupon"
    assert (await post(engine, "/detokenize", {"tokens": answer["tokens"]}))[2] == {"prompt": "Once upon a time"}
    chat = (await post(engine, "/tokenize", {"messages": HELLO}))[2]["count"]
    assert (await post(engine, "/v1/chat/completions", CHAT))[2]["usage"]["prompt_tokens"] == chat


# ---------------------------------------------------------------------------------------------------------------- answers


async def test_chat_answer_has_vllms_fields_in_vllms_order(engine: SimEngine) -> None:
    _, headers, answer = await post(engine, "/v1/chat/completions", CHAT, (*JSON, (b"x-request-id", b"mine")))
    assert headers[b"content-type"] == b"application/json"
    answer["choices"][0]["message"]["content"] = "888888"
    answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"], answer["created"] = 20, 26, 1795492790
    answer["usage"]["prompt_tokens_details"]["created_cache_tokens"] = 0
    answer["system_fingerprint"] = "vllm-0.32.0-bb843cc2"
    # recorded from vLLM 0.32.0
    assert json.dumps(answer) == (
        '{"id": "chatcmpl-mine", "object": "chat.completion", "created": 1795492790, "model": "tiny", "choices": [{"index": 0, '
        '"message": {"role": "assistant", "content": "888888", "refusal": null, "annotations": null, "audio": null, '
        '"function_call": null, "reasoning": null}, "logprobs": null, "finish_reason": "length", "stop_reason": null, "token_ids": null, '
        '"routed_experts": null}], "service_tier": null, "system_fingerprint": "vllm-0.32.0-bb843cc2", "usage": {"prompt_tokens": 20, '
        '"total_tokens": 26, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 0, '
        '"multimodal_tokens": null}, "completion_tokens_details": null}, "prompt_logprobs": null, "prompt_token_ids": null, '
        '"prompt_text": null, "kv_transfer_params": null, "ec_transfer_params": null, "metrics": null}'
    )


async def test_a_second_request_hits_the_prefix_that_the_first_left(engine: SimEngine) -> None:
    body = {**TEXT, "prompt": "many words in a long prompt " * 20}
    usages = [(await post(engine, "/v1/completions", body))[2]["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, usages[0]["prompt_tokens"] // 16 * 16]
    other = (await post(engine, "/v1/completions", {**body, "cache_salt": "someone else's"}))[2]["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


async def test_the_same_request_gives_the_same_text_on_every_engine(engine: SimEngine) -> None:
    other = SimEngine(model_name="tiny", speed=50.0, seed=77)
    await other.start()
    try:
        texts = [(await post(one, "/v1/completions", {**TEXT, "seed": 3}))[2]["choices"][0]["text"] for one in (engine, other)]
    finally:
        await other.stop()
    assert texts[0] == texts[1] != (await post(engine, "/v1/completions", {**TEXT, "seed": 4}))[2]["choices"][0]["text"]


async def test_an_answer_is_resumed_from_its_token_ids(engine: SimEngine) -> None:
    whole = (await post(engine, "/v1/completions", {**TEXT, "max_tokens": 12, "return_token_ids": True}))[2]["choices"][0]
    resumed = {**TEXT, "prompt": whole["prompt_token_ids"] + whole["token_ids"][:5], "max_tokens": 7}
    assert whole["text"].endswith((await post(engine, "/v1/completions", resumed))[2]["choices"][0]["text"])


async def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(engine: SimEngine) -> None:
    answer = (await post(engine, "/v1/completions", {**TEXT, "prompt": ["Once", "Twice"], "n": 2}))[2]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in answer["choices"]}) == 4
    assert answer["usage"]["completion_tokens"] == 24
    single = 0
    for prompt in ("Once", "Twice"):
        single += (await post(engine, "/v1/completions", {**TEXT, "prompt": prompt}))[2]["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == single


async def test_echo_repeats_the_prompt(engine: SimEngine) -> None:
    assert (await post(engine, "/v1/completions", {**TEXT, "echo": True}))[2]["choices"][0]["text"].startswith("Once upon a time ")
    only = (await post(engine, "/v1/completions", {**TEXT, "echo": True, "max_tokens": 0}))[2]
    assert (only["choices"][0]["text"], only["usage"]["completion_tokens"]) == ("Once upon a time", 1)


async def test_the_output_is_clipped_to_the_context(engine: SimEngine) -> None:
    answer = (await post(engine, "/v1/completions", {**TEXT, "prompt": [97] * 4000, "max_tokens": 200}))[2]
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (96, "length")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "000"),
        ({"structured_outputs": {"grammar": 'root ::= "yes"'}}, "yes"),
        ({"structured_outputs": {"json": '{"enum": ["yes"]}'}}, '"yes"'),
        ({"response_format": {"type": "json_object"}}, "{}"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "required": ["a"]}}}},
            '{"a":"text"}',
        ),
    ],
)
async def test_structured_output_satisfies_its_constraint(engine: SimEngine, form: dict[str, Any], expected: str) -> None:
    choice = (await post(engine, "/v1/chat/completions", {"messages": HELLO, **form}))[2]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "required": ["city"]}}}]


@pytest.mark.parametrize(
    ("choice", "reason"), [("required", "tool_calls"), ({"type": "function", "function": {"name": "get_weather"}}, "stop")]
)
async def test_a_required_or_named_tool_is_called(engine: SimEngine, choice: Any, reason: str) -> None:
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice}
    answer = (await post(engine, "/v1/chat/completions", body))[2]["choices"][0]
    called = answer["message"]["tool_calls"][0]["function"]
    assert (called["name"], json.loads(called["arguments"]), answer["finish_reason"]) == ("get_weather", {"city": "text"}, reason)
    streamed = events((await post(engine, "/v1/chat/completions", {**body, "stream": True}))[2])
    deltas = [delta for event in streamed[1:-1] for delta in event["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["function"] == {"name": "get_weather"}
    assert "".join(delta["function"]["arguments"] for delta in deltas[1:]) == called["arguments"]
    assert streamed[-2]["choices"][0]["finish_reason"] == reason


async def test_logprobs(engine: SimEngine) -> None:
    chat = (await post(engine, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}))[2]["choices"][0]
    content = chat["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == chat["message"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 6
    text = (await post(engine, "/v1/completions", {**TEXT, "logprobs": 3}))[2]["choices"][0]
    assert text["logprobs"]["text_offset"][1] == len(text["logprobs"]["tokens"][0])
    assert [len(tops) for tops in text["logprobs"]["top_logprobs"]] == [3] * 6


# ---------------------------------------------------------------------------------------------------------------- streams


async def test_chat_events_are_those_of_vllm(engine: SimEngine) -> None:
    body = {**CHAT, "max_tokens": 2, "stream": True, "request_id": "x"}
    _, headers, text = await post(engine, "/v1/chat/completions", body)
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    words = [event["choices"][0]["delta"]["content"] for event in events(text)[1:3]]
    created = events(text)[0]["created"]
    # recorded from vLLM 0.32.0, with id, time, words and fingerprint replaced
    frame = f'data: {{"id":"chatcmpl-x","object":"chat.completion.chunk","created":{created},"model":"tiny","choices":[{{"index":0,'
    assert text == (
        f'{frame}"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],"prompt_token_ids":null,'
        f'"prompt_text":null}}\n\n{frame}"delta":{{"content":"{words[0]}"}},"logprobs":null,"finish_reason":null,"token_ids":null}}]}}\n\n'
        f'{frame}"delta":{{"content":"{words[1]}"}},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}}],'
        f'"system_fingerprint":"{engine.fingerprint}"}}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"return_token_ids": True}, {"stop": ["\u2603never"]}, {"n": 2}])
async def test_a_stream_says_what_the_whole_answer_says(engine: SimEngine, extra: dict[str, Any]) -> None:
    body = {**CHAT, "max_tokens": 30, **extra}
    whole = (await post(engine, "/v1/chat/completions", body))[2]
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = events((await post(engine, "/v1/chat/completions", {**body, "stream": True, "stream_options": options}))[2])
    for choice in whole["choices"]:
        mine = [event for event in streamed[:-2] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in mine) == choice["message"]["content"]
        assert mine[-1]["usage"]["completion_tokens"] == 30
        ids = [token for event in mine for token in event["choices"][0].get("token_ids") or ()]
        assert ids == (choice["token_ids"] or [])
    assert streamed[-1] == "[DONE]"
    assert streamed[-2]["choices"] == []
    assert streamed[-2]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


async def test_completion_events(engine: SimEngine) -> None:
    whole = (await post(engine, "/v1/completions", TEXT))[2]["choices"][0]
    text = (await post(engine, "/v1/completions", {**TEXT, "stream": True}))[2]
    streamed = events(text)
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == whole["text"]
    assert [len(event) for event in streamed[:-1]] == [5] * 5 + [6]
    assert list(streamed[0]["choices"][0]) == [
        *("index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"),
    ]


async def test_a_stop_string_never_leaks_into_a_stream(engine: SimEngine) -> None:
    whole = (await post(engine, "/v1/completions", {**TEXT, "max_tokens": 40}))[2]["choices"][0]["text"]
    stop = whole[60:68]
    text = (await post(engine, "/v1/completions", {**TEXT, "max_tokens": 40, "stop": stop, "stream": True}))[2]
    streamed = events(text)[:-1]
    assert "".join(event["choices"][0]["text"] for event in streamed) == whole[: whole.index(stop)]
    assert (streamed[-1]["choices"][0]["finish_reason"], streamed[-1]["choices"][0]["stop_reason"]) == ("stop", stop)


async def test_tokens_share_an_event_while_the_client_reads_too_slowly(engine: SimEngine) -> None:
    async with open_stream(engine, {**CHAT, "max_tokens": 400, "stream": True}) as reader:
        await until(lambda: engine.open_requests == 1)
        (reply,) = engine._replies
        assert reply.exchange.on_pause is not None
        assert reply.exchange.on_resume is not None
        reply.exchange.on_pause()
        produced = reply.choices[0].produced
        await until(lambda: reply.choices[0].produced >= produced + 20)
        reply.exchange.on_resume()
        data = (await reader.readuntil(b"0\r\n\r\n")).decode()
    contents = [event["choices"][0]["delta"]["content"] for event in events(data)[1:-1]]
    assert max(len(content.split()) for content in contents) >= 20
    assert len("".join(contents).split()) == 400


# ---------------------------------------------------------------------------------------------------------------- leaving, failing


async def test_a_client_that_leaves_stops_its_sequences(engine: SimEngine) -> None:
    for body in ({**CHAT, "max_tokens": 4000, "stream": True, "n": 3}, {**CHAT, "max_tokens": 4000}):
        async with open_stream(engine, body):
            await until(lambda: engine.model.running > 0)
        await until(lambda: engine.model.idle and not engine.open_requests)
    assert engine.model.blocks.free == engine.model.blocks.total


async def test_hang_and_resume(engine: SimEngine) -> None:
    engine.hang()
    waiting = [asyncio.create_task(get(engine, "/health")), asyncio.create_task(post(engine, "/v1/chat/completions", CHAT))]
    _, pending = await asyncio.wait(waiting, timeout=0.1)
    assert len(pending) == 2
    engine.resume()
    assert [(await task)[0] for task in waiting] == [200, 200]


async def test_a_stream_goes_on_where_the_hang_stopped_it(engine: SimEngine) -> None:
    stream = asyncio.create_task(post(engine, "/v1/completions", {**TEXT, "max_tokens": 300, "stream": True}))
    await until(lambda: engine.model.running == 1)
    engine.hang()
    before = engine.model.counters.generation_tokens
    await asyncio.sleep(0.05)
    assert engine.model.counters.generation_tokens == before
    engine.resume()
    assert len(events((await stream)[2])) == 301


async def test_fail_next(engine: SimEngine) -> None:
    engine.fail_next(2, 503)
    statuses = [(await post(engine, "/v1/chat/completions", CHAT))[0] for _ in range(3)]
    assert statuses == [503, 503, 200]


@pytest.mark.parametrize(("after", "n"), [(3, 1), (1, 3), (100, 2)])
async def test_streams_can_be_cut(engine: SimEngine, after: int, n: int) -> None:
    engine.cut_streams_after = after
    async with open_stream(engine, {**CHAT, "max_tokens": 100, "n": n, "stream": True}) as reader:
        assert not (await read_rest(reader)).endswith(b"0\r\n\r\n")
    await until(lambda: engine.model.idle)
    assert (await post(engine, "/v1/chat/completions", CHAT))[0] == 200, "and it serves on"


@pytest.mark.parametrize("part", ["body", "token"])
async def test_an_answer_that_breaks_takes_no_other_with_it(engine: SimEngine, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the simulator's own, in the midst of a batch."""
    whole = getattr(ChatReply, part)

    def breaks(reply: ChatReply, *told: Any) -> Any:
        if "broken" in reply.id:
            raise ValueError("made to break")
        return whole(reply, *told)

    monkeypatch.setattr(ChatReply, part, breaks)
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(str(context["exception"])))
    asked = [post(engine, "/v1/chat/completions", CHAT | {"n": 2, "request_id": name}) for name in ("broken", "good", "better")]
    broken, *others = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(broken, InstanceFailed)
    assert [status for status, _, _ in others] == [200, 200]  # type: ignore[misc]
    assert said == ["made to break"]
    await until(lambda: engine.open_requests == 0 and not engine.model.running)


async def test_kill_drops_everything_without_an_answer() -> None:
    engine = SimEngine(model_name="tiny", speed=0.1)
    await engine.start()
    url = engine.url
    async with open_stream(engine, {**CHAT, "stream": True}) as reader:
        await until(lambda: engine.model.running == 1)
        await engine.kill()
        assert not (await read_rest(reader)).endswith(b"0\r\n\r\n")
    client = HttpClient(url)
    with pytest.raises(InstanceFailed):
        await client.fetch("GET", "/health")
    await client.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_ends_running_answers_with_the_reason_abort(stream: bool) -> None:
    engine = SimEngine(model_name="tiny", speed=1.0)
    await engine.start()
    answer = asyncio.create_task(post(engine, "/v1/chat/completions", {**CHAT, "max_tokens": 2000, "stream": stream}))
    await until(lambda: engine.model.counters.generation_tokens > 2)
    await engine.stop()
    status, _, body = await answer
    last = events(body)[-2] if stream else body
    assert (status, last["choices"][0]["finish_reason"]) == (200, "abort")


async def test_stop_with_grace_lets_answers_end() -> None:
    engine = SimEngine(model_name="tiny", speed=10.0)
    await engine.start()
    answer = asyncio.create_task(post(engine, "/v1/chat/completions", {**CHAT, "max_tokens": 100}))
    await until(lambda: engine.model.running == 1)
    await engine.stop(grace_s=10.0)
    assert (await answer)[2]["choices"][0]["finish_reason"] == "length"


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="did you mean"):
        SimEngine("h100-llama9")
    with pytest.raises(ConfigurationError, match="kind"):
        SimEngine(kind="image")
    with pytest.raises(ConfigurationError, match="speed"):
        SimEngine(speed=0)
    with pytest.raises(ConfigurationError, match="max_num_batched_tokens 64 is less than max_num_seqs 256"):
        SimEngine(max_num_batched_tokens=64)
    with pytest.raises(InvalidRequest, match="block_size_tokens"):
        SimEngine(block_size=0)


def test_the_limits_of_a_real_server_take_the_place_of_the_profiles() -> None:
    engine = SimEngine(max_num_seqs=3, max_num_batched_tokens=512, block_size=32, num_gpu_blocks_override=50)
    shape = engine.profile
    assert (shape.max_num_seqs, shape.max_num_batched_tokens, shape.block_size_tokens) == (3, 512, 32)
    assert (engine.model.blocks.total, engine.context) == (50, 1600)


# ---------------------------------------------------------------------------------------------------------------- metrics


def samples(page: bytes) -> dict[str, float]:
    families = text_string_to_metric_families(page.decode())
    return {sample.name + str(sorted(sample.labels.items())): sample.value for family in families for sample in family.samples}


async def test_metrics_tell_what_happened(engine: SimEngine) -> None:
    labels = "[('engine', '0'), ('model_name', 'tiny')]"
    before = samples((await get(engine, "/metrics"))[2])
    assert before["vllm:num_requests_running" + labels] == 0
    for _ in range(2):
        await post(engine, "/v1/completions", {**TEXT, "prompt": "ab " * 100})
    page = samples((await get(engine, "/metrics"))[2])
    assert page["vllm:generation_tokens_total" + labels] == 12
    prompt_tokens = page["vllm:prefix_cache_queries_total" + labels]
    assert page["vllm:prompt_tokens_total" + labels] == prompt_tokens
    assert page["vllm:prefix_cache_hits_total" + labels] == prompt_tokens / 2 // 16 * 16
    assert page["vllm:time_to_first_token_seconds_count" + labels] == 2
    assert page["vllm:inter_token_latency_seconds_count" + labels] == 10
    assert page["vllm:e2e_request_latency_seconds_count" + labels] == 2
    reason = "[('engine', '0'), ('finished_reason', 'length'), ('model_name', 'tiny')]"
    assert page["vllm:request_success_total" + reason] == 2
    (config,) = (name for name in page if name.startswith("vllm:cache_config_info"))
    assert f"('num_gpu_blocks', '{engine.model.blocks.total}')" in config
    assert "('block_size', '16')" in config


async def test_running_and_waiting_are_shown_while_they_last() -> None:
    engine = SimEngine(model_name="tiny", speed=0.05)
    await engine.start()
    async with open_stream(engine, {**CHAT, "max_tokens": 500, "n": 300}):
        await until(lambda: engine.model.running > 0)
        page = samples((await get(engine, "/metrics"))[2])
    labels = "[('engine', '0'), ('model_name', 'tiny')]"
    assert (page["vllm:num_requests_running" + labels], page["vllm:num_requests_waiting" + labels]) == (256, 44)
    assert 0 < page["vllm:kv_cache_usage_perc" + labels] < 1
    await engine.stop()

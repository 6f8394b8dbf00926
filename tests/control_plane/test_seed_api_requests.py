"""What the API promises of requests and their status, clause by clause."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from scripted_engine import ScriptedCall
from scripted_world import MODEL, Make, until

from control_plane import (
    EngineError,
    InvalidRequest,
    ModelNotFound,
    NoInstanceAvailable,
    QueueFull,
    RequestMetadata,
    RequestNotFound,
    RequestPriority,
    RequestStatus,
    SchedulingDecision,
)
from control_plane.clock import ManualClock
from control_plane.errors import ControlPlaneError


def sent(call: ScriptedCall) -> dict[str, object]:
    body: dict[str, object] = json.loads(call.wire.body)
    return body


class TestSubmitting:
    async def test_before_the_start_it_waits_in_the_pending_queue_and_runs_once_started(self, make: Make) -> None:
        world = make("a", answer=True)
        request = RequestMetadata(request_id="early", prompt="x")
        assert await world.manager.submit_request(request) == "early"
        assert len(world.manager.pending_queue) == 1
        assert list(world.manager.pending_queue) == [request]
        assert request in world.manager.pending_queue
        assert await world.state("early") == "queued"
        await world.manager.start()
        assert await world.state("early") == "completed"
        assert len(world.manager.pending_queue) == 0

    async def test_an_id_is_generated_where_missing(self, make: Make) -> None:
        world = make("a", answer=True)
        await world.manager.start()
        request = RequestMetadata(prompt="x")
        name = await world.manager.submit_request(request)
        assert name
        assert request.request_id == name
        assert await world.manager.submit_request(RequestMetadata(prompt="x")) != name
        assert await world.state(name) == "completed"

    @pytest.mark.parametrize("started", [True, False])
    async def test_a_duplicate_of_a_live_or_remembered_id_is_refused(self, make: Make, started: bool) -> None:
        world = make("a")
        if started:
            await world.manager.start()
        await world.submit("same")
        with pytest.raises(InvalidRequest, match="same") as refused:
            await world.submit("same")
        assert refused.value.param == "request_id"
        if started:
            world.open[0].answer()
            with pytest.raises(InvalidRequest, match="same"):
                await world.submit("same")

    async def test_of_many_with_one_id_at_once_one_is_taken(self, make: Make) -> None:
        world = make("a", answer=True)
        await world.manager.start()
        ends = await asyncio.gather(*(world.submit("same") for _ in range(20)), return_exceptions=True)
        assert sum(end == "same" for end in ends) == 1
        assert sum(isinstance(end, InvalidRequest) for end in ends) == 19
        assert len(world.engines["a"].calls) == 1

    @pytest.mark.parametrize(
        ("fields", "path", "content"),
        [
            ({"prompt": "hi"}, "/v1/completions", {"prompt": "hi", "max_tokens": 512}),
            ({"prompt": [1, 2, 3]}, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 512}),
            ({"prompt": ["a", "b"]}, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 512}),
            ({"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ({"input": "hi"}, "/v1/embeddings", {"input": "hi"}),
            ({"input": ["a", "b"]}, "/v1/embeddings", {"input": ["a", "b"]}),
        ],
    )
    async def test_what_is_given_says_where_it_goes(
        self, make: Make, fields: dict[str, object], path: str, content: dict[str, object]
    ) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r", **fields)
        (call,) = world.open
        assert call.wire.path == path
        body = sent(call)
        assert {name: body[name] for name in content} == content
        assert ("max_tokens" in body) == ("input" not in fields)
        assert not {"temperature", "top_p", "stream", "priority"} & set(body)

    async def test_more_than_one_content_is_an_error_and_an_empty_prompt_is_the_engines_to_judge(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        message = [{"role": "user", "content": "x"}]
        for fields in ({"prompt": "x", "messages": message}, {"prompt": "x", "input": "y"}, {"messages": message, "input": "y"}):
            with pytest.raises(InvalidRequest, match="one of prompt, messages, input"):
                await world.submit("two", **fields)
        await world.submit("empty", prompt="")
        assert sent(world.open[0])["prompt"] == ""

    async def test_extra_body_carries_any_engine_field_and_wins(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        extra = {
            "stop": ["\n"],
            "seed": 7,
            "response_format": {"type": "json_object"},
            "max_tokens": 3,
            "stream": True,
            "stream_options": {},
        }
        await world.submit("r", temperature=0.5, top_p=0.9, extra_body=extra)
        call = world.open[0]
        body = sent(call)
        assert body == {
            "model": MODEL, "prompt": "x", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9,
            "stop": ["\n"], "seed": 7, "response_format": {"type": "json_object"},
        }  # fmt: skip
        assert not call.wire.stream, "submit_request asks for one whole answer, whatever extra_body says"
        assert extra["stream"] is True, "the caller's dict is left alone"

    async def test_what_cannot_be_written_as_json_is_refused_before_and_after_the_start(self, make: Make) -> None:
        world = make("a")
        for _ in range(2):
            for wrong in ({"extra_body": {"x": object()}}, {"prompt": "\ud800"}, {"input": ["\ud800"]}):
                with pytest.raises(InvalidRequest, match="JSON") as refused:
                    await world.submit("r", **wrong)
                assert refused.value.param == next(iter(wrong))
            await world.manager.start()
        assert len(world.manager.pending_queue) == 0

    @pytest.mark.parametrize(
        "prompt", ["héllo 用简单的语言 🚀", '\x00\x01 " \\ \n', "x" * 2_000_000, list(range(100_000))], ids=str.__class__
    )
    async def test_any_text_arrives_as_it_was(self, make: Make, prompt: str | list[int]) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r", prompt=prompt)
        assert sent(world.open[0])["prompt"] == prompt

    async def test_what_is_refused_leaves_the_request_as_it_was(self, make: Make) -> None:
        world = make("a", queue_max_requests=1)
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.manager.start()
        for n in range(2):
            await world.submit(f"r{n}")
        request = RequestMetadata(request_id="r2", prompt="short")
        with pytest.raises(QueueFull) as full:
            await world.manager.submit_request(request)
        assert (full.value.code, full.value.http_status) == ("queue_full", 429)
        assert full.value.retry_after_s is not None
        assert full.value.retry_after_s > 0
        assert (request.input_tokens, request.model_name, request.arrival_time) == (None, None, None)
        with pytest.raises(RequestNotFound):
            await world.state("r2")


class TestModels:
    async def test_no_name_means_the_only_model_or_the_default(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("only")
        assert sent(world.open[0])["model"] == MODEL
        world.add("b", model_name="other")
        with pytest.raises(InvalidRequest, match="m, other") as refused:
            await world.submit("which")
        assert refused.value.code == "invalid_request"
        defaulted = make("", default_model="other")
        defaulted.add("a")
        defaulted.add("b", model_name="other")
        await defaulted.manager.start()
        await defaulted.submit("r")
        assert len(defaulted.open_on("b")) == 1

    async def test_before_the_start_it_waits_and_is_judged_then(self, make: Make) -> None:
        world = make("")
        await world.submit("none")
        await world.submit("named", model_name="m")
        world.add("a")
        world.add("b", model_name="other")
        await world.manager.start()
        status = await world.status("none")
        assert (status.state, status.error.code) == ("failed", "invalid_request")  # type: ignore[union-attr]
        assert "m, other" in str(status.error)
        assert [call.request.request_id for call in world.open_on("a")] == ["named"]

    async def test_an_unknown_model_lists_those_there_are_and_one_that_is_down_waits(self, make: Make) -> None:
        world = make("a", no_instance_timeout_s=0.3)
        world.add("b", model_name="down", is_available=False)
        await world.manager.start()
        with pytest.raises(ModelNotFound, match="down, m"):
            await world.submit("r", model_name="nobody")
        await world.submit("waits", model_name="down")
        assert await world.state("waits") == "queued"
        ended = await asyncio.wait_for(world.manager.result("waits"), 5)
        assert isinstance(ended.error, NoInstanceAvailable)
        assert ended.error.code == "no_instance_available"

    @pytest.mark.parametrize("early", [True, False])
    async def test_a_nameless_instance_learns_its_name_before_it_gets_work(self, make: Make, early: bool) -> None:
        world = make("")
        instance = world.add("a", model_name="")
        assert not instance.can_accept_request
        if early:
            await world.submit("r")
        await world.manager.start()
        if not early:
            await world.submit("r")
        assert not world.open, "nobody knows yet what it serves"
        engine = world.manager.fleet.engine("a")
        engine.models = ["told-by-its-server"]  # type: ignore[attr-defined]
        await until(lambda: world.open)
        assert instance.model_name == "told-by-its-server"
        assert sent(world.open[0])["model"] == "told-by-its-server"
        world.open[0].answer()
        assert await world.state("r") == "completed"

    async def test_nobody_tells_a_name(self, make: Make) -> None:
        world = make("", no_instance_timeout_s=0.3)
        world.add("a", model_name="")
        await world.manager.start()
        await world.submit("r")
        ended = await asyncio.wait_for(world.manager.result("r"), 5)
        assert isinstance(ended.error, NoInstanceAvailable)
        assert "which model" in str(ended.error)

    async def test_aliases_are_served_and_the_first_is_the_models_name(self, make: Make) -> None:
        world = make("")
        instance = world.add("a", model_name="", served_models=["base", "adapter-1", "adapter-2"])
        assert instance.model_name == "base"
        assert world.add("b", model_name="x", served_models=["y"]).served_models == ["x", "y"]
        await world.manager.start()
        for model in ("base", "adapter-1", "adapter-2"):
            await world.submit(model, model_name=model)
        assert [sent(call)["model"] for call in world.open_on("a")] == ["base", "adapter-1", "adapter-2"]


class TestTimes:
    async def test_times_are_aware_datetimes_from_the_clock(self, make: Make) -> None:
        clock = ManualClock(now_s=50.0)
        world = make("a", clock=clock)
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.manager.start()
        await world.submit("first")
        request = RequestMetadata(request_id="second", prompt="x")
        await world.manager.submit_request(request)
        epoch = datetime(2026, 1, 1, tzinfo=UTC)
        assert request.arrival_time == request.queue_time == epoch + timedelta(seconds=50)
        assert (request.latency_ms, request.queue_wait_ms, request.schedule_time) == (None, None, None)
        clock.advance(2.0)
        world.open[0].answer()
        assert request.schedule_time == request.start_time == epoch + timedelta(seconds=52)
        clock.advance(1.0)
        world.open[0].answer()
        assert request.end_time == epoch + timedelta(seconds=53)
        assert (request.latency_ms, request.queue_wait_ms) == (3000.0, 2000.0)
        timings = (await world.status("second")).timings
        assert timings is not None
        assert (timings.queue_ms, timings.e2e_ms) == (2000.0, 3000.0)

    async def test_the_same_object_may_be_sent_again_under_another_id(self, make: Make) -> None:
        clock = ManualClock(now_s=50.0)
        world = make("a", clock=clock, answer=True)
        await world.manager.start()
        request = RequestMetadata(request_id="one", prompt="short")
        await world.manager.submit_request(request)
        assert (request.input_tokens, request.model_name) == (None, None), "what we filled in is open again"
        clock.advance(5.0)
        request.request_id, request.prompt = "two", "much longer " * 1000
        await world.manager.submit_request(request)
        assert request.latency_ms == 0.0
        assert await world.state("two") == "completed"
        assert await world.state("one") == "completed"


class TestStatus:
    async def test_a_good_end(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r")
        assert await world.state("r") == "running"
        world.open[0].answer(b'{"choices":[{"text":"yes"},{"text":"no"}],"x":1}', tokens=4)
        status = await world.status("r")
        assert status == RequestStatus.COMPLETED
        assert status.state == "completed"
        assert status.output == "yes"
        assert status.response == {"choices": [{"text": "yes"}, {"text": "no"}], "x": 1}
        assert status.error is None
        assert status.usage is not None
        assert status.usage.completion_tokens == 4
        assert status.timings is not None
        assert isinstance(status.decision, SchedulingDecision)
        assert status.decision.instance_id == "a"

    @pytest.mark.parametrize(
        ("body", "output"),
        [
            (b'{"choices":[{"message":{"content":"chat"}}]}', "chat"),
            (b'{"choices":[{"message":{"content":null,"tool_calls":[]}}]}', ""),
            (b'{"choices":[]}', ""),
            (b'{"choices":["odd"]}', ""),
            (b'{"data":[{"embedding":[1.0]},{"embedding":[2.0]}]}', [[1.0], [2.0]]),
        ],
    )
    async def test_output_is_the_first_choices_text_or_the_vectors(self, make: Make, body: bytes, output: object) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r")
        world.open[0].answer(body)
        assert (await world.status("r")).output == output

    @pytest.mark.parametrize("body", [b"", b"[1]", b"<html>", b'{"cut', b"\xff\xfe"])
    async def test_an_answer_that_is_no_json_object_is_a_failure(self, make: Make, body: bytes) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r")
        world.open[0].answer(body)
        status = await world.status("r")
        assert (status.state, status.output, status.response) == ("failed", None, None)
        assert isinstance(status.error, ControlPlaneError)
        assert status.error.code == "instance_failed"

    async def test_an_error_has_a_code_and_its_str_is_the_message(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r")
        world.open[0].fail(EngineError(422, b'{"error":{"message":"no such thing"}}'))
        status = await world.status("r")
        assert status == RequestStatus.FAILED
        assert str(status.error) == "no such thing"
        assert isinstance(status.error, EngineError)
        assert (status.error.code, status.error.status) == ("instance_failed", 422)

    async def test_a_streamed_answer_has_its_text_as_output(self, make: Make) -> None:
        world = make("a", answer=False)
        await world.manager.start()
        stream = world.manager.stream(RequestMetadata(request_id="s", prompt="x"))
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: world.open)
        call = world.open[0]
        assert sent(call)["stream"] is True
        call.begin(b'data: {"choices":[{"index":0,"text":"one "}]}\n\n')
        assert await first == "one "
        assert await world.state("s") == "running"
        call.sink.chunk(b'data: {"choices":[{"index":0,"text":"two"}]}\n\ndata: {"choices":[{"index":1,"text":"no"}]}\n\n')
        call.finish_stream()
        assert (await world.status("s")).output == "one two", "also before it was read"
        assert [piece async for piece in stream] == ["two"]
        assert (await world.status("s")).output == "one two"

    async def test_an_unknown_id(self, make: Make) -> None:
        world = make("a")
        for call in (world.manager.get_request_status, world.manager.result, world.manager.cancel_request):
            with pytest.raises(RequestNotFound, match="nobody") as unknown:
                await call("nobody")
            assert unknown.value.code == "request_not_found"

    async def test_records_outlive_stop(self, make: Make) -> None:
        world = make("a", answer=True)
        await world.manager.start()
        await world.submit("r")
        await world.manager.stop()
        assert (await world.status("r")).output == "ok"


@pytest.mark.parametrize("priority", ["high", "HIGH", 1, RequestPriority.HIGH])
async def test_priorities_by_name_number_or_member(make: Make, priority: object) -> None:
    world = make("a")
    request = RequestMetadata(request_id="r", prompt="x", priority=priority)  # type: ignore[arg-type]
    assert request.priority is RequestPriority.HIGH
    later = RequestMetadata(request_id="later", prompt="x")
    later.priority = priority  # type: ignore[assignment]
    await world.manager.submit_request(later)
    assert later.priority is RequestPriority.HIGH
    with pytest.raises(InvalidRequest, match="background"):
        RequestMetadata(priority="urgent")  # type: ignore[arg-type]

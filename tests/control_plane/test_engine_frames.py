"""Chunks of a stream that go past the reading of events say and count the same as if they had been read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane import EngineError
from control_plane.clock import ManualClock
from control_plane.engines import events
from control_plane.engines.openai_compatible import EngineAnswer
from control_plane.errors import ControlPlaneError
from control_plane.protocols import Call, EngineOutcome, Headers, WireRequest

STREAM = [(b"content-type", b"text/event-stream")]


class Heard:
    """A sink that keeps what it is told; ``frame`` in place of ``chunk`` where it takes frames."""

    def __init__(self) -> None:
        self.data = b""
        self.count = 0
        self.end: object = None

    def started(self, status: int, headers: Headers, call: Call) -> None: ...

    def chunk(self, data: bytes) -> None:
        self.data += data

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        self.count += n

    def finished(self, outcome: EngineOutcome) -> None:
        usage = outcome.usage
        self.end = None if usage is None else (usage.prompt_tokens, usage.completion_tokens)

    def failed(self, error: ControlPlaneError) -> None:
        self.end = (type(error), error.message)


class TakesFrames(Heard):
    framed = 0

    def frame(self, frame: bytes, data: bytes) -> None:
        assert data in frame
        self.framed += 1
        self.data += data


def fed(sink: Heard, chunks: list[bytes], *, frames: bool) -> Heard:
    answer = EngineAnswer("e", WireRequest("/v1/chat/completions", b"{}", True, hide_usage=True), sink, ManualClock())
    answer.on_head(200, STREAM)
    for chunk in chunks:
        if sink.end is not None:
            break
        if frames:
            answer.on_frame(b"%x\r\n%b\r\n" % (len(chunk), chunk), chunk)
        else:
            answer.on_body(chunk)
    answer.on_complete()
    return sink


def event(text: str, *, name: str = "content", reason: str | None = None, more: str = "") -> bytes:
    choice = f'{{"index":0,"delta":{{"{name}":{json.dumps(text)}}},"logprobs":null,"finish_reason":{json.dumps(reason)}}}'
    return f'data: {{"id":"x","choices":[{choice}]{more}}}\n\n'.encode()


USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"broke","code":500}}\n\n'
#: words that look like what is searched for, quotes and backslashes among them
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from([" word", '"', "\\", '\\"', '"usage":{', '"error"', "[DONE]", '","finish_reason":"abort"', "\n\n"]),
    st.just('"}}]}\n\ndata: {"error":1}'),
)
MORE = st.sampled_from(["", ',"usage":null', ',"usage":{"prompt_tokens":1}'])
CHUNKS = st.one_of(
    st.builds(event, TEXTS),
    st.builds(event, TEXTS, name=st.sampled_from(["content", "reasoning", "role"])),
    st.builds(event, TEXTS, reason=st.sampled_from(["stop", "abort", None]), more=MORE),
    st.builds(lambda first, second: event(first) + event(second), TEXTS, TEXTS),
    st.sampled_from([USAGE, ERROR, DONE, b": comment\n\n", event("cut")[:40], event("cut")[40:]]),
    st.binary(max_size=12),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(CHUNKS, max_size=12))
def test_frames_and_bodies_tell_the_same(chunks: list[bytes]) -> None:
    chunks = [event("first"), *chunks, USAGE, DONE]
    read, passed = fed(Heard(), chunks, frames=False), fed(TakesFrames(), chunks, frames=True)
    assert (passed.data, passed.count, passed.end) == (read.data, read.count, read.end)


def test_usual_chunks_are_passed_on() -> None:
    words = [f" word{n}" for n in range(20)]
    sink = TakesFrames()
    fed(sink, [event(word) for word in words] + [USAGE, DONE], frames=True)
    assert sink.framed == 19  # the first one begins the answer
    assert (sink.count, sink.end) == (20, (5, 7))


@pytest.mark.parametrize("special", [ERROR, event("x", reason="abort"), event("x", more=',"usage":{"prompt_tokens":1}')])
def test_what_is_special_is_read_after_any_number_of_usual_ones(special: bytes) -> None:
    assert events.is_special(special)
    sink = TakesFrames()
    fed(sink, [event(f" {n}") for n in range(40)] + [special, USAGE, DONE], frames=True)
    assert sink.framed == 39
    assert sink.end == (5, 7) or (isinstance(sink.end, tuple) and issubclass(sink.end[0], EngineError | ControlPlaneError))


def test_what_stands_around_a_text() -> None:
    before, after = events.around_text(event("text"))
    assert before + b"text" + after == event("text")
    assert events.around_text(event("a") + event("b")) == (b"", b"")
    assert events.around_text(event('quo"te')) == (b"", b"")
    assert events.around_text(USAGE) == (b"", b"")

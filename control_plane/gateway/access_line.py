"""A line of the access log as text. It is put together by hand, as it is written for every request: an encoder of objects costs twice
as much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from control_plane.gateway.tenths import to_tenths
from control_plane.live_state import LiveState, RequestFields

if TYPE_CHECKING:
    from control_plane.gateway.sink import ClientSink

#: parts kept of each kind
MAX_KEPT: Final = 4096
#: characters kept of what a client chose
MAX_PATH: Final = 200
MAX_TENANT: Final = 128


class Line:
    """One request. Milliseconds from acceptance, negative: that point was not reached; no text of prompts or answers, ever. What is
    empty, or an attempt and not more, is left out."""

    __slots__ = (
        "attempts",
        "code",
        "input_tokens",
        "instance",
        "method",
        "model",
        "output_tokens",
        "path",
        "queue_ms",
        "request_id",
        "status",
        "tenant",
        "total_ms",
        "ttft_ms",
    )

    def __init__(self, request_id: str, method: str, path: str, status: int, total_ms: float = 0.0, code: str = "") -> None:
        self.request_id = request_id
        self.method = method
        self.path = path
        self.status = status
        self.total_ms = total_ms
        self.code = code
        self.tenant = ""
        self.model = ""
        self.instance = ""
        self.queue_ms = -1.0
        self.ttft_ms = -1.0
        self.input_tokens = -1
        self.output_tokens = -1
        self.attempts = 1


def line_of(sink: ClientSink, status: int, code: str, now_s: float) -> Line:
    """The line of an answer that has ended."""
    job, exchange = sink.job, sink.exchange
    assert exchange is not None
    line = Line(sink.request_id, exchange.method, exchange.path[:MAX_PATH], status, 0.0, code)
    if job is not None:
        arrival_s = job.arrival_s
        line.total_ms = (now_s - arrival_s) * 1000.0
        fields: RequestFields = job.request
        line.tenant = fields.tenant[:MAX_TENANT]
        line.model = job.lane.model
        line.attempts = job.attempts
        if job.instance is not None:
            live: LiveState = job.instance
            line.instance = live.instance_id
            line.queue_ms = (job.scheduled_s - arrival_s) * 1000.0
        if job.first_token_s:
            line.ttft_ms = (job.first_token_s - arrival_s) * 1000.0
        if job.usage is not None:
            line.input_tokens = job.usage.prompt_tokens
            line.output_tokens = job.usage.completion_tokens
        else:
            line.output_tokens = job.output_tokens
    return line


class LineWriter:
    """Lines as JSON. The parts that come again and again (method and path; tenant, model and instance) are put together once."""

    __slots__ = ("_what", "_who")

    def __init__(self) -> None:
        self._what: dict[tuple[str, str], str] = {}
        self._who: dict[tuple[str, str, str], str] = {}

    def text(self, time: str, line: Line) -> str:
        request_id = line.request_id
        # ids are visible ASCII, almost always without the two characters that JSON escapes
        if '"' in request_id or "\\" in request_id:
            request_id = _json(request_id)[1:-1]
        what = self._what.get((line.method, line.path)) or self._new_what(line.method, line.path)
        who = self._who.get((line.tenant, line.model, line.instance)) or self._new_who(line.tenant, line.model, line.instance)
        code = f',"code":"{line.code}"' if line.code else ""
        times = f',"queue_ms":{to_tenths(line.queue_ms)}' if line.instance else ""
        if line.ttft_ms >= 0.0:
            times = f'{times},"ttft_ms":{to_tenths(line.ttft_ms)}'
        read = f',"input_tokens":{line.input_tokens}' if line.input_tokens >= 0 else ""
        made = f',"output_tokens":{line.output_tokens}' if line.output_tokens >= 0 else ""
        tries = f',"attempts":{line.attempts}' if line.attempts != 1 else ""
        total = to_tenths(line.total_ms)
        return f'{{"time":"{time}","request_id":"{request_id}"{what}{line.status},"total_ms":{total}{code}{who}{times}{read}{made}{tries}}}'

    def _new_what(self, method: str, path: str) -> str:
        if len(self._what) >= MAX_KEPT:
            self._what.clear()
        text = f',"method":{_json(method)},"path":{_json(path)},"status":'
        self._what[method, path] = text
        return text

    def _new_who(self, tenant: str, model: str, instance: str) -> str:
        if len(self._who) >= MAX_KEPT:
            self._who.clear()
        named = (("tenant", tenant), ("model", model), ("instance", instance))
        text = "".join([f',"{name}":{_json(value)}' for name, value in named if value])
        self._who[tenant, model, instance] = text
        return text


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()

"""An engine without a network, for tests of everything above it: it does what its script says, when the test says so."""

from __future__ import annotations

import json
from collections.abc import Callable

from control_plane.errors import InstanceFailed
from control_plane.protocols import Call, EngineOutcome, Sink, WireRequest
from control_plane.types import ExecutionInstance, Leg, RequestMetadata, Usage

ANSWER = b'{"choices":[{"text":"ok"}]}'


class ScriptedCall:
    """One request on a scripted engine; the test ends it."""

    def __init__(self, engine: ScriptedEngine, wire: WireRequest, sink: Sink, request: RequestMetadata) -> None:
        self.engine = engine
        self.wire = wire
        self.sink = sink
        self.request = request
        self.cancelled = False
        self.ended = False

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True

    def answer(self, body: bytes = ANSWER, tokens: int = 1) -> None:
        """A whole good answer."""
        self.ended = True
        self.sink.started(200, [(b"content-type", b"application/json")], self)
        self.sink.chunk(body)
        self.sink.finished(EngineOutcome(Usage(1, tokens, exact=True)))

    def begin(self, data: bytes = b'data: {"choices":[{"text":"o"}]}\n\n') -> None:
        """The first event of a stream."""
        self.sink.started(200, [(b"content-type", b"text/event-stream")], self)
        self.sink.tokens(1, 1.0, 1.0)
        self.sink.chunk(data)

    def finish_stream(self, tokens: int = 2) -> None:
        """The end of a stream that was begun."""
        self.ended = True
        self.sink.chunk(b"data: [DONE]\n\n")
        self.sink.finished(EngineOutcome(Usage(1, tokens, exact=True)))

    def fail(self, error: InstanceFailed) -> None:
        self.ended = True
        self.sink.failed(error)


class ScriptedEngine:
    """Satisfies the Engine protocol. ``on_start`` may end a request at once; without it the test does, through ``calls``."""

    def __init__(self, instance: ExecutionInstance, on_start: Callable[[ScriptedCall], None] | None = None) -> None:
        self.instance = instance
        self.on_start = on_start
        self.calls: list[ScriptedCall] = []
        #: names that its server tells; None: that of its instance
        self.models: list[str] | None = None
        #: it was asked for its models, with which a look at a server ends
        self.looked_at = False

    def start(self, leg: Leg, wire: WireRequest, sink: Sink, request: RequestMetadata) -> Call:
        call = ScriptedCall(self, wire, sink, request)
        self.calls.append(call)
        if self.on_start is not None:
            self.on_start(call)
        return call

    @property
    def open(self) -> list[ScriptedCall]:
        return [call for call in self.calls if not call.ended and not call.cancelled]

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        if path == "/v1/models":
            self.looked_at = True
            names = self.models if self.models is not None else [self.instance.model_name]
            return 200, json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names if name]}).encode()
        return 200, b""

    async def close(self) -> None: ...

"""One short request to a new or restarted server before it gets traffic: compilation and allocation happen there, not under a user."""

from __future__ import annotations

import asyncio

import msgspec

from control_plane.errors import ControlPlaneError, InstanceFailed
from control_plane.protocols import Call, Engine, EngineOutcome, Headers, WireRequest
from control_plane.types import ExecutionInstance, Leg, RequestKind, RequestMetadata

_TEXT = "warm-up"
#: the cheapest request of each kind that runs the model once, in the order in which they are preferred
_BODIES: dict[RequestKind, tuple[str, dict[str, object]]] = {
    RequestKind.COMPLETION: ("/v1/completions", {"prompt": _TEXT, "max_tokens": 1}),
    RequestKind.CHAT: ("/v1/chat/completions", {"messages": [{"role": "user", "content": _TEXT}], "max_tokens": 1}),
    RequestKind.EMBEDDING: ("/v1/embeddings", {"input": _TEXT}),
    RequestKind.SCORE: ("/v1/score", {"text_1": _TEXT, "text_2": _TEXT}),
    RequestKind.RERANK: ("/v1/rerank", {"query": _TEXT, "documents": [_TEXT]}),
}


class _Ended:
    """A Sink that only waits for the end."""

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def started(self, status: int, headers: Headers, call: Call) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def tokens(self, n: int, first_s: float, last_s: float) -> None: ...

    def finished(self, outcome: EngineOutcome) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def failed(self, error: ControlPlaneError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


async def warm_up(engine: Engine, instance: ExecutionInstance, timeout_s: float) -> None:
    """Run one request of a kind that the server can do. Raises what the engine failed with, InstanceFailed after ``timeout_s``."""
    kind = next((kind for kind in _BODIES if instance.can_do(kind)), RequestKind.COMPLETION)
    path, fields = _BODIES[kind]
    wire = WireRequest(path, msgspec.json.encode({"model": instance.model_name, **fields}))
    request = RequestMetadata(request_id=f"warmup-{instance.instance_id}", model_name=instance.model_name, kind=kind, prompt=_TEXT)
    sink = _Ended()
    call = engine.start(Leg(instance.instance_id), wire, sink, request)
    try:
        async with asyncio.timeout(timeout_s):
            await sink.future
    except TimeoutError:
        message = f"the warm-up request was not answered within {timeout_s:g} s"
        raise InstanceFailed(message, instance_id=instance.instance_id, timed_out=True) from None
    finally:
        call.cancel()

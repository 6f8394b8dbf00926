"""Streamed completions whose tokens are timed as they come in, never more at once than was agreed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from control_plane.clock import Clock
from control_plane.engines.events import EventSplitter, error_status, find_error, find_usage
from control_plane.errors import ControlPlaneError, EngineError
from control_plane.protocols import Headers
from control_plane.transport import ClientLimits, HttpClient

__all__ = ["HttpLoad", "Load", "Prompt", "Stream"]

#: a stream that brings nothing for so long has hung
SILENCE_S: Final = 120.0
_HEADERS: Final[Headers] = ((b"content-type", b"application/json"),)
#: token ids, or a text
Prompt = list[int] | str


class Load(Protocol):
    """A server and what is asked of it. Tests bring one in virtual time.

    Attributes:
        model: which of its models is asked; set by :func:`~control_plane.calibration.server.ask_server`.
        most: requests that may be under way at once.
        active: requests under way.
        requests: sent so far.
        prompt_tokens: of those that are over.
    """

    url: str
    model: str
    most: int
    active: int
    requests: int
    prompt_tokens: int

    @property
    def now_s(self) -> Callable[[], float]: ...
    def start(self, prompt: Prompt, output_tokens: int, *, priority: int = 0) -> Stream: ...
    async def get(self, path: str) -> tuple[int, bytes]: ...
    async def post(self, path: str, body: object) -> tuple[int, bytes]: ...


class Stream:
    """The receiver of one answer.

    Attributes:
        sent_s, ended_s: monotonic seconds; 0.0: not yet.
        token_s: when each event with a token came.
        output_tokens, cached_tokens: as the server counts them at the end; None: not told.
    """

    def __init__(self, prompt_tokens: int, now_s: Callable[[], float], over: Callable[[Stream], None]) -> None:
        #: as asked for; as the server counts them once it is over
        self.prompt_tokens = prompt_tokens
        self.sent_s = now_s()
        self.ended_s = 0.0
        self.token_s: list[float] = []
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.error: ControlPlaneError | None = None
        self._now_s = now_s
        self._over = over
        self._status = 0
        self._events = EventSplitter()
        self._body = b""
        #: resolved, with the stream, as soon as so many tokens are there, or it is over
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []
        self._drop: Callable[[], None] | None = None

    async def tokens(self, count: int) -> None:
        """Wait for so many tokens. Raises what ended it before."""
        await self._wait(count)

    async def end(self) -> Stream:
        """Wait for its end. Raises ControlPlaneError when it was not a good one."""
        await self._wait(1 << 60)
        return self

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def counted(self) -> bool:
        """Each of its tokens came in an event of its own."""
        return self.output_tokens == len(self.token_s)

    def cancel(self) -> None:
        """Drop it; nothing more comes."""
        if not self.ended_s:
            if self._drop is not None:
                self._drop()
            self.end_now()

    def can_be_dropped(self, drop: Callable[[], None]) -> None:
        self._drop = drop

    async def _wait(self, count: int) -> None:
        if len(self.token_s) < count and not self.ended_s:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaited.append((count, future))
            await future
        if self.error is not None:
            raise self.error

    # ---- Receiver

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status

    def on_body(self, data: bytes) -> None:
        if self._status != 200:
            self._body += data[:4_096]
            return
        events = self._events.feed(data)
        if not events:
            return
        found = events.count(b"data: {")
        if events.rfind(b'"usage":{') >= 0 and (usage := find_usage(events)) is not None:
            found -= 1
            self.output_tokens, self.cached_tokens = usage.completion_tokens, usage.cached_tokens
            self.prompt_tokens = usage.prompt_tokens or self.prompt_tokens
        if (found_error := find_error(events)) is not None:
            self.error = EngineError(error_status(found_error), found_error)
            return
        if found:
            self.came(found)

    def on_complete(self) -> None:
        if self._status != 200:
            self.error = EngineError(self._status, self._body)
        self.end_now()

    def on_error(self, error: ControlPlaneError) -> None:
        self.error = error
        self.end_now()

    # ---- what happens to it

    def came(self, tokens: int) -> None:
        """So many tokens have come now."""
        self.token_s.extend([self._now_s()] * tokens)
        if self._awaited:
            self._wake()

    def end_now(self) -> None:
        """It is over."""
        self.ended_s = self._now_s()
        self._over(self)
        self._wake()

    def _wake(self) -> None:
        here = len(self.token_s) if not self.ended_s else 1 << 60
        for count, future in self._awaited:
            if count <= here and not future.done():
                future.set_result(None)
        self._awaited = [one for one in self._awaited if one[0] > here]


class HttpLoad:
    """Implements :class:`Load`: a server over HTTP."""

    def __init__(self, url: str, clock: Clock, *, most: int, api_key: str | None = None) -> None:
        """Raises ConfigurationError: no URL of a server."""
        headers: Headers = ((b"authorization", b"Bearer " + api_key.encode()),) if api_key else ()
        limits = ClientLimits(chunk_timeout_s=SILENCE_S, first_byte_timeout_s=SILENCE_S)
        self._client = HttpClient(url, limits=limits, headers=headers)
        self.url = self._client.base_url
        self.now_s = clock.now_s
        self.model = ""
        self.most = most
        self.active = 0
        self.requests = 0
        self.prompt_tokens = 0

    def start(self, prompt: Prompt, output_tokens: int, *, priority: int = 0) -> Stream:
        """Send one now; ``priority`` as vLLM takes it, lower first.

        Raises RuntimeError above the agreed number: a mistake of the caller's.
        """
        if self.active >= self.most:
            raise RuntimeError(f"{self.most} requests are under way already")
        body: dict[str, object] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if priority:
            body["priority"] = priority
        encoded = msgspec.json.encode(body)
        tokens = 0 if isinstance(prompt, str) else len(prompt)
        self.active += 1
        self.requests += 1
        stream = Stream(tokens, self.now_s, self._over)
        call = self._client.send("POST", "/v1/completions", _HEADERS, encoded, stream)
        stream.can_be_dropped(call.cancel)
        return stream

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a page. Raises InstanceFailed."""
        status, _, body = await self._client.fetch("GET", path, timeout_s=30.0)
        return status, body

    async def post(self, path: str, body: object) -> tuple[int, bytes]:
        """Status and body of an answer that is not streamed. Raises InstanceFailed."""
        status, _, answer = await self._client.fetch("POST", path, headers=_HEADERS, body=msgspec.json.encode(body), timeout_s=30.0)
        return status, answer

    async def close(self) -> None:
        """Drop what is under way: a server gives up a stream whose client is gone."""
        await self._client.close()

    def _over(self, stream: Stream) -> None:
        self.active -= 1
        self.prompt_tokens += stream.prompt_tokens

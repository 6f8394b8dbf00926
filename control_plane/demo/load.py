"""The demo's load: classes of chat requests, when each comes, and what its client sees.

The client is one callback object a request on the pooled HTTP client, so that measuring costs little beside what is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from control_plane.clock import Clock
from control_plane.errors import ControlPlaneError
from control_plane.protocols import Headers
from control_plane.transport import HttpClient


@dataclass(frozen=True, slots=True)
class LoadClass:
    """A kind of traffic. ``share`` of all requests; targets in milliseconds, None: none asked for."""

    name: str
    share: float
    priority: str
    prompt_words: tuple[int, int]
    output_tokens: tuple[int, int]
    ttft_slo_ms: float | None = None
    slo_deadline_ms: float | None = None

    @property
    def target(self) -> str:
        """What it asked for, in words."""
        if self.ttft_slo_ms is not None:
            return f"TTFT {self.ttft_slo_ms / 1e3:g} s"
        return f"done in {self.slo_deadline_ms / 1e3:g} s" if self.slo_deadline_ms is not None else "none"


CLASSES = (
    LoadClass("interactive", 0.5, "high", (20, 200), (20, 120), ttft_slo_ms=500.0),
    LoadClass("standard", 0.3, "normal", (50, 600), (50, 250), slo_deadline_ms=6_000.0),
    LoadClass("batch", 0.2, "background", (300, 1_500), (150, 400), slo_deadline_ms=45_000.0),
)
WORDS = ("the", "queue", "holds", "what", "no", "engine", "has", "room", "for", "and", "waits", "until", "one", "is", "free")
#: conversations that share the beginning of their prompt
SESSIONS = 12


@dataclass(slots=True)
class Seen:
    """What the client of one request saw. Monotonic seconds; 0.0: not reached."""

    load_class: LoadClass
    number: int
    sent_s: float
    first_s: float = 0.0
    end_s: float = 0.0
    status: int = 0
    chunks: int = 0
    request_id: str = ""
    instance_id: str = ""
    queue_ms: float = 0.0
    decision: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def completed(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def ttft_ms(self) -> float:
        return (self.first_s - self.sent_s) * 1e3

    @property
    def e2e_ms(self) -> float:
        return (self.end_s - self.sent_s) * 1e3

    @property
    def good(self) -> bool:
        """It completed and met its target."""
        wanted = self.load_class
        if not self.completed:
            return False
        if wanted.ttft_slo_ms is not None and self.ttft_ms > wanted.ttft_slo_ms:
            return False
        return wanted.slo_deadline_ms is None or self.e2e_ms <= wanted.slo_deadline_ms


class ChatClient:
    """The receiver of one streamed answer; writes into ``seen`` and calls ``done`` at its end."""

    __slots__ = ("_clock", "_done", "_tail", "seen")

    def __init__(self, seen: Seen, clock: Clock, done: Callable[[Seen], None]) -> None:
        self.seen = seen
        self._clock = clock
        self._done = done
        self._tail = b""

    def on_head(self, status: int, headers: Headers) -> None:
        seen, found = self.seen, dict(headers)
        seen.status = status
        seen.request_id = found.get(b"x-request-id", b"").decode()
        seen.instance_id = found.get(b"x-instance-id", b"").decode()
        seen.queue_ms = float(found.get(b"x-queue-ms", b"0"))
        if decision := found.get(b"x-decision"):
            seen.decision = msgspec.json.decode(decision)

    def on_body(self, data: bytes) -> None:
        seen = self.seen
        if not seen.first_s:
            seen.first_s = self._clock.now_s()
        seen.chunks += data.count(b"data: ")
        self._tail = (self._tail + data)[-1_000:]

    def on_complete(self) -> None:
        seen = self.seen
        if seen.status != 200:
            seen.error = f"{seen.status} {_code(self._tail)}"
        elif not self._tail.rstrip().endswith(b"data: [DONE]"):
            seen.error = f"cut: {_code(self._tail.rpartition(b'data: ')[2])}"
        self._end()

    def on_error(self, error: ControlPlaneError) -> None:
        self.seen.error = f"connection: {error}"
        self._end()

    def _end(self) -> None:
        self.seen.end_s = self._clock.now_s()
        self._done(self.seen)


class Load:
    """Sends requests at ``rate_rps`` (exponential gaps) for ``duration_s`` and gathers what their clients saw."""

    def __init__(self, client: HttpClient, clock: Clock, model: str, *, rate_rps: float, duration_s: float, seed: int) -> None:
        self._client = client
        self._clock = clock
        self._model = model
        self._rate_rps = rate_rps
        self._duration_s = duration_s
        self._rng = Random(seed)
        self._ended = asyncio.Event()
        self.sent = 0
        self.seen: list[Seen] = []

    async def run(self) -> None:
        """Until the last answer has ended."""
        began_s = self._clock.now_s()
        for at_s, load_class in self._plan():
            await asyncio.sleep(max(0.0, began_s + at_s - self._clock.now_s()))
            self._send(load_class)
        while len(self.seen) < self.sent:
            self._ended.clear()
            await self._ended.wait()

    def _plan(self) -> Iterator[tuple[float, LoadClass]]:
        at_s = self._rng.expovariate(self._rate_rps)
        while at_s < self._duration_s:
            yield at_s, self._rng.choices(CLASSES, [one.share for one in CLASSES])[0]
            at_s += self._rng.expovariate(self._rate_rps)

    def _send(self, load_class: LoadClass) -> None:
        body = msgspec.json.encode(self._chat(load_class))
        seen = Seen(load_class, self.sent, self._clock.now_s())
        self.sent += 1
        headers = [(b"content-type", b"application/json"), (b"x-explain", b"1"), *_targets(load_class)]
        self._client.send("POST", "/v1/chat/completions", headers, body, ChatClient(seen, self._clock, self._one_ended))

    def _chat(self, load_class: LoadClass) -> dict[str, Any]:
        rng = self._rng
        session = rng.randrange(SESSIONS)
        system = " ".join(WORDS[(session + step) % len(WORDS)] for step in range(100))
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(*load_class.prompt_words)))
        messages = [{"role": "system", "content": f"Conversation {session}. {system}"}, {"role": "user", "content": words}]
        return {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "max_tokens": rng.randint(*load_class.output_tokens),
            "ignore_eos": True,
            "user": f"user-{session}",
        }

    def _one_ended(self, seen: Seen) -> None:
        self.seen.append(seen)
        self._ended.set()


def _targets(load_class: LoadClass) -> Iterator[tuple[bytes, bytes]]:
    yield b"x-priority", load_class.priority.encode()
    if load_class.ttft_slo_ms is not None:
        yield b"x-slo-ttft-ms", b"%g" % load_class.ttft_slo_ms
    if load_class.slo_deadline_ms is not None:
        yield b"x-slo-deadline-ms", b"%g" % load_class.slo_deadline_ms


def _code(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:80].decode("utf-8", "replace").strip() or "without a word"

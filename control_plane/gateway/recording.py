"""Recordings: the gateway's own traffic as a trace, one JSON line for each answered request, without its texts.

A line holds when the request came, its lengths in tokens, hashes of the pieces of its prompt (each over everything before it, so that
equal hashes mean equal beginnings), and who asked, under a pseudonym. Hashes and pseudonyms are keyed with a random salt of the
recording, which is held in memory only and forgotten with it: nobody can try texts or names against a trace, or join two of them.

While nobody records, nothing of this runs. While somebody does, a request costs a second reading of its body, and a hash of it, at its
end. What a reader does not fetch in time is bounded, dropped and counted.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b
from typing import Any, Final, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from control_plane.clock import Clock
from control_plane.errors import RateLimited
from control_plane.gateway.sink import ClientSink
from control_plane.job import Job
from control_plane.types import RequestKind

#: bytes of a prompt's JSON that one block id stands for: about 256 tokens
BLOCK_BYTES: Final = 1024
#: pieces of one prompt that get an id, more than any context holds: hashing stops the event loop, some 7 µs a piece
MAX_BLOCKS: Final = 2_048
#: recordings at a time: each hashes all prompts with its own salt
MAX_RECORDINGS: Final = 4
#: lines kept for a reader that is slow; beyond it the newest are dropped
MAX_WAITING_BYTES: Final = 8 * 1024 * 1024
FLUSH_INTERVAL_S: Final = 0.25
#: an empty line after so long without a request, so that a reader knows that we are here
KEEPALIVE_S: Final = 2.0
_KINDS: Final = frozenset((RequestKind.CHAT, RequestKind.COMPLETION))
_MEDIA: Final = re.compile(rb";base64,[A-Za-z0-9+/=_-]*")
#: a media file counts as 2,048 bytes of text, as it does for the size of the prompt
_MEDIA_DIGESTS: Final = 2048 // 64
_VERSION: Final = 1


class _Prompt(Struct, gc=False):
    """The members that make up what a model reads."""

    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    system: Raw | UnsetType = UNSET
    instructions: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET


_decode: Final = msgspec.json.Decoder(_Prompt).decode


class Hooked(Protocol):
    """What tells of ends: the relay."""

    on_end: Callable[[ClientSink, int], None] | None


class Recording:
    """One recording under way: its salt, and the lines that its reader has not fetched yet.

    Attributes:
        recorded: lines made. left_out: requests without an answer to measure (refused, failed, embeddings). dropped: lines lost since
            the reader was too slow.
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.recorded = 0
        self.left_out = 0
        self.dropped = 0

    def add(self, job: Job, prompt: bytes, came_s: float, prompt_tokens: int, output_tokens: int) -> None:
        """Note one request. ``came_s``: seconds since 1970."""
        request = job.request
        line: dict[str, Any] = {"arrival_s": round(came_s, 4), "prompt_tokens": max(1, prompt_tokens), "output_tokens": output_tokens}
        if prompt:
            line["prompt_bytes"] = max(1, request.prompt_bytes)
            line["block_ids"] = self.blocks(prompt)
        if request.session_id:
            line["session_id"] = self.pseudonym("session", request.session_id)
        if request.tenant_id or request.user_id:
            line["tenant"] = self.pseudonym("tenant", request.tenant)
        if objective := request.tags.get("objective"):
            line["slo_class"] = objective
        if (priority := request.priority.name.lower()) != "normal":
            line["priority"] = priority
        for name in ("ttft_slo_ms", "tpot_slo_ms", "slo_deadline_ms"):
            if (target := getattr(request, name)) is not None:
                line[name] = target
        text = msgspec.json.encode(line) + b"\n"
        if self._bytes + len(text) > MAX_WAITING_BYTES:
            self.dropped += 1
            return
        self.recorded += 1
        self._lines.append(text)
        self._bytes += len(text)

    def blocks(self, prompt: bytes) -> list[int]:
        """Keyed hashes of the prompt's pieces, each over all before it; 48 bits, which JSON's readers keep whole."""
        hasher = blake2b(key=self._salt, digest_size=6, person=b"block")
        found = []
        for start in range(0, min(len(prompt), BLOCK_BYTES * MAX_BLOCKS), BLOCK_BYTES):
            hasher.update(prompt[start : start + BLOCK_BYTES])
            found.append(int.from_bytes(hasher.copy().digest(), "big"))
        return found

    def pseudonym(self, kind: str, name: str) -> str:
        """The same for the same name in this recording, and nowhere else."""
        return blake2b(name.encode("utf-8", "replace"), key=self._salt, digest_size=6, person=kind.encode()).hexdigest()

    def header(self) -> bytes:
        return msgspec.json.encode({"trace": _VERSION, "block_bytes": BLOCK_BYTES, "source": "control-plane record"}) + b"\n"

    def footer(self) -> bytes:
        """How it went, as a line that readers of traces pass over."""
        told = {
            "trace": _VERSION,
            "block_bytes": BLOCK_BYTES,
            "recorded": self.recorded,
            "left_out": self.left_out,
            "dropped": self.dropped,
        }
        return msgspec.json.encode(told) + b"\n"

    def fetch(self) -> bytes:
        """The lines that wait."""
        found = b"".join(self._lines)
        self._lines.clear()
        self._bytes = 0
        return found

    def close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


class Recorder:
    """The recordings of one gateway. Hears of the relay's ends only while there are some."""

    def __init__(self, relay: Hooked, clock: Clock) -> None:
        self._relay = relay
        self._clock = clock
        self._recordings: list[Recording] = []

    def start(self) -> Recording:
        """Raises RateLimited where as many are under way as may be."""
        if len(self._recordings) >= MAX_RECORDINGS:
            raise RateLimited(f"{MAX_RECORDINGS} recordings are under way; end one of them first", retry_after_s=10.0)
        recording = Recording()
        self._recordings.append(recording)
        self._relay.on_end = self._ended
        return recording

    def stop(self, recording: Recording) -> None:
        """May repeat."""
        recording.close()
        if recording in self._recordings:
            self._recordings.remove(recording)
        if not self._recordings:
            self._relay.on_end = None

    def close(self) -> None:
        """End all; their readers get what is left."""
        for recording in self._recordings:
            recording.close()

    async def lines(self, recording: Recording, duration_s: float | None) -> AsyncIterator[bytes]:
        """The recording as it grows, for ``duration_s`` or until it is closed; then it is ended. Whole lines, several at a time."""
        end_s = float("inf") if duration_s is None else self._clock.now_s() + duration_s
        told_s = self._clock.now_s()
        try:
            yield recording.header()
            while not recording.closed.done() and (now_s := self._clock.now_s()) < end_s:
                await asyncio.wait((recording.closed,), timeout=min(FLUSH_INTERVAL_S, end_s - now_s))
                found = recording.fetch()
                if found or now_s - told_s >= KEEPALIVE_S:
                    told_s = now_s
                    yield found or b"\n"
            yield recording.fetch() + recording.footer()
        finally:
            self.stop(recording)

    def _ended(self, sink: ClientSink, status: int) -> None:
        job = sink.job
        tokens = None if job is None or status not in (200, 499) or sink.endpoint.kind not in _KINDS else _lengths(job)
        if job is None or tokens is None:
            for recording in self._recordings:
                recording.left_out += 1
            return
        came_s = self._clock.utc(job.arrival_s).timestamp()
        prompt = prompt_bytes(job.wire.body, sink.endpoint.prompt, sink.endpoint.preamble)
        for recording in self._recordings:
            recording.add(job, prompt, came_s, *tokens)


def prompt_bytes(body: bytes, prompt: str, preamble: str) -> bytes:
    """What a model reads of ``body``, in the order in which it reads it: tools, what comes before the prompt, the prompt. Files inside
    it are replaced by their hash. b"" where the body is no JSON object."""
    try:
        found = _decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    parts = [bytes(raw) for name in ("tools", preamble, prompt) if name and (raw := getattr(found, name)) is not UNSET]
    text = b"\n".join(parts)
    return _MEDIA.sub(_digest, text) if b";base64," in text else text


def _digest(found: re.Match[bytes]) -> bytes:
    return blake2b(found[0], digest_size=32).hexdigest().encode() * _MEDIA_DIGESTS


def _lengths(job: Job) -> tuple[int, int] | None:
    """Tokens of prompt and answer; None where no answer began."""
    if job.usage is not None:
        return job.usage.prompt_tokens, job.usage.completion_tokens
    return (job.input_tokens, job.output_tokens) if job.output_tokens else None

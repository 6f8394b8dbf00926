"""Learns which blocks a text is, beside the traffic: prompts that return are tokenised by the engine that runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from control_plane.clock import Clock
from control_plane.errors import InstanceFailed
from control_plane.fleet.prefix.blocks import ROOT, block_keys
from control_plane.fleet.prefix.index import PrefixIndex
from control_plane.fleet.prefix.learning import token_bytes, tokens_at
from control_plane.fleet.prefix.pieces import ENDS, MAX_COVERED_BYTES, chain
from control_plane.live_state import RequestFields
from control_plane.protocols import WireRequest
from control_plane.types import ExecutionInstance, RequestMetadata

#: prompts that wait to be learned, at most; what comes above is learned when it returns once more
MAX_WAITING: Final = 8
#: longest body that is kept for learning
MAX_BODY_BYTES: Final = 1024 * 1024
TIMEOUT_S: Final = 10.0
#: an engine that does not tokenise is asked again after so long
PAUSE_S: Final = 60.0
_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
#: members of a chat that change how it is rendered; ``/tokenize`` takes them too
_RENDERED: Final = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)


class _Body(Struct, gc=False):
    """What of a request's body makes its prompt."""

    model: str | None = None
    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    cache_salt: str | None = None
    tools: Raw | UnsetType = UNSET
    add_generation_prompt: Raw | UnsetType = UNSET
    continue_final_message: Raw | UnsetType = UNSET
    add_special_tokens: Raw | UnsetType = UNSET
    chat_template: Raw | UnsetType = UNSET
    chat_template_kwargs: Raw | UnsetType = UNSET
    mm_processor_kwargs: Raw | UnsetType = UNSET


class _Tokens(Struct, gc=False):
    tokens: list[int]
    token_strs: list[str] | None = None


_read_body: Final = msgspec.json.Decoder(_Body).decode
_read_tokens: Final = msgspec.json.Decoder(_Tokens).decode
_read_ids: Final = msgspec.json.Decoder(list[int]).decode


class Tokenizing(Protocol):
    """An engine that can be asked more than :class:`~control_plane.protocols.Engine` says."""

    async def post(self, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """One small unary POST beside the traffic. Raises InstanceFailed."""


class _Lesson(NamedTuple):
    request: RequestMetadata
    instance: ExecutionInstance
    pieces: tuple[Any, ...]
    #: the prompt as the chain was made of it; b"": as it stands in the body
    text: bytes
    body: bytes


class PrefixLearner:
    """``engine_of`` gives what runs an instance's requests, or None; one without ``post`` teaches nothing."""

    def __init__(self, index: PrefixIndex, clock: Clock, engine_of: Callable[[str], object | None]) -> None:
        self._index = index
        self._clock = clock
        self._engine_of = engine_of
        self._per_s = index.settings.learn_per_s
        self._next_s = float("-inf")
        self._waiting: list[_Lesson] = []
        self._task: asyncio.Task[None] | None = None
        self._pauses: dict[str, float] = {}
        #: prompts learned, and those of which nothing could be learned
        self.learned = 0
        self.unlearned = 0

    def consider(self, request: RequestMetadata, wire: WireRequest, instance: ExecutionInstance) -> None:
        """``request`` runs there now, and some of its head was sent before (:meth:`PrefixIndex.returns`)."""
        if not self._per_s or len(self._waiting) >= MAX_WAITING or len(wire.body) > MAX_BODY_BYTES or wire.path not in _PATHS:
            return
        now_s = self._clock.now_s()
        if now_s < self._next_s or now_s < self._pauses.get(instance.instance_id, now_s):
            return
        self._next_s = now_s + 1.0 / self._per_s
        fields: RequestFields = request
        text = b"" if fields.prompt_head else request.head(MAX_COVERED_BYTES)
        self._waiting.append(_Lesson(request, instance, chain(request), text, wire.body))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._learn_waiting())

    async def close(self) -> None:
        task, self._task = self._task, None
        self._waiting.clear()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _learn_waiting(self) -> None:
        while self._waiting:
            lesson = self._waiting.pop(0)
            try:
                done = await self._learn(lesson)
            except (InstanceFailed, msgspec.MsgspecError, UnicodeDecodeError):
                self._pauses[lesson.instance.instance_id] = self._clock.now_s() + PAUSE_S
                done = False
            if done:
                self.learned += 1
            else:
                self.unlearned += 1

    async def _learn(self, lesson: _Lesson) -> bool:
        body = _read_body(lesson.body)
        prompt = body.prompt if body.messages is UNSET else body.messages
        if prompt is UNSET:
            return False
        raw = bytes(prompt)
        if raw[:1] == b"[" and body.messages is UNSET:
            if not raw[1:].lstrip()[:1].isdigit():
                return False  # several prompts
            found = _Tokens(_read_ids(raw))
            spelled = _as_json(lesson.text or raw)
        else:
            asked = await self._ask(lesson, body)
            if asked is None or asked.token_strs is None:
                return False
            found, spelled = asked, token_bytes(asked.token_strs)
        block_tokens = self._index.block_tokens(lesson.instance)
        if not block_tokens:
            return False
        keys = self._known_keys(found.tokens, block_tokens, body, lesson.instance)
        if not keys:
            return False
        places = ENDS[: len(lesson.pieces)]
        self._index.learn(block_tokens, lesson.pieces, tokens_at(lesson.text or raw, places, spelled), keys)
        return True

    async def _ask(self, lesson: _Lesson, body: _Body) -> _Tokens | None:
        engine = self._engine_of(lesson.instance.instance_id)
        post = getattr(engine, "post", None)
        if post is None:
            return None
        asked: dict[str, Any] = {"model": body.model, "return_token_strs": True}
        if body.messages is UNSET:
            asked["prompt"] = body.prompt
            asked["add_special_tokens"] = body.add_special_tokens
        else:
            asked["messages"] = body.messages
            asked.update((name, getattr(body, name)) for name in _RENDERED)
        sent = msgspec.json.encode({name: value for name, value in asked.items() if value is not UNSET and value is not None})
        status, answer = await post("/tokenize", sent, TIMEOUT_S)
        if status != 200:
            self._pauses[lesson.instance.instance_id] = self._clock.now_s() + PAUSE_S
            return None
        return _read_tokens(answer)

    def _known_keys(self, tokens: list[int], block_tokens: int, body: _Body, instance: ExecutionInstance) -> list[Any]:
        """The keys of the prompt's blocks, in the form in which the engines hold its first one; [] where nobody holds it, and it cannot
        be told what else its blocks depend on (a model's name may be an adapter's)."""
        blocks = len(tokens) // block_tokens
        adapter = [body.model] if body.model else []
        salt = [body.cache_salt] if body.cache_salt else []
        for named in ([], adapter):
            extra = [msgspec.msgpack.encode(named + salt) if named + salt else b""]
            extra += [msgspec.msgpack.encode(named) if named else b""] * (blocks - 1)
            keys = block_keys(tokens, block_tokens, ROOT, extra)
            if keys and self._index.knows(block_tokens, keys[0]):
                return keys
        return []


def _as_json(raw: bytes) -> list[bytes]:
    """A list of token ids as its JSON spells it, one piece a token."""
    pieces = raw.split(b",")
    return [pieces[0], *(b"," + piece for piece in pieces[1:])]

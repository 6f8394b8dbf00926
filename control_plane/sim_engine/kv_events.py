"""KV events as vLLM publishes them: which blocks a simulated engine holds, over ZMQ, for ``--kv-events-config``.

A PUB socket sends one message a step: topic, number (8 bytes, big-endian), msgpack ``[timestamp, [event, ...], rank]``. A ROUTER socket
answers a number with all kept batches from it on, each with an empty frame before it, and ends with the number -1.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from control_plane.engines.kv_blocks import CacheListener
from control_plane.errors import ConfigurationError
from control_plane.sim_engine.choices import Choice

_END: Final = (-1).to_bytes(8, "big", signed=True)
_HASH_BYTES: Final = 8
MEDIUM: Final = "GPU"
KIND: Final = "full_attention"


class KvEventsConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's, by its names and with its defaults."""

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @classmethod
    def read(cls, given: str | Mapping[str, Any] | None) -> KvEventsConfig:
        """From JSON, or from a mapping. Raises ConfigurationError."""
        try:
            config = msgspec.json.decode(given, type=cls) if isinstance(given, str) else msgspec.convert(dict(given or {}), cls)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"kv_events_config: {error}", param="kv_events_config") from None
        if config.publisher not in (None, "null", "zmq"):
            raise ConfigurationError(f"kv_events_config: publisher {config.publisher!r} is not null or zmq", param="kv_events_config")
        return config

    @property
    def is_on(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


class _Stored(Struct, tag="BlockStored", omit_defaults=True):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: Sequence[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(Struct, tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None


class _Cleared(Struct, tag="AllBlocksCleared"):
    pass


class _Batch(Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]
    data_parallel_rank: int


_encode: Final = msgspec.msgpack.Encoder().encode


class KvPublisher(CacheListener):
    """Publishes one engine's events. ``unix_s`` tells the time that batches are stamped with.

    :attr:`drop_next` batches are numbered and kept for replay, but not sent: a fault for tests.
    """

    def __init__(self, config: KvEventsConfig, rank: int, block_tokens: int, unix_s: Callable[[], float]) -> None:
        self.config = config
        self.rank = rank
        self.endpoint = shifted(config.endpoint, rank)
        self.replay_endpoint = None if config.replay_endpoint is None else shifted(config.replay_endpoint, rank)
        self.drop_next = 0
        self._block_tokens = block_tokens
        self._unix_s = unix_s
        self._events: list[_Stored | _Removed | _Cleared] = []
        self._next = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: Any = None
        self._pub: Any = None
        self._router: Any = None

    @property
    def published(self) -> int:
        """Batches so far, sent or not."""
        return self._next

    # ---- the cache's listener

    def stored(self, owner: object, first: int, contents: Sequence[int]) -> None:
        choice = cast(Choice, owner)
        size = self._block_tokens
        end = (first + len(contents)) * size
        extra: list[list[str] | None] = [[choice.salt] if choice.salt and not first else None, *[None] * (len(contents) - 1)]
        self._events.append(
            _Stored(
                [_hash(content) for content in contents],
                _hash(choice.held[first - 1]) if first and first <= len(choice.held) else self._parent_of(choice, first),
                choice.first_tokens(end)[first * size :],
                size,
                None,
                MEDIUM,
                None,
                extra,
                0,
                KIND,
            )
        )

    def _parent_of(self, choice: Choice, first: int) -> bytes | None:
        return _hash(choice.hashes(first)[-1]) if first else None

    def removed(self, contents: Sequence[int]) -> None:
        """One event a block, as in vLLM."""
        self._events += [_Removed([_hash(content)], MEDIUM, 0) for content in contents]

    def cleared(self) -> None:
        self._events.append(_Cleared())

    # ---- the sockets

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind (or connect, where the address names no interface of its own, as in vLLM). Raises OSError (zmq.ZMQError)."""
        import zmq

        self._loop = loop
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(self.config.hwm)
        if "*" in self.endpoint or "::" in self.endpoint or self.endpoint.startswith(("ipc://", "inproc://")):
            self._pub.bind(self.endpoint)
            self.endpoint = _bound(self.endpoint, self._pub.getsockopt_string(zmq.LAST_ENDPOINT))
        else:
            self._pub.connect(self.endpoint)
        if self.replay_endpoint is not None:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.set_hwm(0)
            self._router.bind(self.replay_endpoint)
            self.replay_endpoint = _bound(self.replay_endpoint, self._router.getsockopt_string(zmq.LAST_ENDPOINT))
            loop.add_reader(self._router.getsockopt(zmq.FD), self._replay)

    def close(self) -> None:
        if self._context is None:
            return
        import zmq

        if self._router is not None and self._loop is not None:
            self._loop.remove_reader(self._router.getsockopt(zmq.FD))
        for socket in (self._pub, self._router):
            if socket is not None:
                socket.close(0)
        context, self._context = self._context, None
        self._pub = self._router = None
        context.destroy(0)

    def flush(self) -> None:
        """A step is over: publish what happened in it."""
        if not self._events or self._pub is None:
            return
        payload = _encode(_Batch(self._unix_s(), self._events, self.rank))
        self._events = []
        number = self._next.to_bytes(8, "big")
        self._next += 1
        self._kept.append((number, payload))
        if self.drop_next:
            self.drop_next -= 1
        else:
            self._pub.send_multipart((self.config.topic.encode(), number, payload))
        self._replay()  # sending may have used up the sign that somebody asked

    def _replay(self) -> None:
        import zmq

        while self._router is not None:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3:
                continue
            client, _, begin = frames
            topic = self.config.topic.encode()
            for number, payload in self._kept:
                if number >= begin:
                    self._router.send_multipart((client, b"", topic, number, payload))
            self._router.send_multipart((client, b"", b"", _END, b""))

    def told(self) -> dict[str, Any]:
        """Its entry of ``/kv_event_sources``."""
        known: dict[str, Any] = msgspec.to_builtins(self.config)
        return {**known, "publisher": "zmq", "endpoint": self.endpoint, "replay_endpoint": self.replay_endpoint}


def _hash(content: int) -> bytes:
    return content.to_bytes(_HASH_BYTES, "big")


def _bound(asked: str, bound: str) -> str:
    """The port that was found for 0, the address as it was asked for."""
    return asked if not asked.endswith(":0") else f"{asked.rpartition(':')[0]}:{bound.rpartition(':')[2]}"


def shifted(endpoint: str, rank: int) -> str:
    """A rank's own endpoint, as vLLM makes it: the next port, or a suffix."""
    if not rank:
        return endpoint
    if "inproc" in endpoint:
        return f"{endpoint}_dp{rank}"
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + rank}" if port.isdecimal() and int(port) else endpoint

"""Which prompts' beginnings each engine probably still holds: an approximate index kept from what was sent there.

A prompt's head is cut into pieces of PIECE_BYTES; each piece's hash covers all before it, so equal prefixes share a chain. Per instance
the pieces seen lately are kept, as many as its KV cache can hold tokens of; the oldest go first, as the engine's own eviction does.
Bytes stand in for tokens: nothing is tokenised here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import xxhash

from control_plane.live_state import RequestFields
from control_plane.types import ExecutionInstance, RequestMetadata

PIECE_BYTES: Final = 512
#: pieces looked at of one prompt
MAX_PIECES: Final = 8
#: usual bytes of one token of text
BYTES_PER_TOKEN: Final = 4
#: pieces kept of an instance that does not tell the size of its KV cache
DEFAULT_CAPACITY: Final = 4096
MAX_CAPACITY: Final = 65_536
#: of the newest piece that went, in the share of those that are missed
LOST_WEIGHT: Final = 1 / 256


class PrefixIndex:
    """Satisfies :class:`~control_plane.protocols.PrefixMatches`. About 120 bytes a piece kept."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[int, None]] = {}
        self._lost: dict[str, _Lost] = {}
        self._instances: dict[str, ExecutionInstance] = {}

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        """Tokens of the prompt's head that were sent there and are probably held still; whole pieces only."""
        return self._cached(chain(request), instance)

    def cached_tokens_of(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
        """:meth:`cached_tokens` on each of them; the prompt is looked at once."""
        pieces = chain(request)
        if not pieces:
            return [0] * len(instances)
        return [self._cached(pieces, instance) for instance in instances]

    def _cached(self, pieces: list[int], instance: ExecutionInstance) -> int:
        held = self._held.get(instance.instance_id)
        if not held or instance.engine.prefix_caching is False:
            return 0
        found = 0
        for piece in pieces:
            if piece not in held:
                break
            found += 1
        return found * PIECE_BYTES // BYTES_PER_TOKEN

    def holders(self, request: RequestMetadata, limit: int) -> list[ExecutionInstance]:
        """The instances that hold the most of the prompt, at most ``limit``, the most first."""
        pieces = chain(request)
        if not pieces:
            return []
        found: list[tuple[int, ExecutionInstance]] = []
        for name, held in self._held.items():
            if pieces[0] in held:
                instance = self._instances[name]
                found.append((self._cached(pieces, instance), instance))
        found.sort(key=lambda one: -one[0])
        return [instance for _, instance in found[:limit]]

    def lost_tokens(self, instance: ExecutionInstance, tokens: int) -> float:
        """How many tokens are expected to be computed again because ``tokens`` new ones take their room there: of those that went lately
        the share that was asked for within once more the time that the cache holds them."""
        held = self._held.get(instance.instance_id)
        lost = self._lost.get(instance.instance_id)
        if held is None or lost is None:
            return 0.0
        free = (capacity_pieces(instance) - len(held)) * PIECE_BYTES // BYTES_PER_TOKEN
        return lost.share * max(0, tokens - free)

    def sent(self, request: RequestMetadata, instance: ExecutionInstance) -> None:
        """``request`` runs there now: its prefix will be cached."""
        pieces = chain(request)
        if not pieces:
            return
        held = self._held.get(instance.instance_id)
        if held is None:
            held = self._held[instance.instance_id] = OrderedDict()
        self._instances[instance.instance_id] = instance
        lost = self._lost.get(instance.instance_id)
        # the first piece is the newest: a chain loses its end first, as in an engine's cache
        for piece in reversed(pieces):
            if lost is not None and piece not in held:
                lost.asked(piece)
            held[piece] = None
            held.move_to_end(piece)
        capacity = capacity_pieces(instance)
        while len(held) > capacity:
            piece, _ = held.popitem(last=False)
            if lost is None:
                lost = self._lost[instance.instance_id] = _Lost()
            lost.went(piece, capacity)

    def forget(self, instance_id: str) -> None:
        """The engine restarted or left: it holds nothing."""
        self._held.pop(instance_id, None)
        self._lost.pop(instance_id, None)
        self._instances.pop(instance_id, None)


class _Lost:
    """What went from one instance's cache for want of room, as long as that holds as much again, and the share that was missed."""

    __slots__ = ("_pieces", "share")

    def __init__(self) -> None:
        self._pieces: OrderedDict[int, None] = OrderedDict()
        self.share = 0.0

    def went(self, piece: int, most: int) -> None:
        self._pieces[piece] = None
        self._pieces.move_to_end(piece)
        if len(self._pieces) > most:
            self._pieces.popitem(last=False)
        self.share *= 1.0 - LOST_WEIGHT

    def asked(self, piece: int) -> None:
        """A piece that is not held is asked for."""
        if piece in self._pieces:
            del self._pieces[piece]
            self.share = min(1.0, self.share + LOST_WEIGHT)


def chain(request: RequestMetadata) -> list[int]:
    """Hashes of the prompt's first whole pieces, each over everything up to its end."""
    fields: RequestFields = request
    if 0 < len(fields.prompt_head) < PIECE_BYTES:
        return []
    head = request.head(PIECE_BYTES * MAX_PIECES)
    if len(head) < PIECE_BYTES:
        return []
    hasher = xxhash.xxh3_64((request.model_name or "").encode())
    pieces: list[int] = []
    for start in range(0, len(head) - PIECE_BYTES + 1, PIECE_BYTES):
        hasher.update(head[start : start + PIECE_BYTES])
        pieces.append(hasher.intdigest())
    return pieces


def capacity_pieces(instance: ExecutionInstance) -> int:
    """Pieces that its KV cache holds: blocks × tokens a block, in pieces."""
    engine = instance.engine
    if engine.kv_block_count is None or engine.kv_block_size_tokens is None:
        return DEFAULT_CAPACITY
    tokens = engine.kv_block_count * engine.kv_block_size_tokens
    return min(MAX_CAPACITY, max(1, tokens * BYTES_PER_TOKEN // PIECE_BYTES))

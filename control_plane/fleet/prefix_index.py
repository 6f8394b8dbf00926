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


class PrefixIndex:
    """Satisfies :class:`~control_plane.protocols.PrefixMatches`. About 120 bytes a piece kept."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[int, None]] = {}

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        """Tokens of the prompt's head that were sent there and are probably held still; whole pieces only."""
        return self._cached(chain(request), instance)

    def cached_on(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
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

    def holders(self, request: RequestMetadata) -> list[str]:
        """Ids of instances that hold some of the prompt, the most of it first."""
        pieces = chain(request)
        if not pieces:
            return []
        found: list[tuple[int, str]] = []
        for name, held in self._held.items():
            if pieces[0] in held:
                found.append((next((at for at, piece in enumerate(pieces) if piece not in held), len(pieces)), name))
        found.sort(key=lambda one: -one[0])
        return [name for _, name in found]

    def lost_tokens(self, instance: ExecutionInstance, tokens: int) -> float:
        """Nothing is counted as lost: what lies at the cold end of this index is not known to be asked for again."""
        return 0.0

    def sent(self, request: RequestMetadata, instance: ExecutionInstance) -> None:
        """``request`` runs there now: its prefix will be cached."""
        pieces = chain(request)
        if not pieces:
            return
        held = self._held.get(instance.instance_id)
        if held is None:
            held = self._held[instance.instance_id] = OrderedDict()
        # the first piece is the newest: a chain loses its end first, as in an engine's cache
        for piece in reversed(pieces):
            held[piece] = None
            held.move_to_end(piece)
        capacity = capacity_pieces(instance)
        while len(held) > capacity:
            held.popitem(last=False)

    def forget(self, instance_id: str) -> None:
        """The engine restarted or left: it holds nothing."""
        self._held.pop(instance_id, None)


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

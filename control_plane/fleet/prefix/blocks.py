"""Which KV blocks which engine holds, as the engines' own events tell, under keys of ours.

An engine's block hashes mean something to that engine only: the algorithm is its choice, and for some the seed is its own. So a block's
key here is made from its token ids and its parent's key, and each engine's hashes lead to keys. A key covers everything before the block.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import xxhash

from control_plane.fleet.prefix.mirror import SentMirror
from control_plane.types import ExecutionInstance

#: parent of a prompt's first block
ROOT: Final = 0
_LOW_64: Final = (1 << 64) - 1


def folded(engine_hash: Any) -> Any:
    """An engine's block hash (bytes, or a whole number in older versions) as 64 bits: of a million blocks two are alike once in 30
    million fleets."""
    if isinstance(engine_hash, bytes):
        return int.from_bytes(engine_hash[:8], "big")
    return engine_hash & _LOW_64


def block_keys(token_ids: Sequence[int], block_tokens: int, parent: Any = ROOT, extra: Sequence[bytes] = ()) -> list[Any]:
    """Keys of the whole blocks of ``token_ids``. ``extra``: what else a block's content depends on (adapter, salt, images), one entry a
    block; blocks beyond it have none."""
    digest: Any = xxhash.xxh3_64_intdigest
    data = array("I", token_ids).tobytes()
    width = 4 * block_tokens
    keys: list[Any] = []
    for at in range(len(token_ids) // block_tokens):
        block: Any = data[at * width : (at + 1) * width]
        if at < len(extra):
            block += extra[at]
        parent = digest(block, parent)
        keys.append(parent)
    return keys


class Learned:
    """Where a piece of text ends: so many whole blocks' ``tokens`` from the prompt's beginning, and the key of the last of them."""

    __slots__ = ("key", "tokens")

    def __init__(self, tokens: int, key: Any) -> None:
        self.tokens = tokens
        self.key = key


class Space:
    """Instances with the same size of block, whose keys are the same for the same tokens. ``block_tokens`` 0: those that tell nothing of
    their blocks; they are known by what was sent."""

    __slots__ = ("block_tokens", "exact_levels", "learned", "levels", "masks", "members", "order", "pieces", "request", "version")

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        #: one bit for each instance in it
        self.members: Any = 0
        #: block -> the bits of those that hold it
        self.masks: dict[Any, Any] = {}
        self.learned: dict[Any, Learned] = {}
        #: its pieces, in the order in which they are looked at when room is needed
        self.order: deque[Any] = deque()
        #: the last match: of which request, at which state of the index, its pieces, who holds each (None: not looked at yet), and how
        #: many of the first pieces are known as blocks
        self.request: Any = None
        self.version = -1
        self.pieces: tuple[Any, ...] = ()
        self.levels: list[Any] = []
        self.exact_levels = 0


class Slot:
    """One cache: an instance, or one of its data-parallel ranks."""

    __slots__ = ("again", "bit", "group", "instance", "keys", "mirror", "number", "rank", "space")

    def __init__(self, instance: ExecutionInstance, rank: int, number: int, space: Space, sent: dict[Any, Any]) -> None:
        self.instance = instance
        self.rank = rank
        self.number = number
        self.bit: Any = 1 << number
        self.space = space
        #: its own hash (folded) -> key
        self.keys: dict[Any, Any] = {}
        #: contents that it holds more than once -> how often
        self.again: dict[Any, int] = {}
        #: the group of layers whose blocks count; -1: not known yet
        self.group = -1
        self.mirror = SentMirror(self.bit, sent)

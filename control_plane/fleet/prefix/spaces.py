"""Which KV blocks which engine holds, and how far a prompt goes in each: bit masks of instances, by block and by piece of text."""

from __future__ import annotations

from collections import deque
from typing import Any

from control_plane.fleet.prefix.mirror import SentMirror
from control_plane.fleet.prefix.pieces import chain
from control_plane.types import ExecutionInstance, RequestMetadata


class Learned:
    """Where a piece of text ends: so many whole blocks' ``tokens`` from the prompt's beginning, and the key of the last of them."""

    __slots__ = ("key", "tokens")

    def __init__(self, tokens: int, key: Any) -> None:
        self.tokens = tokens
        self.key = key


class Space:
    """Instances with the same size of block, whose keys are the same for the same tokens. ``block_tokens`` 0: those that tell nothing of
    their blocks; they are known by what was sent."""

    __slots__ = (
        "_layers",
        "_sent",
        "block_tokens",
        "exact_levels",
        "learned",
        "levels",
        "masks",
        "members",
        "order",
        "pieces",
        "request",
        "version",
    )

    def __init__(self, block_tokens: int, sent: dict[Any, Any]) -> None:
        self.block_tokens = block_tokens
        #: piece -> the bits of all those to which it was sent, of any space
        self._sent = sent
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
        self._layers: list[tuple[Any, int]] | None = None
        self.exact_levels = 0

    def begin(self, request: RequestMetadata, version: int) -> None:
        """Begin a match of ``request``, if it is not that of the last question. Steps are looked at when they are needed: who holds a piece
        holds those before it, so a few of them tell how far each instance goes. ``version``: of the index."""
        if self.request is request and self.version == version:
            return
        pieces = chain(request)
        self.request = request
        self.version = version
        self.pieces = pieces
        self.levels = [None] * len(pieces)
        self._layers = None
        self.exact_levels = self._learned_levels(pieces)

    def mask(self, level: int) -> Any:
        """Who holds the piece number ``level`` of the matched request."""
        mask: Any = self.levels[level]
        if mask is None:
            piece = self.pieces[level]
            mask = self._sent.get(piece, 0) & self.members
            if level < self.exact_levels:
                found = self.learned.get(piece)
                if found is not None:
                    mask = self.masks.get(found.key, 0) if found.tokens else self.members
            self.levels[level] = mask
        return mask

    def depth(self, bits: Any) -> int:
        """How many pieces of the matched request one of ``bits`` holds."""
        exact = self.exact_levels
        if exact:
            depth = self._last(0, exact, bits)
            if depth < exact:
                return depth
            # an engine that has dropped what is known as blocks holds nothing behind it, wherever that was sent
            bits = bits & self.mask(exact - 1)
        return self._last(exact, len(self.levels), bits)

    def layers(self) -> list[tuple[Any, int]]:
        """Who holds how many pieces of the matched request, the most first: bits, and the number. Those who hold none are left out."""
        if self._layers is None:
            layers: list[tuple[Any, int]] = []
            bits = self.members
            while bits:
                depth = self.depth(bits)
                if not depth:
                    break
                mask: Any = self.mask(depth - 1) & bits
                if depth > self.exact_levels > 0:
                    mask = mask & self.mask(self.exact_levels - 1)
                layers.append((mask, depth))
                bits = bits & ~mask
            self._layers = layers
        return self._layers

    def _last(self, low: int, high: int, bits: Any) -> int:
        """The first of these levels that none of ``bits`` holds."""
        if low >= high or not self.mask(low) & bits:
            return low
        if self.mask(high - 1) & bits:
            return high
        low += 1
        high -= 1
        while low < high:
            middle = (low + high) // 2
            if self.mask(middle) & bits:
                low = middle + 1
            else:
                high = middle
        return low

    def _learned_levels(self, pieces: tuple[Any, ...]) -> int:
        """How many pieces from the first on are known as blocks: of one that is, all before it are."""
        learned = self.learned
        low, high = 0, len(pieces)
        if not learned or not high or pieces[0] not in learned:
            return 0
        if pieces[high - 1] in learned:
            return high
        low, high = 1, high - 1
        while low < high:
            middle = (low + high) // 2
            if pieces[middle] in learned:
                low = middle + 1
            else:
                high = middle
        return low


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

"""What one engine probably caches, kept from what was sent there: an LRU of the size of its cache, in bytes of text.

Prompts are remembered as chains of pieces, newest last; the oldest goes first and loses its end first, as a prompt's blocks do in an
engine. What has no pieces (answers, the ends of prompts) takes room and goes in its turn; whoever comes back with the whole prompt before
it and more is taken to continue from there.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Final

from control_plane.fleet.prefix.pieces import ENDS, SIZES

#: stale records that are put up with, beside as many as there are pieces
_SLACK: Final = 1024
#: of the newest piece that went, in the share of those that are missed
LOST_WEIGHT: Final = 1 / 256


class Sent:
    """A prompt that was sent, or was last in use, at one moment; ``left`` of its pieces are not looked at yet, ``rest_bytes`` have none."""

    __slots__ = ("chain", "left", "rest_bytes", "stamp")

    def __init__(self, stamp: int, chain: tuple[Any, ...], rest_bytes: int) -> None:
        self.stamp = stamp
        self.chain = chain
        self.left = len(chain)
        self.rest_bytes = rest_bytes


class SentMirror:
    """``masks`` are those of all instances together, piece -> who has it; this one's bit is set and cleared there."""

    __slots__ = ("_bit", "_capacity_bytes", "_held", "_held_bytes", "_lost", "_masks", "_queue", "_stamp", "missed_share", "tails")

    def __init__(self, bit: Any, masks: dict[Any, Any]) -> None:
        self._bit = bit
        self._masks = masks
        #: piece -> when it was in use last, a count
        self._held: dict[Any, int] = {}
        self._held_bytes = 0
        #: the last piece of a prompt -> when it ended (a count), and the bytes of that prompt and its answer
        self.tails: dict[Any, tuple[int, int]] = {}
        self._queue: deque[Sent] = deque()
        self._stamp = 0
        self._capacity_bytes = 0
        #: what went for want of room, as much of it as is held
        self._lost: OrderedDict[Any, None] = OrderedDict()
        #: of the pieces that went lately, the share that was asked for within once more the time that they are held
        self.missed_share = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def use(self, chain: tuple[Any, ...], rest_bytes: int, capacity_bytes: int) -> None:
        """A prompt of these pieces is in use there now, and ``rest_bytes`` more that have no pieces."""
        self._stamp += 1
        stamp = self._stamp
        held, masks, bit = self._held, self._masks, self._bit
        added = rest_bytes
        for at in range(len(chain)):
            piece = chain[at]
            if piece not in held:
                added += SIZES[at]
                if piece in self._lost:
                    del self._lost[piece]
                    self.missed_share = min(1.0, self.missed_share + LOST_WEIGHT)
                masks[piece] = masks[piece] | bit if piece in masks else bit
            held[piece] = stamp
        if rest_bytes and chain:
            self.tails[chain[-1]] = (stamp, ENDS[len(chain) - 1] + rest_bytes)
        self._queue.append(Sent(stamp, chain, rest_bytes))
        self._held_bytes += added
        self._capacity_bytes = capacity_bytes
        if self._held_bytes > capacity_bytes:
            self._evict(capacity_bytes)
        if len(self._queue) > 2 * len(held) + _SLACK:
            self._tidy()

    @property
    def free_bytes(self) -> int:
        """Room in which nothing is yet, by the capacity told last."""
        return max(0, self._capacity_bytes - self._held_bytes)

    def clear(self) -> None:
        for piece in self._held:
            self._let_go(piece)
        self._held = {}
        self._held_bytes = 0
        self.tails = {}
        self._queue = deque()
        self._lost = OrderedDict()
        self.missed_share = 0.0

    def _evict(self, capacity_bytes: int) -> None:
        held, queue = self._held, self._queue
        while self._held_bytes > capacity_bytes and queue:
            oldest: Sent = queue[0]
            if oldest.rest_bytes:
                self._held_bytes -= oldest.rest_bytes
                oldest.rest_bytes = 0
                tail = self.tails.get(oldest.chain[-1]) if oldest.chain else None
                if tail is not None and tail[0] == oldest.stamp:
                    del self.tails[oldest.chain[-1]]
            elif oldest.left:
                oldest.left -= 1
                at = oldest.left
                piece = oldest.chain[at]
                if held.get(piece, 0) == oldest.stamp:
                    del held[piece]
                    self.tails.pop(piece, None)
                    self._held_bytes -= SIZES[at]
                    self._let_go(piece)
                    self._went(piece)
            else:
                queue.popleft()

    def _went(self, piece: Any) -> None:
        lost = self._lost
        lost[piece] = None
        if len(lost) > len(self._held) + 1:
            lost.popitem(last=False)
        self.missed_share *= 1.0 - LOST_WEIGHT

    def _let_go(self, piece: Any) -> None:
        masks = self._masks
        left = masks[piece] & ~self._bit
        if left:
            masks[piece] = left
        else:
            del masks[piece]

    def _tidy(self) -> None:
        """Leave only records that still hold something; what had no pieces is put to the next of them that does."""
        held = self._held
        kept: deque[Sent] = deque()
        rest_bytes = 0
        for record in self._queue:
            live = False
            for at in range(record.left):
                if held.get(record.chain[at], 0) == record.stamp:
                    live = True
            rest_bytes += record.rest_bytes
            if live:
                record.rest_bytes = rest_bytes
                rest_bytes = 0
                kept.append(record)
        if rest_bytes:
            kept.append(Sent(self._stamp, (), rest_bytes))
        self._queue = kept

"""The KV cache of one modelled engine: how many blocks are free, which contents are cached, what goes first when room is needed.

vLLM's ``BlockPool`` (v1/core/block_pool.py, 0.32), less the block numbers: a block without known content is only counted, a block
with content is its hash. So a decode step that crosses block boundaries costs one subtraction, however many sequences there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mypy_extensions import mypyc_attr

#: what one place in the eviction queue counts in the number kept of a held block, above its users
_ENTRY: Final = 1 << 32
#: stale places in the queue that are put up with, beside as many as there are others
_SLACK: Final = 1024


@mypyc_attr(allow_interpreted_subclasses=True)
class CacheListener:
    """Hears which contents come into a cache and which leave it. Subclass it."""

    def stored(self, owner: object, first: int, contents: Sequence[int]) -> None:
        """``contents`` are cached that were not: the blocks of ``owner`` (whoever filled them) from number ``first`` on."""

    def removed(self, contents: Sequence[int]) -> None:
        """``contents`` were evicted."""


class KvBlocks:
    """``total`` blocks, each in one of four places, and always ``blank + private + held + evictable == total``.

    *blank*: free, content unknown; given out first. *private*: in use by one sequence, content not cached. *held*: cached content in
    use, with a count of users. *evictable*: cached content that nobody uses, least recently freed first to go.

    Content computed twice (the last block of a prompt that is cached whole) is kept once here, twice in vLLM until the copy is freed.

    A content may stand for a ``group`` of blocks that come and go together; wherever hashes are given, one is one group.

    Every time a block becomes evictable it is put at the end of a queue; only its last place there counts. (An OrderedDict would do,
    at three times the memory and twice the time, and a thousand engines keep tens of millions of blocks.)
    """

    __slots__ = ("_blank", "_evictable", "_first", "_held", "_private", "_queue", "caching", "group", "listener", "total")

    def __init__(self, total: int, *, caching: bool = True, group: int = 1) -> None:
        if total < 1 or group < 1:
            raise ValueError(f"an engine needs at least one KV block, and a hash stands for at least one: {total}, {group}")
        self.total = total
        self.caching = caching
        self.group = group
        self.listener: CacheListener | None = None
        self._blank = total
        self._private = 0
        #: content -> users, and above them its places in the queue
        self._held: dict[int, int] = {}
        #: content -> its places in the queue
        self._evictable: dict[int, int] = {}
        self._queue: list[int] = []
        #: where the queue begins in its list
        self._first = 0

    @property
    def free(self) -> int:
        """Blocks that can be given out now (blank ones and evictable ones)."""
        return self._blank + self.group * len(self._evictable)

    @property
    def used(self) -> int:
        return self._private + self.group * len(self._held)

    @property
    def cached(self) -> int:
        """Blocks whose content a later prompt could hit."""
        return self.group * (len(self._held) + len(self._evictable))

    def match(self, hashes: Sequence[int]) -> int:
        """How many of the leading ``hashes`` are cached. Changes nothing."""
        if not self.caching:
            return 0
        held, evictable = self._held, self._evictable
        count = 0
        for content in hashes:
            if content not in held and content not in evictable:
                break
            count += 1
        return count

    def holds(self, content: int) -> bool:
        """It is cached, in use or not."""
        return content in self._held or content in self._evictable

    def evictable_among(self, hashes: Sequence[int]) -> int:
        """How many blocks of ``hashes`` are cached but unused: taking them lowers ``free``."""
        evictable = self._evictable
        count = 0
        for content in hashes:
            if content in evictable:
                count += 1
        return count * self.group

    def acquire(self, hashes: Sequence[int]) -> None:
        """One more user for each of these cached blocks."""
        held, evictable = self._held, self._evictable
        for content in hashes:
            users = held.get(content, 0)
            held[content] = users + 1 if users else 1 + _ENTRY * evictable.pop(content)

    def allocate(self, count: int) -> None:
        """``count`` free blocks become private, evicting cached content where needed. Raises ValueError when there are too few."""
        missing = count - self._blank
        if missing > 0:
            if missing > self.group * len(self._evictable):
                raise ValueError(f"{count} KV blocks wanted, {self.free} free")
            self._evict(-(-missing // self.group))
        self._blank -= count
        self._private += count

    def publish(self, hashes: Sequence[int]) -> None:
        """As many private blocks are full and their contents known: cached from now on, in use once. Where a content is cached already
        the caller shares that block and its own becomes blank."""
        held, evictable = self._held, self._evictable
        group = self.group
        self._private -= group * len(hashes)
        for content in hashes:
            users = held.get(content, 0)
            if users:
                held[content] = users + 1
                self._blank += group
            elif content in evictable:
                held[content] = 1 + _ENTRY * evictable.pop(content)
                self._blank += group
            else:
                held[content] = 1

    def release(self, held: Sequence[int], private: int) -> None:
        """A sequence lets go of its blocks: of its prefix the tail is the first to be evicted later, as in vLLM."""
        self._private -= private
        self._blank += private
        if not held:
            return
        users, evictable, queue = self._held, self._evictable, self._queue
        for content in reversed(held):
            left = users[content] - 1
            if left % _ENTRY:
                users[content] = left
            else:
                del users[content]
                evictable[content] = left // _ENTRY + 1
                queue.append(content)
        if len(queue) - self._first > 2 * len(evictable) + _SLACK:
            self._tidy()

    def _evict(self, count: int) -> None:
        held, evictable, queue = self._held, self._evictable, self._queue
        at = self._first
        self._blank += count * self.group
        listener = self.listener
        gone: list[int] = []
        while count:
            content = queue[at]
            at += 1
            places = evictable.get(content, 0)
            if places == 1:
                del evictable[content]
                count -= 1
                if listener is not None:
                    gone.append(content)
            elif places:
                evictable[content] = places - 1
            else:
                held[content] -= _ENTRY
        if listener is not None:
            listener.removed(gone)
        self._first = at
        if at > 2 * _SLACK and 2 * at > len(queue):
            del queue[:at]
            self._first = 0

    def _tidy(self) -> None:
        """Leave of the queue only the places that count."""
        held, evictable = self._held, self._evictable
        kept: list[int] = []
        for content in self._queue[self._first :]:
            places = evictable.get(content, 0)
            if places == 1:
                kept.append(content)
            elif places:
                evictable[content] = places - 1
            else:
                held[content] -= _ENTRY
        self._queue = kept
        self._first = 0

    def check(self) -> None:
        """Raises AssertionError when a block was lost or counted twice (for tests)."""
        assert self._blank >= 0
        assert self._private >= 0
        assert self._blank + self._private + self.cached == self.total
        assert not self._held.keys() & self._evictable.keys()
        assert all(users % _ENTRY for users in self._held.values())
        places = sum(self._evictable.values()) + sum(users // _ENTRY for users in self._held.values())
        assert places == len(self._queue) - self._first

"""The KV cache of one modelled engine: how many blocks are free, which contents are cached, what goes first when room is needed.

vLLM's ``BlockPool`` (v1/core/block_pool.py, 0.32), less the block numbers: a block without known content is only counted, a block
with content is its hash. So a decode step that crosses block boundaries costs one subtraction, however many sequences there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class KvBlocks:
    """``total`` blocks, each in one of four places, and always ``blank + private + held + evictable == total``.

    *blank*: free, content unknown; given out first. *private*: in use by one sequence, content not cached. *held*: cached content in
    use, with a count of users. *evictable*: cached content that nobody uses, least recently freed first to go.

    Content computed twice (the last block of a prompt that is cached whole) is kept once here, twice in vLLM until the copy is freed.
    """

    __slots__ = ("_blank", "_evictable", "_held", "_private", "caching", "total")

    def __init__(self, total: int, *, caching: bool = True) -> None:
        if total < 1:
            raise ValueError(f"an engine needs at least one KV block, got {total}")
        self.total = total
        self.caching = caching
        self._blank = total
        self._private = 0
        self._held: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be given out now (blank ones and evictable ones)."""
        return self._blank + len(self._evictable)

    @property
    def used(self) -> int:
        return self._private + len(self._held)

    @property
    def cached(self) -> int:
        """Blocks whose content a later prompt could hit."""
        return len(self._held) + len(self._evictable)

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

    def evictable_among(self, hashes: Iterable[int]) -> int:
        """How many of ``hashes`` are cached but unused: taking them lowers ``free``."""
        evictable = self._evictable
        return sum(1 for content in hashes if content in evictable)

    def acquire(self, hashes: Iterable[int]) -> None:
        """One more user for each of these cached blocks."""
        held, evictable = self._held, self._evictable
        for content in hashes:
            users = held.get(content, 0)
            if not users:
                del evictable[content]
            held[content] = users + 1

    def allocate(self, count: int) -> None:
        """``count`` free blocks become private, evicting cached content where needed. Raises ValueError when there are too few."""
        missing = count - self._blank
        if missing > 0:
            if missing > len(self._evictable):
                raise ValueError(f"{count} KV blocks wanted, {self.free} free")
            for _ in range(missing):
                self._evictable.popitem(last=False)
            self._blank += missing
        self._blank -= count
        self._private += count

    def publish(self, content: int) -> None:
        """One private block is full and its content is known: cached from now on, in use once. Where that content is cached already
        the caller shares that block and its own becomes blank."""
        self._private -= 1
        if content in self._held or content in self._evictable:
            self._blank += 1
            self.acquire((content,))
        else:
            self._held[content] = 1

    def release(self, held: Sequence[int], private: int) -> None:
        """A sequence lets go of its blocks: of its prefix the tail is the first to be evicted later, as in vLLM."""
        self._private -= private
        self._blank += private
        users, evictable = self._held, self._evictable
        for content in reversed(held):
            left = users[content] - 1
            if left:
                users[content] = left
            else:
                del users[content]
                evictable[content] = None

    def check(self) -> None:
        """Raises AssertionError when a block was lost or counted twice (for tests)."""
        assert self._blank >= 0
        assert self._private >= 0
        assert self._blank + self._private + len(self._held) + len(self._evictable) == self.total
        assert not self._held.keys() & self._evictable.keys()
        assert all(users > 0 for users in self._held.values())

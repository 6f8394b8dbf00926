"""What a modelled engine's cache holds, told to the prefix index by direct calls: the KV events of a simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from control_plane.engines.kv_blocks import CacheListener
from control_plane.fleet import PrefixIndex
from control_plane.types import ExecutionInstance


class ToldBlocks(CacheListener):
    """A block of the workload is a block of the index, and its id is both the engine's hash and the key."""

    def __init__(self, index_of: Callable[[], PrefixIndex], instance: ExecutionInstance, block_tokens: int) -> None:
        self._index_of = index_of
        self._instance = instance
        self._block_tokens = block_tokens

    def stored(self, owner: object, first: int, contents: Sequence[int]) -> None:
        index = self._index_of()
        index.hold(index.feed(self._instance, self._block_tokens), contents, contents)

    def removed(self, contents: Sequence[int]) -> None:
        index = self._index_of()
        index.removed(index.feed(self._instance, self._block_tokens), contents)

    def lost(self) -> None:
        """The engine died, and its cache with it."""
        self._index_of().forget(self._instance.instance_id)

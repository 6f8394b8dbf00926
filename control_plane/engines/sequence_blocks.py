"""The KV cache of a modelled engine as its sequences use it: what they find there, fill, and leave."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.engines.kv_blocks import CacheListener, KvBlocks
from control_plane.engines.sequence import ModelSequence


class SequenceBlocks(KvBlocks):
    """Blocks of ``size_tokens`` tokens; one of a sequence's hashes stands for ``group`` of them."""

    __slots__ = ("group_tokens", "size_tokens")

    def __init__(self, total: int, size_tokens: int, *, caching: bool = True, group: int = 1) -> None:
        super().__init__(total, caching=caching, group=group)
        self.size_tokens = size_tokens
        self.group_tokens = size_tokens * group

    def of(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size_tokens)

    def missing(self, sequence: ModelSequence) -> int:
        """Blocks that it still needs for all that is to be computed before its next token."""
        return self.of(sequence.prompt_tokens + sequence.generated) - self.of(sequence.computed)

    def hits(self, sequence: ModelSequence, tokens: int) -> list[int]:
        """The leading hashes of its first ``tokens`` tokens, less the last one, that are cached."""
        if not self.caching:
            return []
        known = sequence.hashes((tokens - 1) // self.group_tokens)
        return list(known[: self.match(known)])

    def grow(self, sequence: ModelSequence, tokens: int) -> None:
        """Blocks for the next ``tokens`` of a prompt; its full blocks are cached from now on."""
        computed = sequence.computed + tokens
        self.allocate(self.of(computed) - self.of(sequence.computed))
        sequence.computed = computed
        self.keep(sequence)

    def keep(self, sequence: ModelSequence) -> None:
        """Cache its full blocks, as far as their hashes are known."""
        full = sequence.computed // self.group_tokens
        held = sequence.held
        if self.caching and len(held) < full:
            known = sequence.hashes(full)
            if len(known) > len(held):
                fresh = known[len(held) :]
                if self.listener is not None:
                    self._tell_stored(sequence, fresh, self.listener)
                self.publish(fresh)
                held.extend(fresh)

    def _tell_stored(self, sequence: ModelSequence, fresh: Sequence[int], listener: CacheListener) -> None:
        """Which of ``fresh``, the sequence's next blocks, are not cached yet: told in stretches."""
        begin = 0
        for at in range(len(fresh) + 1):
            if at == len(fresh) or self.holds(fresh[at]):
                if at > begin:
                    listener.stored(sequence, len(sequence.held) + begin, fresh[begin:at])
                begin = at + 1

    def leave(self, sequence: ModelSequence) -> None:
        """It lets go of all its blocks."""
        self.release(sequence.held, self.of(sequence.computed) - len(sequence.held) * self.group)
        sequence.held = []

"""The decoding sequences of a modelled engine, accounted for together: a run of a thousand steps costs as much as one.

What differs between them follows from the step at which each joined: its context, when it needs a new block, its last step.
"""

from __future__ import annotations

import heapq

from control_plane.engines.sequence import ModelSequence
from control_plane.engines.state import State


class DecodeBatch:
    """Each member gets one token in every step."""

    __slots__ = ("_boundary", "_ends", "_size", "context_tokens", "members", "step")

    def __init__(self, block_size_tokens: int) -> None:
        self.members: dict[int, ModelSequence] = {}
        #: steps so far, also those without a decoding sequence
        self.step = 0
        #: contexts of all members before the next step, added up
        self.context_tokens = 0
        self._size = block_size_tokens
        #: members that need a new block when step number % block size is the index
        self._boundary = [0] * block_size_tokens
        #: (last step, order, sequence); those who left early are still in it
        self._ends: list[tuple[int, int, ModelSequence]] = []

    def join(self, sequence: ModelSequence) -> None:
        sequence.state = State.DECODE
        step = self.step
        sequence.joined_step = step
        sequence.finish_step = step + sequence.output_tokens - sequence.generated
        self.members[sequence.order] = sequence
        self.context_tokens += sequence.computed
        self._boundary[(step - sequence.computed) % self._size] += 1
        heapq.heappush(self._ends, (sequence.finish_step, sequence.order, sequence))

    def leave(self, sequence: ModelSequence) -> None:
        """The sequence's own counts are brought up to date."""
        del self.members[sequence.order]
        self._boundary[(sequence.joined_step - sequence.computed) % self._size] -= 1
        steps = self.step - sequence.joined_step
        sequence.computed += steps
        sequence.generated += steps
        self.context_tokens -= sequence.computed

    def advance(self, steps: int) -> None:
        self.step += steps
        self.context_tokens += len(self.members) * steps

    def take_due(self) -> ModelSequence | None:
        """One whose last step is over; None: none is left."""
        ends = self._ends
        while ends and ends[0][0] <= self.step:
            finish_step, _, sequence = heapq.heappop(ends)
            if sequence.state is State.DECODE and sequence.finish_step == finish_step:
                return sequence
        return None

    def next_blocks(self) -> int:
        """New blocks that the next step takes."""
        return self._boundary[self.step % self._size]

    def blocks_needed(self, steps: int) -> int:
        """New blocks that the next step but one takes, and those after it, ``steps`` in all."""
        size, boundary, first = self._size, self._boundary, self.step + 1
        needed = steps // size * len(self.members)
        for i in range(steps % size):
            needed += boundary[(first + i) % size]
        return needed

    def steps_without_change(self, most: int, free_blocks: int) -> int:
        """How many steps it can run as it is: until the first ends, or the free blocks (the next step's are taken) are used up."""
        ends = self._ends
        while ends[0][2].state is not State.DECODE or ends[0][2].finish_step != ends[0][0]:
            heapq.heappop(ends)
        steps = min(most, ends[0][0] - self.step)
        if steps == 1 or self.blocks_needed(steps - 1) <= free_blocks:
            return steps
        count = len(self.members)
        left = free_blocks % count
        carried = 1 + free_blocks // count * self._size
        while carried < steps:
            left -= self._boundary[(self.step + carried) % self._size]
            if left < 0:
                break
            carried += 1
        return min(steps, carried)

"""The KV cache of a modelled engine: what is given out, shared, cached and evicted."""

from __future__ import annotations

from collections import OrderedDict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.engines.kv_blocks import KvBlocks


def test_blocks_are_given_out_blank_first_and_then_least_recently_freed() -> None:
    blocks = KvBlocks(4)
    for content in (1, 2):
        blocks.allocate(1)
        blocks.publish([content])
        blocks.release([content], 0)
    blocks.allocate(2)
    assert blocks.match([1]) == 1, "two blank blocks were left"
    blocks.allocate(1)
    assert (blocks.match([1]), blocks.match([2])) == (0, 1)
    assert blocks.free == 1
    with pytest.raises(ValueError, match="2 KV blocks wanted, 1 free"):
        blocks.allocate(2)


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    blocks = KvBlocks(3)
    blocks.allocate(3)
    for content in (1, 2, 3):
        blocks.publish([content])
    blocks.release([1, 2, 3], 0)
    blocks.allocate(1)
    assert blocks.match([1, 2, 3]) == 2


def test_a_shared_block_is_free_when_its_last_user_leaves() -> None:
    blocks = KvBlocks(2)
    blocks.allocate(1)
    blocks.publish([7])
    blocks.acquire([7])
    blocks.release([7], 0)
    assert blocks.free == 1
    blocks.release([7], 0)
    assert blocks.free == 2
    blocks.check()


class Plain:
    """The same by an ordered dictionary: what was freed last is at its end."""

    def __init__(self, total: int) -> None:
        self.blank, self.held, self.evictable = total, dict[int, int](), OrderedDict[int, None]()

    def take(self, count: int) -> None:
        while self.blank < count:
            self.evictable.popitem(last=False)
            self.blank += 1
        self.blank -= count

    def use(self, content: int) -> None:
        self.evictable.pop(content, None)
        self.held[content] = self.held.get(content, 0) + 1

    def free(self, content: int) -> None:
        self.held[content] -= 1
        if not self.held[content]:
            del self.held[content]
            self.evictable[content] = None


@given(st.integers(0, 2**32), st.sampled_from([4, 30, 3000]))
def test_least_recently_freed_goes_first_however_often_a_block_was_used(seed: int, steps: int) -> None:
    rng = Random(seed)
    blocks, plain = KvBlocks(12), Plain(12)
    users: list[list[int]] = []
    for _ in range(steps):
        if users and rng.random() < 0.5:
            prefix = users.pop(rng.randrange(len(users)))
            blocks.release(prefix, 0)
            for content in reversed(prefix):
                plain.free(content)
        else:
            prefix = [10 * rng.randrange(4) + n for n in range(rng.randint(1, 4))]
            hits = prefix[: blocks.match(prefix)]
            assert hits == [c for n, c in enumerate(prefix) if all(p in plain.held or p in plain.evictable for p in prefix[: n + 1])]
            if len(prefix) - len(hits) + blocks.evictable_among(hits) > blocks.free:
                continue
            blocks.acquire(hits)
            for content in hits:
                plain.use(content)
            blocks.allocate(len(prefix) - len(hits))
            plain.take(len(prefix) - len(hits))
            blocks.publish(prefix[len(hits) :])
            for content in prefix[len(hits) :]:
                if content in plain.held or content in plain.evictable:
                    plain.blank += 1
                plain.use(content)
            users.append(prefix)
        assert (blocks.free, blocks.used) == (plain.blank + len(plain.evictable), len(plain.held))
    blocks.check()


def test_contents_may_stand_for_groups_of_blocks() -> None:
    blocks = KvBlocks(8, group=3)
    blocks.allocate(7)
    blocks.publish([1, 2])
    assert (blocks.free, blocks.used, blocks.cached) == (1, 7, 6)
    blocks.release([1, 2], 1)
    assert (blocks.free, blocks.evictable_among([1, 2, 3])) == (8, 6)
    blocks.allocate(3)
    assert (blocks.free, blocks.match([1, 2])) == (5, 1), "the second group went whole, for one block of it"
    blocks.check()
    with pytest.raises(ValueError, match="at least one"):
        KvBlocks(8, group=0)

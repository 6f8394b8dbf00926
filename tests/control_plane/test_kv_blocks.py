"""The KV cache of a modelled engine: what is given out, shared, cached and evicted."""

from __future__ import annotations

import pytest

from control_plane.engines.kv_blocks import KvBlocks


def test_blocks_are_given_out_blank_first_and_then_least_recently_freed() -> None:
    blocks = KvBlocks(4)
    for content in (1, 2):
        blocks.allocate(1)
        blocks.publish(content)
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
        blocks.publish(content)
    blocks.release([1, 2, 3], 0)
    blocks.allocate(1)
    assert blocks.match([1, 2, 3]) == 2


def test_a_shared_block_is_free_when_its_last_user_leaves() -> None:
    blocks = KvBlocks(2)
    blocks.allocate(1)
    blocks.publish(7)
    blocks.acquire([7])
    blocks.release([7], 0)
    assert blocks.free == 1
    blocks.release([7], 0)
    assert blocks.free == 2
    blocks.check()

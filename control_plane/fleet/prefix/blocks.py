"""Keys of KV blocks, the same for the same contents whichever engine tells of them.

An engine's block hashes mean something to that engine only: the algorithm is its choice, and for some the seed is its own. So a block's
key here is made from its token ids and its parent's key, and each engine's hashes lead to keys. A key covers everything before the block.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final

import xxhash

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

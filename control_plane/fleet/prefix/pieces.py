"""A prompt as a chain of hashes: it is cut at fixed places, and each piece's hash covers all before it.

So two prompts have a chain's beginning in common exactly as far as their bytes are the same, whole pieces only. The pieces grow with the
distance from the beginning, so that the part of a shared beginning that is lost to the last cut is at most an eighth of it, and a prompt
of 32 KB has 28 of them instead of 64.
"""

from __future__ import annotations

from typing import Any, Final

import xxhash

from control_plane.live_state import RequestFields
from control_plane.types import RequestMetadata

PIECE_BYTES: Final = 512
#: pieces of PIECE_BYTES at the beginning; from there on each doubling of the distance is cut into the next number of pieces
_FIRST_PIECES: Final = 8
_PIECES_A_DOUBLING: Final = 8
#: of a longer prompt only the beginning is looked at
MAX_COVERED_BYTES: Final = 256 * 1024


#: of a request's own members, what makes another prompt of the same text
_MIXED_IN: Final = ("tools", "cache_salt")


def _ends() -> tuple[int, ...]:
    ends = [PIECE_BYTES * (number + 1) for number in range(_FIRST_PIECES)]
    while ends[-1] < MAX_COVERED_BYTES:
        step = ends[-1] // _PIECES_A_DOUBLING
        ends += [ends[-1] + step * (number + 1) for number in range(_PIECES_A_DOUBLING)]
    return tuple(ends)


#: where the pieces end, bytes from the prompt's beginning
ENDS: Final[tuple[int, ...]] = _ends()
#: bytes of each piece
SIZES: Final[tuple[int, ...]] = tuple(end - start for start, end in zip((0, *ENDS), ENDS, strict=False))


def seed_of(model: str) -> Any:
    """What a chain begins with: the model, so that the same text for another one is another chain."""
    return xxhash.xxh3_64_intdigest(model.encode("utf-8", "replace"))


def mixed(seed: Any, part: Any) -> Any:
    """A seed that also tells of ``part``: what the engine puts before the prompt or mixes into its blocks (tools, a cache salt)."""
    return xxhash.xxh3_64_intdigest(part, seed)


def chain_of(text: Any, seed: Any) -> tuple[Any, ...]:
    """Hashes (64 bits) of the whole pieces of ``text`` (bytes, or a memoryview of them, which is cut without copying)."""
    size = len(text)
    if size < PIECE_BYTES:
        return ()
    digest: Any = xxhash.xxh3_64_intdigest
    chain: list[Any] = []
    start = 0
    parent = seed
    for end in ENDS:
        if end > size:
            break
        parent = digest(text[start:end], parent)
        chain.append(parent)
        start = end
    return tuple(chain)


def chain(request: RequestMetadata) -> tuple[Any, ...]:
    """The chain of a request: the one that whoever read its body has made, else it is made from the text and kept."""
    fields: RequestFields = request
    known: Any = fields.prompt_chain
    if known is None:
        seed = seed_of(fields.model_name or "")
        for name in _MIXED_IN:
            part = fields.extra_body.get(name)
            if part is not None:
                seed = mixed(seed, repr(part).encode("utf-8", "replace"))
        known = chain_of(request.head(MAX_COVERED_BYTES), seed)
        fields.prompt_chain = known
    found: tuple[Any, ...] = known
    return found

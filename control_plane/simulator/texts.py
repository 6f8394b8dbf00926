"""Texts for requests that have none: made from block ids, so that requests that share blocks share exactly that much text.

A block's text begins with eight words that spell its id (two blocks never begin alike) and goes on with a stretch of a fixed text that
begins somewhere else for each id. All of it is ASCII, in words of four letters with a blank before them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import xxhash

from control_plane.errors import InvalidRequest
from control_plane.simulator.workload import TRACE_BLOCK_TOKENS, TraceRequest

#: of English text, for the usual tokenizers
BYTES_PER_TOKEN: Final = 4.0
_TEXT: Final = (
    "able acid aged also area army away baby back ball band bank base bath bear beat been beer bell belt best bill bird blow blue boat "
    "body bomb bond bone book boom born boss both bowl bulk burn bush busy call calm came camp card care case cash cast cell chat chip "
    "city club coal coat code cold come cook cool cope copy core cost crew crop dark data date dawn days dear deal dean debt deep "
    "deny desk dial dish diet disc disk does done door dose down draw drew drop drum dual duke dust duty each earn ease east easy edge "
    "else even ever evil exit face fact fail fair fall farm fast fate fear feed feel feet fell felt file fill film find fine fire firm "
    "fish five flat flow food foot ford form fort four free from fuel full fund gain game gate gave gear gene gift girl give glad goal "
    "goes gold golf gone good gray grew grey grow gulf hair half hall hand hang hard harm hawk have head hear heat held helm help here "
    "hero high hill hire hold hole holy home hope host hour huge hung hunt hurt idea inch into iron item join jump jury just "
    "keen keep kept kick kilo kind king knee knew know lack lady laid lake land lane last late lead left less life lift "
    "like line link list live load loan lock logo long look lord lose loss lost love luck made mail main make "
    "male many mark mass meal mean meet"
)
#: 256 of them: with the blank before it each is one token of the usual tokenizers
WORDS: Final = tuple(_TEXT.split())
_MASK: Final = (1 << 64) - 1
_HEADER_WORDS: Final = 8
#: words of the fixed text; a block's stretch begins in its first half
_FILL_WORDS: Final = 16_384
#: what keeps texts of requests apart from those of blocks with the same number
_PRIVATE_SALT: Final = 0x5EED
#: how often a text is changed until a tokenizer's count is right, and how much is cut off its end letter by letter
_TRIES: Final = 16
_CUT_BYTES: Final = 24


def prompt_text(
    request: TraceRequest,
    *,
    block_tokens: int = TRACE_BLOCK_TOKENS,
    bytes_per_token: float = BYTES_PER_TOKEN,
    count_tokens: Callable[[str], int] | None = None,
    nonce: int = 0,
) -> str:
    """A text of ``prompt_tokens`` tokens for ``request``, the same for the same request everywhere and always.

    Without ``count_tokens`` a token is ``bytes_per_token`` bytes: the text has ``round(prompt_tokens * bytes_per_token)``, and a block's
    text is a block's share of it. With it, the text is whole words, one a token, and the words at its very end are changed until
    ``count_tokens`` says ``prompt_tokens``; that counts what the tokenizer adds by itself. ``nonce`` tells apart requests without blocks
    that are equal in all else. Raises InvalidRequest where no text comes to that count (a tokenizer that makes no token of a short word).
    """
    if count_tokens is None:
        return prompt_head(request, _size(request.prompt_tokens, bytes_per_token), block_tokens, bytes_per_token, nonce).decode()
    words = _prompt_words(request, block_tokens, nonce)
    return _fitted(words, request.prompt_tokens, count_tokens)


def prompt_head(
    request: TraceRequest,
    limit_bytes: int,
    block_tokens: int = TRACE_BLOCK_TOKENS,
    bytes_per_token: float = BYTES_PER_TOKEN,
    nonce: int = 0,
) -> bytes:
    """The first ``limit_bytes`` of :func:`prompt_text` by bytes, or all of it. A few microseconds: only those blocks are made, and the
    latest are remembered."""
    limit = min(limit_bytes, _size(request.prompt_tokens, bytes_per_token))
    if limit <= 0:
        return b""
    block_bytes = block_tokens * bytes_per_token
    ids = request.block_ids
    whole = min(len(ids), -int(-limit // block_bytes))
    if bytes_per_token == int(bytes_per_token):
        size = int(block_bytes)
        text = b"".join([_block_bytes(block, size) for block in ids[:whole]])
        made = whole * size
    else:
        edges = [_size(place, block_bytes) for place in range(whole + 1)]
        text = b"".join([_block_bytes(block, edges[place + 1] - edges[place]) for place, block in enumerate(ids[:whole])])
        made = edges[-1]
    if made < limit:
        text += _stretch(_private_key(request, nonce), limit - made)
    return text[:limit]


def _size(tokens: float, bytes_per_token: float) -> int:
    return round(tokens * bytes_per_token)


@lru_cache(maxsize=8192)
def _block_bytes(block: int, size: int) -> bytes:
    return _stretch(block, size)


def _stretch(key: int, size: int) -> bytes:
    """``size`` bytes that belong to ``key``."""
    mixed = _mixed(key)
    head = _header(mixed)
    start = (mixed >> 20) % (_FILL_WORDS // 2) * 5
    fill = _fill()
    text = head + fill[start : start + size]
    while len(text) < size:
        text += fill
    return text[:size]


def _mixed(key: int) -> int:
    """A number of 64 bits, another one for each ``key`` of 64 (splitmix64's end, which can be undone)."""
    value = key & _MASK if key == key & _MASK else xxhash.xxh3_64_intdigest(str(key).encode())
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _header(mixed: int) -> bytes:
    return "".join([f" {WORDS[byte]}" for byte in mixed.to_bytes(_HEADER_WORDS, "little")]).encode()


@lru_cache(maxsize=1)
def _fill() -> bytes:
    """The fixed text: words of four letters, so that each begins at a multiple of five."""
    words = []
    state = 1
    for _ in range(_FILL_WORDS):
        state = _mixed(state)
        words.append(WORDS[state & 0xFF])
    return (" " + " ".join(words)).encode()


def _private_key(request: TraceRequest, nonce: int) -> int:
    """What a request's own text is made from: all that tells it from others."""
    told = f"{request.arrival_s!r} {request.prompt_tokens} {request.output_tokens} {request.session_id} {request.tenant} {nonce}"
    return xxhash.xxh3_64_intdigest(told.encode(), _PRIVATE_SALT)


# ---- by a tokenizer


def _prompt_words(request: TraceRequest, block_tokens: int, nonce: int) -> list[str]:
    words: list[str] = []
    for block in request.block_ids:
        if len(words) >= request.prompt_tokens:
            break
        words += _words_of(block, block_tokens)
    if len(words) < request.prompt_tokens:
        words += _words_of(_private_key(request, nonce), request.prompt_tokens - len(words))
    return words[: request.prompt_tokens]


def _words_of(key: int, count: int) -> list[str]:
    return _stretch(key, count * 5).decode().split()[:count]


def _fitted(words: list[str], wanted: int, count_tokens: Callable[[str], int]) -> str:
    """``words`` as text, shortened or lengthened at the end until ``count_tokens`` says ``wanted``."""
    for _ in range(_TRIES):
        text = "".join([f" {word}" for word in words])
        found = count_tokens(text)
        if found == wanted:
            return text
        if found < wanted:
            words += [WORDS[(len(words) + place) & 0xFF] for place in range(wanted - found)]
            continue
        # within the last words there may be a place where it is right, if a word is several tokens
        for cut in range(1, min(_CUT_BYTES, len(text)) + 1):
            if count_tokens(text[:-cut]) == wanted:
                return text[:-cut]
        # at least one goes, at most as many as there are too many tokens
        del words[max(0, len(words) - max(1, (found - wanted) * len(words) // max(found, 1))) :]
    raise InvalidRequest(f"no text of {wanted} tokens is found: {len(words)} short words are {found} tokens", param="prompt_tokens")

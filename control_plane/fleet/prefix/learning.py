"""Where in its tokens the pieces of a prompt end: the text is looked up in what the tokens spell.

An engine's ``/tokenize`` gives the prompt as it really sees it, its chat template applied, with the text of each token. Between the
places where pieces end the request's JSON and the template's text say the same in different dress (escapes, roles), so each place is found
by the text just before it. A place that is not found is taken to be where the one before it is: less is claimed than is shared, never more.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

#: bytes of plain text before a place by which it is found, at most, and where they are looked for
_ANCHOR_BYTES: Final = 64
_LOOK_BACK_BYTES: Final = 512
#: the template's own words before the first text that is found (with tools they are many), and between two texts, at most
_BEGINNING_BYTES: Final = 16_384
_BETWEEN_BYTES: Final = 512
#: JSON writes one byte of text in so many at most (``\\u0000``)
_ESCAPE_BYTES: Final = 6
#: text without quotes or escapes, long enough to find a place by (of requests from Python what is read is no JSON, but Python's own form)
_RUN: Final = re.compile(rb"""[^"'\\]{22,}""")
_QUOTE: Final = re.compile(rb"""["']""")


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers (GPT-2's and its heirs) write bytes: printable Latin-1 stands for itself, the others
    follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_LETTERS: Final = _byte_letters()
_BYTE_LEVEL: Final = "Ġ"
_SENTENCE_PIECE: Final = "▁"


def token_bytes(token_strs: Sequence[str]) -> list[bytes]:
    """What each token spells, in UTF-8, whichever of the three usual ways the tokenizer writes its tokens."""
    if any(_BYTE_LEVEL in token for token in token_strs):
        return [
            bytes([_LETTERS[letter] for letter in token])
            if all(letter in _LETTERS for letter in token)
            else token.encode("utf-8", "replace")
            for token in token_strs
        ]
    if any(_SENTENCE_PIECE in token for token in token_strs):
        return [_piece_bytes(token) for token in token_strs]
    return [token.encode("utf-8", "replace") for token in token_strs]


def _piece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SENTENCE_PIECE, " ").encode("utf-8", "replace")


def tokens_at(raw: bytes, places: Sequence[int], spelled: Sequence[bytes]) -> list[int]:
    """How many tokens, from the first on, are settled by the first ``places[i]`` bytes of ``raw``, the prompt as its JSON stands in the
    request. The token that ends at a place may be another one when the text goes on differently, so it is not counted."""
    text = b"".join(spelled)
    ends = list(accumulate(map(len, spelled)))
    finder = _Finder(raw, text)
    return [max(0, bisect_right(ends, finder.find(place)) - 1) for place in places]


class _Finder:
    """Finds places of ``raw`` in ``text``, in rising order."""

    def __init__(self, raw: bytes, text: bytes) -> None:
        self._raw = raw
        self._text = text
        #: byte ``_raw_at`` of raw is byte ``_text_at`` of text
        self._raw_at = self._text_at = 0
        self._slack = _BEGINNING_BYTES

    def find(self, place: int) -> int:
        """Where in the text all of ``raw[:place]`` that could be found ends."""
        raw, text, since = self._raw, self._text, self._raw_at
        piece = raw[since:place]
        if since and text.startswith(piece, self._text_at):
            self._raw_at, self._text_at = place, self._text_at + len(piece)
            return self._text_at
        anchor, end = _last_run(raw, max(since, place - _LOOK_BACK_BYTES), place)
        if anchor:
            piece = raw[since:end]
            # JSON writes a text longer by its escapes, and frames it; the template has words of its own between the texts
            shorter = len(piece) if _QUOTE.search(piece) else (_ESCAPE_BYTES - 1) * piece.count(b"\\")
            begin = self._text_at + max(0, len(piece) - len(anchor) - shorter)
            where = text.find(anchor, begin, self._text_at + len(piece) + self._slack)
            if where >= 0:
                self._raw_at, self._text_at = end, where + len(anchor)
                self._slack = _BETWEEN_BYTES
        return self._text_at


def _last_run(raw: bytes, start: int, place: int) -> tuple[bytes, int]:
    """The last stretch of plain text before ``place``, and where it ends; b"" where there is none of a useful length."""
    runs = list(_RUN.finditer(raw, start, place))
    if not runs:
        return b"", start
    found = runs[-1]
    # what stands first may belong to an escape
    run = found[0][_ESCAPE_BYTES:][-_ANCHOR_BYTES:]
    whole = _whole_characters(run)
    return whole, found.end() - (len(run) - len(run[: run.find(whole) + len(whole)]))


def _whole_characters(run: bytes) -> bytes:
    """Without the pieces of UTF-8 characters at its ends."""
    return run.decode("utf-8", "ignore").encode()

"""The simulated engine's tokenizer: reversible, the same everywhere, about four bytes of English a token.

A token is up to four letters with the blank before them, up to three digits, a run of blanks, or one character. Ids follow from the
text by arithmetic, so there is no vocabulary file. Text that is continued keeps the tokens it had, except the last one.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import xxhash

_PIECES: Final = re.compile(r" ?[A-Za-z][a-z]{0,3}| ?[0-9]{1,3}| {2,64}|.", re.DOTALL)

#: ids below are single characters
SPECIAL_BASE: Final = 0x110000
BOS: Final = SPECIAL_BASE
EOS: Final = SPECIAL_BASE + 1
IM_START: Final = SPECIAL_BASE + 2
IM_END: Final = EOS
_BLANKS_BASE: Final = SPECIAL_BASE + 16
_DIGITS_BASE: Final = _BLANKS_BASE + 65
_WORDS_BASE: Final = _DIGITS_BASE + 2 * 1110
_WORDS: Final = 27**4
VOCABULARY_SIZE: Final = _WORDS_BASE + 4 * _WORDS
#: entries in each of the two lookup tables; they are emptied when full
_TABLE_LIMIT: Final = 200_000


class _Ids(dict[str, int]):
    def __missing__(self, piece: str) -> int:
        if len(self) >= _TABLE_LIMIT:
            self.clear()
        self[piece] = token = _id_of(piece)
        return token


class _JsonPieces(dict[int, bytes]):
    def __missing__(self, token: int) -> bytes:
        if len(self) >= _TABLE_LIMIT:
            self.clear()
        self[token] = piece = json_text(_text_of(token))
        return piece


class Tokenizer:
    """Text to ids and back. ``json_pieces[id]`` is a token's text as it stands inside a JSON string."""

    __slots__ = ("_ids", "json_pieces")

    def __init__(self) -> None:
        self._ids = _Ids()
        self.json_pieces = _JsonPieces()

    def encode(self, text: str) -> list[int]:
        return list(map(self._ids.__getitem__, _PIECES.findall(text)))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; special tokens and ids out of the vocabulary have none."""
        return "".join(map(_text_of, tokens))

    def piece(self, token: int) -> str:
        return _text_of(token)


def json_text(text: str) -> bytes:
    """``text`` as it stands between the quotes of a JSON string (a half of a surrogate pair becomes U+FFFD)."""
    try:
        return msgspec.json.encode(text)[1:-1]
    except UnicodeEncodeError:
        return msgspec.json.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))[1:-1]


def block_hashes(tokens: Sequence[int], block_tokens: int, known: Sequence[int], salt: int = 0) -> list[int]:
    """The hashes of all full blocks of ``tokens``, each over the block and all before it; ``known`` are those of the first ones."""
    hashes = list(known)
    start = len(hashes) * block_tokens
    data = array("I", tokens[start:]).tobytes()
    width = 4 * block_tokens
    parent = hashes[-1] if hashes else salt
    for offset in range(0, len(data) - width + 1, width):
        parent = xxhash.xxh3_64_intdigest(data[offset : offset + width], parent)
        hashes.append(parent)
    return hashes


def _id_of(piece: str) -> int:
    if len(piece) == 1:
        return ord(piece)
    blank, body = (1, piece[1:]) if piece[0] == " " else (0, piece)
    if not body.strip(" "):
        return _BLANKS_BASE + len(piece)
    if body[0] <= "9":
        return _DIGITS_BASE + blank * 1110 + (0, 0, 10, 110)[len(body)] + int(body)
    capital = body[0] < "a"
    code = 0
    for letter in body.lower():
        code = code * 27 + ord(letter) - 96
    return _WORDS_BASE + (2 * blank + capital) * _WORDS + code


def _text_of(token: int) -> str:
    if token < SPECIAL_BASE:
        return chr(token) if token >= 0 else ""
    if token < _BLANKS_BASE or token >= VOCABULARY_SIZE:
        return ""
    if token < _DIGITS_BASE:
        return " " * (token - _BLANKS_BASE)
    if token < _WORDS_BASE:
        blank, number = divmod(token - _DIGITS_BASE, 1110)
        width, first = (1, 0) if number < 10 else (2, 10) if number < 110 else (3, 110)
        return f"{' ' * blank}{number - first:0{width}d}"
    form, code = divmod(token - _WORDS_BASE, _WORDS)
    letters = ""
    while code:
        code, letter = divmod(code, 27)
        letters = (chr(letter + 96) if letter else "") + letters
    return " " * (form >> 1) + (letters.capitalize() if form & 1 else letters)

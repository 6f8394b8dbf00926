"""What the simulated model says: words that follow from the last 64 tokens and the seed, and from nothing else.

So the same prompt gives the same text on every engine, and a prompt continued with part of its answer gets the rest of it. The end
comes after 200 tokens on average (geometric), unless a limit, a stop or a forced text comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from control_plane.sim_engine.tokens import EOS, IM_START, Tokenizer

_MASK: Final = (1 << 64) - 1
_A: Final = 0x9E3779B97F4A7C15
_B: Final = 0xD6E8FEB86659FD93
_WINDOW: Final = 64
_DROP: Final = pow(_A, _WINDOW, 1 << 64)
MEAN_OUTPUT_TOKENS: Final = 200
#: no answer ends by itself before this many: an empty one would look like a fault
SHORTEST_OUTPUT_TOKENS: Final = 8
_END_BELOW: Final = 0x10000 // MEAN_OUTPUT_TOKENS
#: tokens made at a time where the length is known beforehand
_BATCH: Final = 64
#: a turn does not end before so many tokens after its beginning (four of them are the role)
_FIRST_END: Final = 20

_TEXT: Final = (
    "the and for are but not you all any can had her was one our out day get has him his how man new now old see two way who boy did "
    "its let put say she too use air ask bed big bit box buy car cat cup cut dog ear eat egg end eye far few fit fly fun gas god gun "
    "hat hit hot ice job key kid law lay leg lie lot low map may men mix mom net nor oil own pay pen per pop red rip road rock role "
    "room rule run safe said sale salt same sand save seat seed seek seem seen self sell send sent ship shop show shut side sign site "
    "size skin slow snow soft soil sold some song soon sort soul spot star stay step stop such suit sure take tale talk tall tank "
    "task team tell tend term test text than that them then they thin this thus till time tiny told tone tool tour town tree trip "
    "true turn twin type unit upon user vary vast very view vote wage wait wake walk wall want warm wash wave weak wear week well "
    "went were west what when whom wide wife wild will wind wine wing wire wise wish with wood word wore work yard year your zero "
    "zone able acid aged also area army away baby back ball band bank base bath bear beat been beer bell belt best bill bird blow "
    "blue boat body bomb bond bone book boom born boss"
)
#: 256 of them, each one token with the blank before it
WORDS: Final = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What of a request decides its text. ``forced``: this text and no other, then the end."""

    max_tokens: int
    min_tokens: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    biased: int | None = None
    forced: tuple[int, ...] = ()


class Generation:
    """One sequence's output, known beforehand: ``ids`` (made as far as needed, see :meth:`extend`), ``total`` tokens, the reason.

    ``tail`` is what the text loses at its end (a stop string, the last token's text). ``hold_back`` characters are kept from a
    stream until the end, since they could turn out to be the beginning of a stop string.
    """

    __slots__ = ("_tokens", "finish_reason", "hold_back", "ids", "include_last", "stop_reason", "text_end", "total")

    def __init__(self, tokens: Iterator[tuple[int, bool]], limit: int) -> None:
        self._tokens = tokens
        self.ids: list[int] = []
        self.total = limit
        self.finish_reason = "length"
        self.stop_reason: str | int | None = None
        #: the last token's text belongs to the output
        self.include_last = True
        self.text_end: int | None = None
        self.hold_back = 0

    def extend(self, count: int) -> None:
        """Have at least ``count`` ids (all there will be, if those are fewer)."""
        ids = self.ids
        missing = min(count, self.total) - len(ids)
        if missing > 0:
            ahead = min(max(missing, _BATCH), self.total - len(ids))
            ids.extend(token for token, _ in itertools.islice(self._tokens, ahead))

    def cut(self, count: int) -> None:
        """End after ``count`` tokens: the engine was stopped."""
        self.extend(count)
        del self.ids[count:]
        self.total = count
        self.finish_reason = "abort"
        self.stop_reason = None
        self.include_last = True

    def text(self, tokenizer: Tokenizer, count: int | None = None) -> str:
        """The text of the first ``count`` tokens (all of them: without what a stop takes away)."""
        if count is not None and count < self.total:
            self.extend(count)
            return tokenizer.decode(self.ids[:count])[: self.text_end]
        self.extend(self.total)
        return tokenizer.decode(self.ids if self.include_last else self.ids[: self.total - 1])[: self.text_end]


class Speaker:
    """Makes generations."""

    __slots__ = ("_tokenizer", "_vocabulary")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = [tokenizer.encode(" " + word)[0] for word in WORDS]

    def generate(self, prompt: Sequence[int], sampling: Sampling, index: int = 0) -> Generation:
        tokens = self._tokens(prompt, sampling, index)
        generation = Generation(tokens, sampling.max_tokens)
        endless = sampling.ignore_eos and not sampling.forced and not sampling.stop and not sampling.stop_token_ids
        if not endless:
            self._find_end(generation, tokens, sampling)
        if sampling.stop and not sampling.include_stop:
            generation.hold_back = max(map(len, sampling.stop)) - 1
        return generation

    def _find_end(self, generation: Generation, tokens: Iterator[tuple[int, bool]], sampling: Sampling) -> None:
        ids = generation.ids
        text = ""
        while len(ids) < sampling.max_tokens:
            token, ends = next(tokens)
            past_minimum = len(ids) >= sampling.min_tokens
            long_enough = past_minimum and (sampling.forced or len(ids) >= SHORTEST_OUTPUT_TOKENS)
            if ends and long_enough and not sampling.ignore_eos:
                ids.append(EOS)
                self._stop(generation, None)
                return
            ids.append(token)
            if token in sampling.stop_token_ids and past_minimum:
                self._stop(generation, token)
                generation.include_last = sampling.include_stop
                return
            if sampling.stop:
                seen = len(text)
                text += self._tokenizer.piece(token)
                if past_minimum and self._find_stop(generation, text, seen, sampling):
                    return

    def _stop(self, generation: Generation, reason: str | int | None) -> None:
        generation.total = len(generation.ids)
        generation.finish_reason = "stop"
        generation.stop_reason = reason

    def _find_stop(self, generation: Generation, text: str, seen: int, sampling: Sampling) -> bool:
        for stop in sampling.stop:
            at = text.find(stop, max(0, seen - len(stop) + 1))
            if at >= 0:
                self._stop(generation, stop)
                generation.text_end = at + len(stop) if sampling.include_stop else at
                return True
        return False

    def _tokens(self, prompt: Sequence[int], sampling: Sampling, index: int) -> Iterator[tuple[int, bool]]:
        """Ids without end, each with whether the model would have ended there."""
        last = [0] * _WINDOW + list(prompt[-_WINDOW:])
        state = 0
        for token in last[-_WINDOW:]:
            state = (state * _A + token + 1) & _MASK
        last = last[-_WINDOW:]
        turn = max((place for place, token in enumerate(last) if token == IM_START), default=-_FIRST_END)
        quiet = max(0, _FIRST_END - (_WINDOW - turn))
        seed = (sampling.seed * _B + index * _A) & _MASK
        forced = sampling.forced
        vocabulary = self._vocabulary
        place = 0
        while True:
            mixed = ((state ^ seed) * _B) & _MASK
            mixed = ((mixed ^ (mixed >> 31)) * _A) & _MASK
            ends = place >= quiet and (mixed >> 20) & 0xFFFF < _END_BELOW
            token = vocabulary[mixed >> 56]
            if sampling.biased is not None:
                token = sampling.biased
            if forced:
                ends = place >= len(forced)
                if not ends:
                    token = forced[place]
            yield token, ends
            slot = place % _WINDOW
            state = (state * _A + token + 1 - (last[slot] + 1) * _DROP) & _MASK
            last[slot] = token
            place += 1

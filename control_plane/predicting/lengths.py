"""How long answers get: distributions by model, tenant, prompt length and ``max_tokens``, the finest that has been seen often enough.

One prompt's answers are spread widely, so no single number is right: the middle (P50) says who is short, the high end (P90) how much
memory to expect, the mean what adds up to a load. Once tokens have streamed, the rest follows from the answers that got that long.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from control_plane.predicting.sketch import LogSketch

OUTPUT_TOKENS_PRIOR: Final = 200.0
#: answers of a class before it is believed over the coarser one
LENGTH_SAMPLES: Final = 24
#: answers that a class remembers
MEMORY: Final = 1000.0
#: a class's quantiles are worked out anew after each answer at first, later after one in so many
_LAZY: Final = 8
#: distributions kept; a quarter of them, the oldest, goes when they are too many. About 3 KB each.
MAX_CLASSES: Final = 4096
_OCTAVES: Final = 18

_Key = tuple[str, str, int, int]
#: stands for "any" in a key
_ANY: Final = -1


class LengthClass:
    """Answers of one class, in tokens."""

    __slots__ = ("_dirty", "mean", "p50", "p90", "sketch")

    def __init__(self) -> None:
        self.sketch = LogSketch(1.0, _OCTAVES, MEMORY)
        self.mean = OUTPUT_TOKENS_PRIOR
        self.p50 = OUTPUT_TOKENS_PRIOR
        self.p90 = 2.0 * OUTPUT_TOKENS_PRIOR
        self._dirty = 0

    def observe(self, tokens: float) -> None:
        sketch = self.sketch
        sketch.add(tokens)
        memory = min(float(sketch.count), MEMORY)
        self.mean += (tokens - self.mean) / memory
        self._dirty += 1
        if sketch.count < 64 or self._dirty >= _LAZY:
            self._dirty = 0
            self.p50 = sketch.quantile(0.5)
            # the share of new values that stay below the k-th of n is k / (n + 1): of few, a higher one is the P90
            self.p90 = sketch.quantile(min(1.0, 0.9 * (1.0 + 1.0 / sketch.count)))


@mypyc_attr(allow_interpreted_subclasses=True)
class Lengths:
    """All classes. A class is a model, a tenant, a size of prompt and a size of ``max_tokens`` (powers of two), or less of that.

    A simulation puts one of its own here that knows them.
    """

    __slots__ = ("_all", "_classes")

    def __init__(self) -> None:
        self._classes: dict[_Key, LengthClass] = {}
        self._all = LengthClass()

    def of(self, model: str, tenant: str, prompt_tokens: int, limit: int | None) -> LengthClass:
        """The finest class with enough answers; one of all models' where there is none."""
        classes = self._classes
        size, top = prompt_tokens.bit_length(), 0 if limit is None else limit.bit_length()
        found = classes.get((model, tenant, size, top))
        if found is not None and found.sketch.count >= LENGTH_SAMPLES:
            return found
        found = classes.get((model, tenant, _ANY, top))
        if found is not None and found.sketch.count >= LENGTH_SAMPLES:
            return found
        found = classes.get((model, "", size, top))
        if found is not None and found.sketch.count >= LENGTH_SAMPLES:
            return found
        found = classes.get((model, "", _ANY, top))
        if found is not None and found.sketch.count >= LENGTH_SAMPLES:
            return found
        found = classes.get((model, "", _ANY, _ANY))
        if found is not None and found.sketch.count >= LENGTH_SAMPLES:
            return found
        return self._all

    def observe(self, model: str, tenant: str, prompt_tokens: int, limit: int | None, tokens: int) -> None:
        """An answer ended by itself or at its limit after ``tokens``."""
        value = float(max(1, tokens))
        size, top = prompt_tokens.bit_length(), 0 if limit is None else limit.bit_length()
        self._all.observe(value)
        self._class((model, "", _ANY, _ANY)).observe(value)
        self._class((model, "", _ANY, top)).observe(value)
        self._class((model, "", size, top)).observe(value)
        if tenant:
            self._class((model, tenant, _ANY, top)).observe(value)
            self._class((model, tenant, size, top)).observe(value)

    def _class(self, key: _Key) -> LengthClass:
        classes = self._classes
        found = classes.get(key)
        if found is None:
            if len(classes) >= MAX_CLASSES:
                for old in list(classes)[: MAX_CLASSES // 4]:
                    del classes[old]
            found = classes[key] = LengthClass()
        return found


def remaining(of: LengthClass, streamed: int, q: float) -> float:
    """The ``q``-quantile of the tokens still to come of an answer of this class that has ``streamed`` already.

    Conditioned: among answers longer than that. Where hardly any was, as many again as half of what has come.
    """
    sketch = of.sketch
    if not sketch.count:
        return max(1.0, OUTPUT_TOKENS_PRIOR - streamed)
    gone = sketch.share_below(streamed) if streamed > 0 else 0.0
    if gone > 0.999:
        return max(1.0, 0.5 * streamed)
    return max(1.0, sketch.quantile(gone + q * (1.0 - gone)) - streamed)

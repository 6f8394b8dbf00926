"""How much of a prompt an engine really finds cached, given what the prefix index says: the index may look at the beginning only."""

from __future__ import annotations

from typing import Final

#: requests of a class that its mean remembers
MEMORY: Final = 100.0
MAX_MODELS: Final = 1024
#: three classes a model: the index found nothing, a part, or all that it looks at
_NOTHING: Final = 0
_PART: Final = 1
_ALL: Final = 2


class HitShares:
    """Per model and class: which share of the rest of a prompt, beyond what the index said, was cached in the end. It may be negative
    in sum where the index says too much; then of what it said a part is taken off."""

    __slots__ = ("_counts", "_longest", "_rest")

    def __init__(self) -> None:
        self._rest: dict[str, list[float]] = {}
        self._counts: dict[str, list[float]] = {}
        #: most that the index ever said of the model, tokens: what it can see
        self._longest: dict[str, int] = {}

    def expected(self, model: str, prompt_tokens: int, told_tokens: int) -> int:
        """Cached tokens of a prompt of which the index says that ``told_tokens`` are."""
        told = min(told_tokens, prompt_tokens)
        rest = self._rest.get(model)
        if rest is None:
            return told
        found = told + rest[self._class(model, told)] * (prompt_tokens - told)
        return max(0, min(prompt_tokens - 1, int(found)))

    def observe(self, model: str, prompt_tokens: int, told_tokens: int, cached_tokens: int) -> None:
        """The engine found ``cached_tokens`` of the prompt."""
        told = min(told_tokens, prompt_tokens)
        rest = self._rest.get(model)
        if rest is None:
            if len(self._rest) >= MAX_MODELS:
                self._rest.clear()
            rest = self._rest[model] = [0.0, 0.0, 0.0]
            self._counts[model] = [0.0, 0.0, 0.0]
        if told > self._longest.get(model, 0):
            self._longest[model] = told
        at = self._class(model, told)
        counts = self._counts[model]
        counts[at] = min(MEMORY, counts[at] + 1.0)
        seen = (cached_tokens - told) / max(1.0, float(prompt_tokens - told))
        rest[at] += (max(-1.0, min(1.0, seen)) - rest[at]) / (counts[at] + 2.0)

    def _class(self, model: str, told: int) -> int:
        if not told:
            return _NOTHING
        return _ALL if told >= self._longest.get(model, 0) else _PART

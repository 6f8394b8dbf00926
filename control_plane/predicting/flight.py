"""One request on one engine, as the predictor keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from control_plane.predicting.book import InstanceBook


class Flight:
    """One request on one engine. ``*_s`` are monotonic seconds."""

    __slots__ = (
        "batch",
        "beside_ms",
        "book",
        "cached_tokens",
        "context_tokens",
        "era",
        "exclusive",
        "first_s",
        "group",
        "index_tokens",
        "kv_tokens",
        "length_p50",
        "length_p90",
        "own_ms",
        "pairs",
        "plain_ms",
        "predicted_tokens",
        "predicted_tpot_ms",
        "predicted_ttft_ms",
        "predicted_usd",
        "prompt_tokens",
        "raw_ttft_ms",
        "sent_s",
        "share_ms",
        "state",
        "step_s",
        "told",
        "uncached_tokens",
        "waits_step",
        "window_batch_s",
        "window_context_s",
        "window_excess_ms",
        "window_mixed",
        "window_parts",
        "window_s",
        "window_tokens",
    )

    def __init__(self, book: InstanceBook, sent_s: float, prompt_tokens: int, index_tokens: int, cached_tokens: int) -> None:
        self.book = book
        self.sent_s = sent_s
        self.prompt_tokens = prompt_tokens
        #: cached as the prefix index says, and as expected
        self.index_tokens = index_tokens
        self.cached_tokens = cached_tokens
        self.uncached_tokens = float(max(1, prompt_tokens - cached_tokens))
        self.pairs = self.uncached_tokens * (cached_tokens + 0.5 * self.uncached_tokens)
        self.context_tokens = 0.0
        #: 0: its prompt waits or is computed, 1: it decodes, 2: it has left
        self.state = 0
        #: of the engine's model when it was sent
        self.era = book.steps.era
        self.told = 0
        self.first_s = 0.0
        #: it came while nobody waited; nobody came after it either
        self.exclusive = False
        #: a decode step was under way when it came
        self.waits_step = False
        #: when the step began in which its prompt was computed alone; 0.0: not so
        self.step_s = 0.0
        #: decoding beside its prompt, and their context
        self.batch = 0.0
        self.kv_tokens = 0.0
        self.group = 0
        # the readings when its present window began
        self.window_s = self.window_batch_s = self.window_context_s = self.window_mixed = self.window_excess_ms = 0.0
        self.window_parts: list[float] = []
        self.window_tokens = 0
        #: engine milliseconds that it took up in decode, and those of its prompt
        self.share_ms = 0.0
        self.own_ms = 0.0
        # what was predicted when it was sent; without the correction by what came of earlier ones: TTFT, and of TPOT decoding and the rest
        self.plain_ms = self.beside_ms = 0.0
        self.raw_ttft_ms = self.predicted_ttft_ms = self.predicted_tpot_ms = 0.0
        self.predicted_tokens = self.length_p50 = self.length_p90 = self.predicted_usd = 0.0

"""What is in flight on one engine as far as we know first hand, and what its steps have been doing: the input of every prediction.

A request waits for its prompt's steps, then decodes. An engine computes the prompts that have come by a step's beginning together, so
those in flight are either in the step under way or in the next one: when a first token comes, a step has ended, and whoever waits then is
in the one that begins. Sums over time (batch, context) and over steps with prompts (the parts of StepModel) are kept running, so that what
happened during any one answer is a difference of two readings. O(1) an event; no list is walked.

Requests that others sent to the same engine are known by their number only, from scrapes: they count as decoding, with as much context as
ours have, and as bringing prompts as often as ours do.
"""

from __future__ import annotations

import math
from typing import Final

from control_plane.predicting.arrivals import Arrivals
from control_plane.predicting.flight import Flight
from control_plane.predicting.ratio import OwnRatio
from control_plane.predicting.shared_steps import EngineSteps
from control_plane.predicting.step_model import SIZE

#: context of a request of which none is known
TYPICAL_CONTEXT_TOKENS: Final = 1000.0
#: others' requests for each of ours, at most, where what they do is guessed from what ours do; over so many seconds
MOST_CROWD: Final = 4.0
CROWD_S: Final = 20.0
#: first tokens of one step come within this, seconds
SAME_STEP_S: Final = 0.0005
#: batch and share of time that are reckoned with at most
MOST_BATCH: Final = 512.0
MOST_EXCESS: Final = 0.9
#: rates are read anew after so many seconds
RATES_S: Final = 0.1
#: bursts last so long on average, seconds
BURST_S: Final = 5.0
#: a sample of decode needs so many tokens; a stream is told of its tokens 32 at a time
SAMPLE_TOKENS: Final = 48
#: of an engine one is taken in so many seconds, once it has had so many
SAMPLE_INTERVAL_S: Final = 0.25
LEARN_ALL_SAMPLES: Final = 256
#: no first token for this many times what is expected, and this long, means that the engine is that much slower
PATIENCE: Final = 2.0
PATIENCE_MS: Final = 100.0
MOST_SLOWER: Final = 100.0


class InstanceBook:
    """One engine. A data-parallel server's ranks work side by side: ``ranks`` of them share what is in flight evenly."""

    __slots__ = (
        "_batch_s",
        "_coming",
        "_context_s",
        "_crowd",
        "_excess",
        "_excess_ms",
        "_group",
        "_group_batch",
        "_group_flights",
        "_group_kv",
        "_group_pairs",
        "_group_prompts",
        "_group_s",
        "_group_span_s",
        "_group_tokens",
        "_group_uncommitted",
        "_mean_others",
        "_mean_ours",
        "_mixed",
        "_now_s",
        "_parts",
        "_rates_s",
        "_ratio_era",
        "_residence_s",
        "_usual",
        "arrivals",
        "context_tokens",
        "current_pairs",
        "current_prompts",
        "current_s",
        "current_tokens",
        "decoding",
        "in_flight",
        "known",
        "late_pairs",
        "late_prompts",
        "late_tokens",
        "next_sample_s",
        "others",
        "ranks",
        "sampled_s",
        "steps",
        "tokens_due",
        "tpot_ratio",
        "ttft_ratio",
    )

    def __init__(self, steps: EngineSteps, ranks: int, now_s: float) -> None:
        self.steps = steps
        self.ranks = float(ranks)
        #: something has been sent there through us
        self.known = False
        self.in_flight = 0.0
        #: requests of others on the engine
        self.others = 0.0
        #: ours and others' over time, and by what the work of ours is to be multiplied to be that of all
        self._mean_ours = self._mean_others = 0.0
        self._crowd = 1.0
        self.decoding = 0.0
        #: of those that decode
        self.context_tokens = 0.0
        #: prompts in the step under way, and those that came after it began
        self.current_tokens = self.current_pairs = self.current_prompts = 0.0
        self.late_tokens = self.late_pairs = self.late_prompts = 0.0
        #: when the step under way began
        self.current_s = now_s
        self.next_sample_s = 0.0
        #: when its last sample was taken
        self.sampled_s = now_s
        self.ttft_ratio = OwnRatio()
        self.tpot_ratio = OwnRatio()
        self._ratio_era = steps.era
        self._now_s = now_s
        self._batch_s = self._context_s = 0.0
        self._mixed = self._excess_ms = 0.0
        #: over the steps with prompts: parts of StepModel (3: context tokens, 4: pairs, 5: batch, in their own units), seconds, and batch
        #: and context over those seconds
        self._parts = [0.0] * (SIZE + 2)
        #: milliseconds by which prompts made steps longer, or would have
        self._excess = Arrivals(now_s)
        #: as it was a moment ago: the share of time for prompts, the batch that comes, and how long one of it stays
        self._usual = self._coming = self._residence_s = 0.0
        self._rates_s = -1e9
        #: requests, and their expected tokens
        self.arrivals = Arrivals(now_s)
        self.tokens_due = Arrivals(now_s)
        self._group = 0
        self._group_s = -1.0
        self._group_batch = self._group_kv = self._group_span_s = 0.0
        self._group_tokens = self._group_pairs = self._group_prompts = 0.0
        self._group_uncommitted = False
        self._group_flights: list[Flight] = []

    # ---- what happens

    def send(self, flight: Flight, *, streamed: bool, delay_ms: float) -> None:
        """A request goes there now. ``streamed``: its first token will show."""
        now_s = flight.sent_s
        self._advance(now_s)
        flight.batch = self._batch()
        flight.kv_tokens = self.kv_tokens()
        flight.waits_step = flight.batch > 0.0
        self.in_flight += 1.0
        self.known = True
        self.arrivals.add(now_s)
        self.tokens_due.add(now_s, flight.predicted_tokens)
        if not streamed:
            # nothing shows when its prompt is done: it counts as decoding from the start
            self._prompt_done(flight, now_s)
            flight.first_s = 0.0
            return
        waiting = self.current_prompts + self.late_prompts
        if waiting == 0.0:
            flight.exclusive = self.others < 0.5
            step_ms = self.steps.decode_ms(flight.batch, flight.kv_tokens) if flight.waits_step else 0.0
            self.current_s = now_s + 0.001 * (delay_ms + 0.5 * step_ms)
        if now_s + 0.001 * delay_ms <= self.current_s or waiting == 0.0:
            self.current_tokens += flight.uncached_tokens
            self.current_pairs += flight.pairs
            self.current_prompts += 1.0
        else:
            self.late_tokens += flight.uncached_tokens
            self.late_pairs += flight.pairs
            self.late_prompts += 1.0

    def tokens(self, flight: Flight, count: int, first_s: float, last_s: float) -> None:
        """It got ``count`` more tokens."""
        if flight.state == 2:
            return
        if flight.state == 0:
            flight.first_s = first_s
            self._first(flight, first_s)
            flight.told = 1
            count -= 1
            if count <= 0:
                return
        self._advance(last_s)
        flight.told += count
        flight.context_tokens += count
        self.context_tokens += count
        if flight.first_s > 0.0 and flight.told - flight.window_tokens >= SAMPLE_TOKENS and self._wants_sample(last_s):
            self._sample(flight, last_s)

    def leave(self, flight: Flight, now_s: float, *, well: bool) -> None:
        """It has ended, ``well`` or not."""
        if flight.state == 2:
            return
        self._advance(now_s)
        self.in_flight = max(0.0, self.in_flight - 1.0)
        if flight.state == 1:
            if well and flight.first_s > 0.0 and flight.told - flight.window_tokens >= 8 and self._wants_sample(now_s):
                self._sample(flight, now_s)
            else:
                self._take_share(flight)
            self.decoding = max(0.0, self.decoding - 1.0)
            self.context_tokens = max(0.0, self.context_tokens - flight.context_tokens) if self.decoding else 0.0
        else:
            self._no_longer_waits(flight)
            if self.current_prompts == 0.0:
                self._begin_step(now_s)
        flight.state = 2
        if self.in_flight == 0.0:
            self.current_tokens = self.current_pairs = self.current_prompts = 0.0
            self.late_tokens = self.late_pairs = self.late_prompts = 0.0

    def compares(self, flight: Flight) -> bool:
        """Whether what was predicted of a flight says something of the present model; after a step change the ratios begin anew."""
        era = self.steps.era
        if self._ratio_era != era:
            self._ratio_era = era
            self.ttft_ratio.forget()
            self.tpot_ratio.forget()
        return flight.era == era

    # ---- what is to be expected

    @property
    def ttft_correction(self) -> float:
        """By what first tokens of the engine's kind, and of this one beyond that, came later than predicted."""
        return self.steps.kind.ttft_ratio.value * self.ttft_ratio.factor

    @property
    def tpot_correction(self) -> float:
        """The same for what of a token's time is not a decode step."""
        return self.steps.kind.tpot_ratio.value * self.tpot_ratio.factor

    def kv_tokens(self) -> float:
        """The context of those that decode on one rank."""
        if self.others <= 0.0:
            return self.context_tokens / self.ranks
        own = self.context_tokens / self.decoding if self.decoding > 0.5 else TYPICAL_CONTEXT_TOKENS
        return (self.context_tokens + self.others * own) / self.ranks

    def slower(self, now_s: float) -> float:
        """How many times slower than believed it must be, since a prompt that is being computed has no first token for so long; 1.0:
        nothing says so. Streams that tell nothing say nothing: their clients may be the slow ones."""
        if self.current_prompts <= 0.0:
            return 1.0
        silent_ms = 1000.0 * (now_s - self.current_s)
        if silent_ms <= PATIENCE_MS:
            return 1.0
        ranks = self.ranks
        batch, kv_tokens = self._batch(), self.kv_tokens()
        tokens, pairs = self.current_tokens / ranks, self.current_pairs / ranks
        expected_ms = self.steps.prefill_ms(tokens, pairs, self.current_prompts / ranks, batch, kv_tokens)
        return 1.0 if silent_ms <= PATIENCE * expected_ms + PATIENCE_MS else min(MOST_SLOWER, silent_ms / (expected_ms + 1.0))

    def wait_ms(self, now_s: float, delay_ms: float) -> float:
        """Until the step in which a newcomer's prompt is computed begins, after it has got there."""
        ranks = self.ranks
        steps = self.steps
        if self.current_prompts <= 0.0:
            batch = self._batch()
            return 0.5 * steps.decode_ms(batch, self.kv_tokens()) if batch > 0.0 else 0.0
        elapsed_ms = 1000.0 * (now_s - self.current_s) + delay_ms
        if elapsed_ms <= 0.0:
            return -elapsed_ms  # it gets there before that step begins
        batch, kv_tokens = self._batch(), self.kv_tokens()
        under_way_ms = steps.prefill_ms(self.current_tokens / ranks, self.current_pairs / ranks, self.current_prompts, batch, kv_tokens)
        return max(0.05 * under_way_ms, under_way_ms - elapsed_ms)

    def own_ms(self, uncached_tokens: float, pairs: float, now_s: float, delay_ms: float) -> float:
        """The steps in which a newcomer's prompt is computed, together with those that wait for the same step."""
        ranks = self.ranks
        batch, kv_tokens = self._batch(), self.kv_tokens()
        if self.current_prompts <= 0.0:
            return self.steps.prefill_ms(uncached_tokens, pairs, 1.0, batch, kv_tokens)
        if 1000.0 * (now_s - self.current_s) + delay_ms <= 0.0:
            tokens, more, prompts = self.current_tokens, self.current_pairs, self.current_prompts
        else:
            tokens, more, prompts = self.late_tokens, self.late_pairs, self.late_prompts
        return self.steps.prefill_ms(tokens / ranks + uncached_tokens, more / ranks + pairs, prompts + 1.0, batch, kv_tokens)

    def tpot_ms(self, prompt_tokens: float, length: float, first_ms: float, burst: float, now_s: float) -> tuple[float, float]:
        """Milliseconds per token of a newcomer's answer of ``length`` tokens, after ``first_ms`` to its first: of decoding, and beside it.

        A decode step at the batch expected meanwhile, longer by the share of time in which the prompts of others are computed. Those of
        now leave (one mean answer is the time constant) and as many as usual come. ``burst``: how much more than usual comes now.
        """
        ranks, steps = self.ranks, self.steps
        others = (self.in_flight + self.others) / ranks
        context = self.context_tokens / self.decoding if self.decoding > 0.5 else prompt_tokens + 0.5 * length
        own = prompt_tokens + 0.5 * length
        if now_s - self._rates_s > RATES_S:
            self._rates_s = now_s
            self._look_ahead(others, context, now_s)
        usual = self._usual
        present_ms = steps.decode_ms(others + 1.0, others * context + own) / (1.0 - usual)
        length_s = 0.001 * length * present_ms
        share = _present_share(length_s, self._residence_s if self._residence_s > 0.0 else length_s)
        batch = share * others + (1.0 - share) * self._coming
        lasting = _present_share(length_s + 0.001 * first_ms, BURST_S)
        excess = min(MOST_EXCESS, usual * (1.0 - lasting + lasting * burst))
        step_ms = steps.decode_ms(batch + 1.0, batch * context + own)
        return step_ms, step_ms * excess / (1.0 - excess)

    def _look_ahead(self, others: float, context: float, now_s: float) -> None:
        """What the batch comes to if requests go on coming as usual: by Little's law tokens expected a second times the time of one. That
        time grows with the batch, but following that to where it ends gains nothing (measured)."""
        crowd, steps = self._crowd / self.ranks, self.steps
        usual = self._usual = min(MOST_EXCESS, 0.001 * self._excess.rate(now_s) * crowd)
        due = self.tokens_due.rate(now_s) * crowd
        rate = self.arrivals.rate(now_s) * crowd
        token_ms = steps.decode_ms(others + 1.0, (others + 1.0) * context) / (1.0 - usual)
        self._coming = min(MOST_BATCH, 0.001 * due * token_ms)
        self._residence_s = 0.001 * token_ms * due / rate if rate > 0.0 else 0.0

    # ---- inside

    def _advance(self, now_s: float) -> None:
        span_s = now_s - self._now_s
        if span_s <= 0.0:
            return
        self._now_s = now_s
        self._batch_s += (self.decoding + self.others) * span_s
        self._context_s += self.kv_tokens() * self.ranks * span_s
        if self.others > 0.0 or self._mean_others > 0.0:
            share = span_s / (CROWD_S + span_s)
            self._mean_ours += share * (self.in_flight - self._mean_ours)
            self._mean_others += share * (self.others - self._mean_others)
            self._crowd = 1.0 + min(MOST_CROWD, self._mean_others / max(0.5, self._mean_ours))

    def _batch(self) -> float:
        """Who decodes on one rank."""
        return (self.decoding + self.others) / self.ranks

    def _first(self, flight: Flight, now_s: float) -> None:
        """Its first token: a step has ended."""
        self._advance(now_s)
        if self.late_prompts > 0.0 or self.current_prompts > 1.5:
            flight.exclusive = False
        if 0.5 < self.current_prompts < 1.5 and self._group_s == self.current_s and self.others < 0.5:
            flight.step_s = self.current_s  # that step began when the one before ended, and had this prompt alone
        flight.batch = self._batch()
        flight.kv_tokens = self.kv_tokens()
        self._no_longer_waits(flight)
        self._prompt_done(flight, now_s)
        self._begin_step(self._group_s)

    def _begin_step(self, now_s: float) -> None:
        """Whoever has been waiting is in the step that begins now."""
        self.current_tokens += self.late_tokens
        self.current_pairs += self.late_pairs
        self.current_prompts += self.late_prompts
        self.late_tokens = self.late_pairs = self.late_prompts = 0.0
        self.current_s = now_s

    def _no_longer_waits(self, flight: Flight) -> None:
        if self.current_prompts > 0.5:
            self.current_prompts -= 1.0
            self.current_tokens = max(0.0, self.current_tokens - flight.uncached_tokens) if self.current_prompts > 0.5 else 0.0
            self.current_pairs = max(0.0, self.current_pairs - flight.pairs) if self.current_prompts > 0.5 else 0.0
            if self.current_prompts < 0.5:
                self.current_prompts = 0.0
        elif self.late_prompts > 0.5:
            self.late_prompts -= 1.0
            self.late_tokens = max(0.0, self.late_tokens - flight.uncached_tokens)
            self.late_pairs = max(0.0, self.late_pairs - flight.pairs)

    def _prompt_done(self, flight: Flight, now_s: float) -> None:
        if now_s - self._group_s > SAME_STEP_S or self._group_s < 0.0:
            self._commit()
            self._group += 1
            self._group_s = now_s
            self._group_batch = self._batch()
            self._group_kv = self.kv_tokens()
            self._group_span_s = max(0.0, now_s - self.current_s) if self.current_prompts > 0.0 else 0.0
            self._group_tokens = self._group_pairs = self._group_prompts = 0.0
            self._group_uncommitted = True
        self._group_tokens += flight.uncached_tokens / self.ranks
        self._group_pairs += flight.pairs / self.ranks
        self._group_prompts += 1.0
        flight.group = self._group
        self._group_flights.append(flight)
        flight.state = 1
        flight.told = 0
        flight.context_tokens = float(flight.prompt_tokens)
        self.decoding += 1.0
        self.context_tokens += flight.context_tokens
        flight.window_s = now_s
        flight.window_batch_s = self._batch_s
        flight.window_context_s = self._context_s
        flight.window_tokens = 1

    def _commit(self) -> None:
        """The step with prompts that ended last is complete: what it did counts, for those that were decoding beside it."""
        if not self._group_uncommitted:
            return
        self._group_uncommitted = False
        steps, batch, prompts = self.steps, self._group_batch, self._group_prompts
        beside = max(1.0, batch)  # where nothing was disturbed: what it would have been
        mixed = steps.steps_of(self._group_tokens, beside)
        kv_tokens = self._group_kv
        with_prompts_ms = steps.prefill_ms(self._group_tokens, self._group_pairs, prompts, beside, kv_tokens)
        excess_ms = max(0.0, with_prompts_ms - mixed * steps.decode_ms(beside, kv_tokens))
        self._excess.add(self._group_s, excess_ms)
        if batch > 0.0:
            span_s = self._group_span_s or 0.001 * with_prompts_ms
            parts = self._parts
            self._mixed += mixed
            self._excess_ms += excess_ms
            steps.kind.add_prefill(parts, self._group_tokens, prompts, batch)
            parts[3] += mixed * kv_tokens
            parts[4] += self._group_pairs
            parts[5] += mixed * batch
            parts[6] += span_s
            parts[7] += span_s * batch
            parts[8] += span_s * kv_tokens
        for flight in self._group_flights:
            if flight.state == 1:
                self._open_window(flight)
        self._group_flights.clear()

    def _open_window(self, flight: Flight) -> None:
        flight.window_mixed = self._mixed
        flight.window_excess_ms = self._excess_ms
        flight.window_parts = list(self._parts)

    def _wants_sample(self, now_s: float) -> bool:
        steps = self.steps
        return now_s >= self.next_sample_s or steps.samples < LEARN_ALL_SAMPLES or steps.doubtful

    def _take_share(self, flight: Flight) -> None:
        """The part of the engine's time in its window that was its own: of decoding, one share of the batch."""
        if flight.group == self._group or self._now_s - self._group_s > SAME_STEP_S:
            self._commit()  # nobody can come to that step any more
        span_ms = 1000.0 * (self._now_s - flight.window_s)
        batch = (self._batch_s - flight.window_batch_s) / max(1e-9, self._now_s - flight.window_s)
        decode_ms = max(0.0, span_ms - self._crowd * (self._excess_ms - flight.window_excess_ms))
        flight.share_ms += decode_ms / max(1.0, batch)

    def _sample(self, flight: Flight, now_s: float) -> None:
        """What its tokens since the window began took, against what the engine did meanwhile."""
        self._take_share(flight)
        tokens = float(flight.told - flight.window_tokens)
        span_s = now_s - flight.window_s
        if tokens > 0.0 and span_s > 0.0 and flight.window_parts:
            ranks, kind, crowd = self.ranks, self.steps.kind, self._crowd
            done, held = self._parts, flight.window_parts
            mixed = min(tokens, crowd * (self._mixed - flight.window_mixed))
            # batch and context of the steps without prompts: over the time that those with prompts leave
            plain_s = max(0.05 * span_s, span_s - crowd * (done[6] - held[6]))
            batch = max(0.0, (self._batch_s - flight.window_batch_s) / ranks - crowd * (done[7] - held[7])) / plain_s
            kv_tokens = max(0.0, (self._context_s - flight.window_context_s) / ranks - crowd * (done[8] - held[8])) / plain_s
            parts = [0.0] * SIZE
            kind.add_step(parts, 1.0 - mixed / tokens, 0.0, batch, 0.0)
            each = crowd / tokens
            for k in range(3):
                parts[k] += (done[k] - held[k]) * each
            kv_tokens = kv_tokens * (tokens - mixed) / tokens + (done[3] - held[3]) * each
            batch = batch * (tokens - mixed) / tokens + (done[5] - held[5]) * each
            kind.add_rest(parts, kv_tokens, (done[4] - held[4]) * each, batch)
            self.steps.learn(1000.0 * span_s / tokens, parts)
            self.sampled_s = now_s
            self.next_sample_s = now_s + SAMPLE_INTERVAL_S
        flight.window_s = now_s
        flight.window_batch_s = self._batch_s
        flight.window_context_s = self._context_s
        flight.window_tokens = flight.told
        self._open_window(flight)


def _present_share(length_s: float, residence_s: float) -> float:
    """How much of the present is left, on average over a time: (1 - e^-z) / z, z the time in mean residences."""
    z = length_s / max(0.01, residence_s)
    return 1.0 if z < 1e-6 else (1.0 - math.exp(-z)) / z

"""How long a step of one engine takes, learned from what is seen of it: the form of a step with the roofline's terms as units.

A step that computes ``u`` prompt tokens (with ``pairs`` of such a token and one that it attends to) beside ``b`` decoding sequences with
``k`` tokens of context takes, in milliseconds,

    o x0 + sqrt((r x1)^2 + (c x2)^2) + m x2 + kv x3 k + pair x4 pairs + seq x5 b

where o, r, c, m, kv, pair are what the engine's prior (roofline.py) gives for overhead, reading the weights, computing the tokens, moving
activations, reading the KV cache and attention, and x0..x5 are learned, 1 at first: an engine that reads memory at half of the speed
assumed has x1 = 2. x6 is what a request waits beside the steps (network, server), in ms.

Learning is recursive least squares with forgetting, as an extended Kalman filter (Ljung, System Identification, 2nd ed., 1999, ch. 11; the
root is linearised at the present x): each measured duration moves the x by what their uncertainty lets it. Uncertainty grows while nothing
is learned, up to that of the prior. A single odd sample counts as one of three sigma (Huber, 1964).

Equal engines share one such model (shared_steps.py).
"""

from __future__ import annotations

import math
from typing import Final

from control_plane.roofline import EngineProfile

#: how many numbers are learned
SIZE: Final = 7
#: unit of x5: nothing of the kind is in the roofline (scheduling and sampling of one sequence on the host)
SEQUENCE_MS: Final = 0.01
#: first values of x, and how sure they are (standard deviations); LEVEL is common to x0..x4: the wrong GPU is wrong in all
PRIOR: Final[list[float]] = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0]  # lists: what the compiler reads fastest by number
SPREAD: Final[list[float]] = [0.7, 0.35, 0.35, 0.5, 0.5, 2.0, 3.0]
LEVEL: Final = 0.4
#: x may not leave these
LEAST: Final[list[float]] = [0.02, 0.02, 0.02, 0.0, 0.0, 0.0, 0.0]
#: samples that are remembered
MEMORY: Final = 250.0
#: noise of a measured duration, as a share, at first and at least
NOISE: Final = 0.10
LEAST_NOISE: Final = 0.02
OUTLIER_SIGMAS: Final = 3.0
#: after that many samples a copy begins only as unsure as half of what the prior is
KNOWN_SAMPLES: Final = 30
#: reference step by which an engine's speed is followed: sequences and their context
REFERENCE_BATCH: Final = 16.0
REFERENCE_KV: Final = 16_000.0


class StepModel:
    """The steps of one kind of engine. Times in milliseconds, work in tokens."""

    __slots__ = (
        "_base",
        "_context_ms",
        "_covariance",
        "_decode_token_ms",
        "_expert_miss",
        "_experts_ms",
        "_moved_ms",
        "_noise",
        "_overhead_ms",
        "_pair_ms",
        "_prompt_ms",
        "_read_ms",
        "_token_ms",
        "budget_tokens",
        "memory",
        "reference_ms",
        "samples",
        "x0",
        "x1",
        "x2",
        "x3",
        "x4",
        "x5",
        "x6",
    )

    def __init__(self, prior: EngineProfile) -> None:
        self._set_units(prior)
        self.budget_tokens = float(prior.max_num_batched_tokens)
        self.x0, self.x1, self.x2, self.x3, self.x4, self.x5, self.x6 = PRIOR
        base = [0.0] * (SIZE * SIZE)
        for i in range(SIZE):
            for j in range(SIZE):
                if i < 5 and j < 5:
                    base[i * SIZE + j] = LEVEL * LEVEL
                if i == j:
                    base[i * SIZE + j] += SPREAD[i] * SPREAD[i]
        self._base: list[float] = base
        self._covariance: list[float] = list(base)
        self._noise = NOISE * NOISE
        self.samples = 0
        #: samples that are remembered
        self.memory = MEMORY
        #: a step of a middling batch
        self.reference_ms = self.decode_ms(REFERENCE_BATCH, REFERENCE_KV)

    def _set_units(self, prior: EngineProfile) -> None:
        fitted = prior.fitted
        if fitted is None:
            cost = prior.cost
            self._overhead_ms = 1e3 * cost.overhead_s
            self._read_ms = 1e3 * cost.weights_s
            self._experts_ms = 1e3 * cost.experts_s
            self._expert_miss = cost.expert_miss
            self._token_ms = 1e3 * cost.token_s
            self._prompt_ms = 1e3 * cost.sampled_s
            self._decode_token_ms = 1e3 * (cost.token_s + cost.sampled_s)
            self._moved_ms = 1e3 * cost.token_moved_s
            self._context_ms = 1e3 * cost.decode_context_s
            self._pair_ms = 1e3 * cost.pair_s
            return
        # a fitted step has no root; what its table has below the first tokens stands for reading the weights
        table = fitted.token_table
        rise_s = (table[-1][1] - table[0][1]) / (table[-1][0] - table[0][0]) if len(table) > 1 else 0.0
        self._overhead_ms = max(0.01, 1e3 * (fitted.overhead_s + (table[0][1] if table else 0.0)))
        self._read_ms = self._experts_ms = self._expert_miss = 0.0
        self._token_ms = 1e3 * (fitted.prefill_token_s + rise_s)
        self._prompt_ms = 1e3 * (fitted.prompt_s + fitted.sequence_s)
        self._decode_token_ms = 1e3 * (fitted.decode_sequence_s + fitted.sequence_s + rise_s)
        self._moved_ms = 0.0
        self._context_ms = 1e3 * fitted.decode_context_s
        self._pair_ms = 1e3 * fitted.prefill_pair_s

    # ---- what it says

    def step_ms(self, tokens: float, pairs: float, prompts: float, batch: float, kv_tokens: float) -> float:
        """One step that computes ``tokens`` of ``prompts`` prompts beside ``batch`` decoding sequences."""
        read = self._read_ms
        if self._experts_ms > 0.0:
            read += self._experts_ms * (1.0 - math.pow(self._expert_miss, tokens + batch))
        read *= self.x1
        compute = self.x2 * (tokens * self._token_ms + prompts * self._prompt_ms + batch * self._decode_token_ms)
        linear = self.x0 * self._overhead_ms + self.x2 * (tokens + batch) * self._moved_ms + self.x3 * kv_tokens * self._context_ms
        return linear + self.x4 * pairs * self._pair_ms + self.x5 * batch * SEQUENCE_MS + math.sqrt(read * read + compute * compute)

    def decode_ms(self, batch: float, kv_tokens: float) -> float:
        return self.step_ms(0.0, 0.0, 0.0, batch, kv_tokens)

    def prefill_ms(self, tokens: float, pairs: float, prompts: float, batch: float, kv_tokens: float) -> float:
        """The steps that compute so many prompt tokens, cut where the engine's budget of tokens a step ends."""
        room = max(self.budget_tokens - batch, 0.25 * self.budget_tokens)
        if tokens <= room:
            return self.step_ms(tokens, pairs, prompts, batch, kv_tokens)
        full = float(int(tokens / room))
        return full * self.step_ms(room, 0.0, 0.0, batch, kv_tokens) + self.step_ms(tokens - full * room, pairs, prompts, batch, kv_tokens)

    def steps_of(self, tokens: float, batch: float) -> float:
        """How many steps :meth:`prefill_ms` takes."""
        room = max(self.budget_tokens - batch, 0.25 * self.budget_tokens)
        return 1.0 if tokens <= room else float(int(tokens / room)) + 1.0

    # ---- what it is made of, for learning

    def add_step(self, into: list[float], times: float, tokens: float, batch: float, prompts: float) -> None:
        """Add the parts of ``times`` such steps that depend on the tokens in a step (x0, x1, x2) to ``into``."""
        read = self._read_ms
        if self._experts_ms > 0.0:
            read += self._experts_ms * (1.0 - math.pow(self._expert_miss, tokens + batch))
        compute = tokens * self._token_ms + prompts * self._prompt_ms + batch * self._decode_token_ms
        a, b = self.x1 * read, self.x2 * compute
        root = math.sqrt(a * a + b * b)
        into[0] += times * self._overhead_ms
        if root > 0.0:
            into[1] += times * read * a / root
            into[2] += times * compute * b / root
        into[2] += times * (tokens + batch) * self._moved_ms

    def add_prefill(self, into: list[float], tokens: float, prompts: float, batch: float) -> None:
        """The same for the steps of :meth:`prefill_ms`."""
        room = max(self.budget_tokens - batch, 0.25 * self.budget_tokens)
        full = float(int(tokens / room)) if tokens > room else 0.0
        if full > 0.0:
            self.add_step(into, full, room, batch, 0.0)
        self.add_step(into, 1.0, tokens - full * room, batch, prompts)

    def add_rest(self, into: list[float], kv_tokens: float, pairs: float, batch: float) -> None:
        """Add what is linear: KV tokens read, pairs computed and sequences served, summed over the steps."""
        into[3] += kv_tokens * self._context_ms
        into[4] += pairs * self._pair_ms
        into[5] += batch * SEQUENCE_MS

    # ---- learning

    def expected_ms(self, made_of: list[float]) -> float:
        """Of what ``made_of`` says: SIZE numbers, as ``add_*`` make them."""
        return (
            self.x0 * made_of[0]
            + self.x1 * made_of[1]
            + self.x2 * made_of[2]
            + self.x3 * made_of[3]
            + self.x4 * made_of[4]
            + self.x5 * made_of[5]
            + self.x6 * made_of[6]
        )

    def learn(self, measured_ms: float, made_of: list[float], spread_ms: float = 0.0) -> None:
        """``measured_ms`` was spent on what ``made_of`` says. ``spread_ms``: standard deviation of what is known to be random in it."""
        expected = self.expected_ms(made_of)
        if expected <= 0.0 or not 0.0 < measured_ms < 1e9:
            return
        self.samples += 1
        x = [self.x0, self.x1, self.x2, self.x3, self.x4, self.x5, self.x6]
        self._move(x, measured_ms - expected, made_of, expected, spread_ms)
        self.reference_ms = self.decode_ms(REFERENCE_BATCH, REFERENCE_KV)

    def _move(self, x: list[float], off_ms: float, h: list[float], expected: float, spread_ms: float) -> None:
        p = self._covariance
        gain = [0.0] * SIZE
        explained = 0.0
        for i in range(SIZE):
            total = 0.0
            row = i * SIZE
            for j in range(SIZE):
                total += p[row + j] * h[j]
            gain[i] = total
            explained += total * h[i]
        noise = self._noise * expected * expected + spread_ms * spread_ms
        variance = explained + noise
        sigmas = abs(off_ms) / math.sqrt(variance)
        if sigmas > OUTLIER_SIGMAS:
            off_ms *= OUTLIER_SIGMAS / sigmas
        share = off_ms / expected
        # what the noise itself is follows from what is left over
        self._noise += 0.02 * (max(0.0, share * share - (explained + spread_ms * spread_ms) / (expected * expected)) - self._noise)
        self._noise = max(self._noise, LEAST_NOISE * LEAST_NOISE)
        new = [0.0] * SIZE
        for i in range(SIZE):
            new[i] = max(LEAST[i], x[i] + gain[i] * off_ms / variance)
        self.x0, self.x1, self.x2, self.x3, self.x4, self.x5, self.x6 = new[0], new[1], new[2], new[3], new[4], new[5], new[6]
        self._forget(p, gain, variance)

    def _forget(self, p: list[float], gain: list[float], variance: float) -> None:
        """What was learned makes surer, time less sure, but never less than at first."""
        base = self._base
        grow = 1.0 + 1.0 / self.memory
        scale = [1.0] * SIZE
        for i in range(SIZE):
            at = i * SIZE + i
            value = (p[at] - gain[i] * gain[i] / variance) * grow
            if value > base[at]:
                scale[i] = math.sqrt(base[at] / value)
        for i in range(SIZE):
            for j in range(SIZE):
                at = i * SIZE + j
                p[at] = (p[at] - gain[i] * gain[j] / variance) * grow * scale[i] * scale[j]

    def take(self, other: StepModel, factor: float = 1.0, *, unsure: bool = True) -> None:
        """Believe what another model of the same prior says, all steps ``factor`` times as long; ``unsure``: and be ready to find it
        otherwise."""
        self.x0 = other.x0 * factor
        self.x1 = other.x1 * factor
        self.x2 = other.x2 * factor
        self.x3 = other.x3 * factor
        self.x4 = other.x4 * factor
        self.x5 = other.x5 * factor
        self.x6 = other.x6
        if not unsure:
            self._covariance = list(other._covariance)
            self._noise = other._noise
        else:
            share = 0.25 if other.samples >= KNOWN_SAMPLES or factor != 1.0 else 1.0
            grown = share * max(1.0, factor * factor)
            p, base = self._covariance, self._base
            for i in range(SIZE):
                for j in range(SIZE):
                    at = i * SIZE + j
                    p[at] = base[at] * (grown if i < 5 and j < 5 else share)
            self._noise = NOISE * NOISE
        self.reference_ms = self.decode_ms(REFERENCE_BATCH, REFERENCE_KV)

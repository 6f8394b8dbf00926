"""Equal engines learn together: one model of steps for a kind of engine, and for each engine what its own evidence says beyond that.

Engines that cannot be told apart before they are seen at work (same prior) are a :class:`Family`. It begins with one kind, to which all
belong and which learns from the samples of all; who joins begins with what is known. Of each engine is kept

* by what factor its steps differ from its kind's, shrunk to none while that may be noise (``Deviation`` in ratio.py);
* a model of its own, learned from its samples alone, that prices nothing. Where it explains the engine's samples better than its kind
  does, the engine leaves for the kind that explains them as well, else founds one; an engine that an older kind explains as well as its
  own does joins that. So A100s and H100s that nobody told apart find themselves in two kinds, and equal ones in one.

Several samples in a row that are off to one side by a large factor are a step change: the engine leaves at once, for the kind that fits or
for a new one by that factor slower, and comes back the same way.
"""

from __future__ import annotations

import math
from typing import Final

from control_plane.predicting.ratio import Deviation, Ratio
from control_plane.predicting.step_model import MEMORY, StepModel
from control_plane.roofline import EngineProfile

#: so many samples in a row, off to one side by this factor, are a step change
CHANGE_SAMPLES: Final = 3
CHANGE_FACTOR: Final = 1.6
#: another kind fits an engine that has just changed when it is within this factor of its last sample
FITS_FACTOR: Final = 1.3
#: samples of an engine that its errors remember, and that are needed to judge by them
ERROR_MEMORY: Final = 100.0
LEAST_SAMPLES: Final = 40.0
SETTLE_EVERY: Final = 8
#: squared errors, in logarithms, compared sample by sample. Its kind's have to be above its own model's by this much, and this many
#: standard errors, for it to leave (so has a scale beyond that factor); those of an older kind at most so much above its kind's to join
LEAVE_ERROR: Final = 0.03 * 0.03
LEAVE_SIGMAS: Final = 4.0
LEAVE_SCALE: Final = 1.1
JOIN_ERROR: Final = 0.02 * 0.02
JOIN_SIGMAS: Final = 2.0
#: one sample counts as at most so far off
MOST_OFF: Final = 0.5
MAX_KINDS: Final = 8


class Kind(StepModel):
    """Engines that are alike: their steps, and by what predictions of them are off."""

    __slots__ = ("members", "taught", "tpot_ratio", "ttft_ratio")

    def __init__(self, prior: EngineProfile) -> None:
        super().__init__(prior)
        self.members = 0
        #: samples that its members gave
        self.taught = 0
        self.ttft_ratio = Ratio()
        self.tpot_ratio = Ratio()

    def admit(self, members: int) -> None:
        """So many more belong to it. What each of them tells is remembered as long as that of one alone would be."""
        self.members += members
        self.memory = MEMORY * max(1, self.members)


class Family:
    """Engines of one prior."""

    __slots__ = ("_prior", "kinds")

    def __init__(self, prior: EngineProfile) -> None:
        self._prior = prior
        #: the oldest first
        self.kinds: list[Kind] = [Kind(prior)]

    @property
    def members(self) -> int:
        return sum(kind.members for kind in self.kinds)

    def common(self) -> Kind:
        """The kind of most, the oldest of those: what a newcomer most likely is."""
        found = self.kinds[0]
        for kind in self.kinds:
            if kind.members > found.members:
                found = kind
        return found

    def own_model(self, kind: Kind) -> StepModel:
        found = StepModel(self._prior)
        found.take(kind)
        return found

    def split(self, kind: Kind, model: StepModel, factor: float, *, unsure: bool) -> Kind | None:
        """A new kind beside ``kind``, as ``model`` says, all steps ``factor`` times as long; None where there are MAX_KINDS."""
        if len(self.kinds) >= MAX_KINDS:
            for old in self.kinds:
                if old.members == 0:
                    self.kinds.remove(old)
                    break
            else:
                return None
        found = Kind(self._prior)
        found.take(model, factor, unsure=unsure)
        found.ttft_ratio.take(kind.ttft_ratio)
        found.tpot_ratio.take(kind.tpot_ratio)
        self.kinds.append(found)
        return found


class EngineSteps:
    """The steps of one engine: those of its kind, by ``scale`` longer. Times in milliseconds, work in tokens."""

    __slots__ = (
        "_above_kind",
        "_above_own",
        "_best_reference_ms",
        "_deviation",
        "_family",
        "_given",
        "_off_by",
        "_off_run",
        "_own",
        "changes",
        "era",
        "kind",
        "samples",
        "scale",
    )

    def __init__(self, family: Family) -> None:
        self._family = family
        self.kind: Kind = family.common()
        self.kind.admit(1)
        self.scale = 1.0
        self._own: StepModel = family.own_model(self.kind)
        self._deviation = Deviation(ERROR_MEMORY)
        #: by how much the squared errors of its kind are above those of its own model, and those of other kinds above its kind's
        self._above_own = Deviation(ERROR_MEMORY)
        self._above_kind: dict[Kind, Deviation] = {}
        self._off_run = 0
        self._off_by = 0.0
        #: samples that it gave its present kind
        self._given = 0
        self.samples = 0
        #: how often it became faster or slower at once
        self.changes = 0
        #: grows whenever what was predicted before is not to be compared with what comes now
        self.era = 0
        #: the shortest that a step of a middling batch ever was
        self._best_reference_ms = math.inf

    def leave(self) -> None:
        """The engine is gone."""
        self.kind.admit(-1)

    # ---- what it says: see StepModel

    @property
    def delay_ms(self) -> float:
        """What a request waits beside the steps, on its way."""
        return self.kind.x6

    def decode_ms(self, batch: float, kv_tokens: float) -> float:
        return self.scale * self.kind.step_ms(0.0, 0.0, 0.0, batch, kv_tokens)

    def prefill_ms(self, tokens: float, pairs: float, prompts: float, batch: float, kv_tokens: float) -> float:
        return self.scale * self.kind.prefill_ms(tokens, pairs, prompts, batch, kv_tokens)

    def steps_of(self, tokens: float, batch: float) -> float:
        return self.kind.steps_of(tokens, batch)

    @property
    def reference_ms(self) -> float:
        """A step of a middling batch."""
        return self.scale * self.kind.reference_ms

    @property
    def faster_once(self) -> float:
        """The shortest that such a step ever was, over what it is now: below 1.0 it was faster once."""
        return self._best_reference_ms / self.reference_ms

    # ---- learning

    def learn(self, measured_ms: float, made_of: list[float], spread_ms: float = 0.0) -> None:
        """As StepModel; ``made_of`` by its kind."""
        kind, own = self.kind, self._own
        expected_ms, own_ms = kind.expected_ms(made_of), own.expected_ms(made_of)
        if expected_ms <= 0.0 or own_ms <= 0.0 or not 0.0 < measured_ms < 1e9:
            return
        self.samples += 1
        off = math.log(measured_ms / expected_ms)
        if self._changed(off - math.log(self.scale), measured_ms, made_of):
            return
        share = spread_ms / (0.1 * measured_ms)
        weight = 1.0 / (1.0 + share * share)
        deviation = self._deviation
        deviation.observe(max(-1.0, min(1.0, off)), weight)
        error = _squared(off - math.log(self.scale))
        self._above_own.observe(error - _squared(math.log(measured_ms / own_ms)), weight)
        if len(self._family.kinds) > 1:
            self._compare(measured_ms, made_of, error, weight)
        kind.learn(measured_ms / self.scale, made_of, spread_ms / self.scale)
        kind.taught += 1
        self._given += 1
        own.learn(measured_ms, made_of, spread_ms)
        self.scale = math.exp(deviation.earned)
        if self.samples % SETTLE_EVERY == 0 and deviation.weight >= LEAST_SAMPLES:
            self._settle()
        if self.samples >= 8:
            # what was long ago fades: twice as slow after some 7,000 samples is how it is now
            self._best_reference_ms = min(1.0001 * self._best_reference_ms, self.reference_ms)

    def _compare(self, measured_ms: float, made_of: list[float], error: float, weight: float) -> None:
        above = self._above_kind
        if len(above) > 2 * MAX_KINDS:
            above.clear()  # of kinds that are no more
        for other in self._family.kinds:
            if other is not self.kind:
                found = above.get(other)
                if found is None:
                    found = above[other] = Deviation(ERROR_MEMORY)
                found.observe(_squared(math.log(measured_ms / max(1e-9, other.expected_ms(made_of)))) - error, weight)

    def _settle(self) -> None:
        """Leave a kind that does not explain the engine, or join an older one that does as well."""
        kind, above_own = self.kind, self._above_own
        leaves = above_own.mean > LEAVE_ERROR + LEAVE_SIGMAS * above_own.error or abs(self._deviation.earned) > math.log(LEAVE_SCALE)
        found = self._as_good(above_own.mean if leaves else 0.0, younger=leaves)
        if leaves and found is None:
            found = self._family.split(kind, self._own, 1.0, unsure=False)
        if found is None:
            return
        if leaves:
            self._best_reference_ms = math.inf
            if 10 * self._given > kind.taught:
                kind.take(kind)  # much of what it knows is of an engine that is none of it
        self._move_to(found)

    def _as_good(self, margin: float, *, younger: bool) -> Kind | None:
        """The oldest of the other kinds whose errors are, less the ``margin``, as small as those of its kind."""
        for other in self._family.kinds:
            if other is not self.kind:
                above = self._above_kind.get(other)
                if above is not None and above.weight >= LEAST_SAMPLES and above.mean + margin < JOIN_ERROR + JOIN_SIGMAS * above.error:
                    return other
            elif not younger:
                break
        return None

    def _move_to(self, kind: Kind) -> None:
        self.kind.admit(-1)
        kind.admit(1)
        self.kind = kind
        self.scale = 1.0
        self._given = 0
        self._deviation.forget()
        self._above_own.forget()
        self._above_kind.clear()

    def _changed(self, off: float, measured_ms: float, made_of: list[float]) -> bool:
        """Notice a step change; True when the model has just moved by it."""
        bound = math.log(CHANGE_FACTOR)
        if -bound < off < bound:
            self._off_run = 0
            self._off_by = 0.0
            return False
        if self._off_run and (off > 0.0) != (self._off_by > 0.0):
            self._off_run = 0
            self._off_by = 0.0
        self._off_run += 1
        self._off_by += off
        if self._off_run < CHANGE_SAMPLES:
            return False
        self._jump(math.exp(self._off_by / self._off_run), measured_ms, made_of)
        return True

    def _jump(self, factor: float, measured_ms: float, made_of: list[float]) -> None:
        self._off_run = 0
        self._off_by = 0.0
        if self.samples >= 3 * CHANGE_SAMPLES:
            self.changes += 1
        self.era += 1
        kind = self.kind
        factor *= self.scale
        found = self._fitting(measured_ms, made_of)
        if found is None and kind.taught == self._given:
            # nobody else has said anything of it
            kind.take(kind, factor)
            self.scale = 1.0
            self._deviation.forget()
        else:
            if found is None:
                found = self._family.split(kind, kind, factor, unsure=True)
            if found is None:
                self.scale = factor
                return
            self._move_to(found)
        self._own.take(self.kind)

    def _fitting(self, measured_ms: float, made_of: list[float]) -> Kind | None:
        """The kind that comes next to its last sample, and near enough."""
        found: Kind | None = None
        least = math.log(FITS_FACTOR)
        for other in self._family.kinds:
            if other is not self.kind:
                off = abs(math.log(measured_ms / max(1e-9, other.expected_ms(made_of))))
                if off < least:
                    found, least = other, off
        return found

    @property
    def doubtful(self) -> bool:
        """The last sample was far off: more are wanted soon."""
        return self._off_run > 0


def _squared(off: float) -> float:
    off = max(-MOST_OFF, min(MOST_OFF, off))
    return off * off

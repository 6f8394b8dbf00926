"""How long one engine step takes on a server that was measured: a form linear in what the step does, and its fit to measurements.

It stands where :func:`control_plane.roofline.step_s` stands, with the same arguments, and needs nothing of the data sheets. Every
coefficient is a time and none is negative, so a step never gets shorter by more work.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Final, NamedTuple

from control_plane.errors import InvalidRequest

__all__ = ["FittedStep", "Sample", "StepShape", "fit", "non_negative_least_squares"]

#: the linear coefficients in the order of :meth:`StepShape.features`
_LINEAR: Final = (
    "overhead_s", "prefill_token_s", "prefill_pair_s", "prefill_context_s", "decode_sequence_s", "decode_context_s", "sequence_s",
    "mixed_s", "prompt_s",
)  # fmt: skip


class StepShape(NamedTuple):
    """What one step does, as :func:`control_plane.roofline.step_s` is told it; ``repeats`` such steps.

    Steps of a decode whose contexts grow evenly are one shape with their mean context: the form is linear in it.
    """

    prefill_tokens: float = 0
    prefill_context_tokens: float = 0
    decode_sequences: float = 0
    decode_context_tokens: float = 0
    prefill_sequences: float = 1
    repeats: float = 1
    #: None: those of an even spread
    prefill_pairs: float | None = None

    def features(self) -> list[float]:
        """What the coefficients are multiplied with."""
        tokens, context, decodes, decode_context, sequences, repeats, told = self
        if tokens + decodes <= 0:
            return [0.0] * len(_LINEAR)
        begun = sequences if tokens > 0 else 0.0
        pairs = told if told is not None else tokens * (context + 0.5 * tokens) / sequences
        mixed = 1.0 if tokens > 0 and decodes > 0 else 0.0
        return [repeats * value for value in (1.0, tokens, pairs, context, decodes, decode_context, decodes + begun, mixed, begun)]


class Sample(NamedTuple):
    """A measured duration and the steps that it took: one step, or all those between two tokens that were seen."""

    seconds: float
    steps: Sequence[StepShape]


@dataclass(frozen=True, slots=True)
class FittedStep:
    """Seconds of a step: the sum of the coefficients times what they count.

    Attributes:
        overhead_s: of every step.
        prefill_token_s: a prompt token computed in this step.
        prefill_pair_s: a pair of such a token and a token that it attends to (for n tokens after c: n (c + n/2)).
        prefill_context_s: a token that was in the KV cache before and is read for them.
        decode_sequence_s: a sequence that gets one token.
        decode_context_s: a token of its context.
        sequence_s: a sequence of either kind (its sampling).
        mixed_s: of a step that has both kinds (another attention kernel, no captured graph).
        prompt_s: a prompt that is computed in this step, or a part of one (taking it in).
        token_table: (tokens in the step, seconds), rising: what is not linear in their number; between two entries a straight line,
            after the last the slope that leads to it.
    """

    overhead_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    prefill_context_s: float = 0.0
    decode_sequence_s: float = 0.0
    decode_context_s: float = 0.0
    sequence_s: float = 0.0
    mixed_s: float = 0.0
    prompt_s: float = 0.0
    token_table: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in _LINEAR:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1e6:
                raise InvalidRequest(f"{name} {value!r} is not a number of seconds, 0 or more", param=name)
        try:
            table = tuple((float(tokens), float(seconds)) for tokens, seconds in self.token_table)
        except (TypeError, ValueError):
            raise InvalidRequest("token_table is not a list of [tokens, seconds]", param="token_table") from None
        steps = pairwise(table)
        if any(not (a[0] < b[0] and 0.0 <= a[1] <= b[1] < 1e6) for a, b in steps) or any(not 0.0 <= s < 1e6 for _, s in table):
            raise InvalidRequest("token_table does not rise: more tokens need more, or as many, seconds", param="token_table")
        object.__setattr__(self, "token_table", table)

    def __call__(
        self,
        profile: object = None,
        *,
        prefill_tokens: int,
        prefill_context_tokens: int,
        decode_sequences: int,
        decode_context_tokens: int,
        prefill_sequences: int = 1,
        prefill_pairs: float | None = None,
    ) -> float:
        """Seconds of one step, with the arguments of :func:`control_plane.roofline.step_s` (the profile is not looked at)."""
        tokens = prefill_tokens + decode_sequences
        if tokens <= 0:
            return 0.0
        total_s = self.overhead_s + decode_sequences * (self.decode_sequence_s + self.sequence_s)
        total_s += decode_context_tokens * self.decode_context_s
        if prefill_tokens > 0:
            pairs = prefill_pairs
            if pairs is None:
                pairs = prefill_tokens * (prefill_context_tokens + 0.5 * prefill_tokens) / prefill_sequences
            total_s += prefill_tokens * self.prefill_token_s + pairs * self.prefill_pair_s
            total_s += prefill_context_tokens * self.prefill_context_s + prefill_sequences * (self.sequence_s + self.prompt_s)
            if decode_sequences > 0:
                total_s += self.mixed_s
        return total_s + _interpolated(self.token_table, tokens) if self.token_table else total_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON, zeros left out. :meth:`from_dict` reads them."""
        plain = {name: value for name, value in asdict(self).items() if value}
        if self.token_table:
            plain["token_table"] = [list(entry) for entry in self.token_table]
        return plain

    @classmethod
    def from_dict(cls, values: Any) -> FittedStep:
        """Raises InvalidRequest: not a mapping, an unknown name, or a value that is no time."""
        names = [each.name for each in fields(cls)]
        if not isinstance(values, dict) or not values:
            raise InvalidRequest(f"a fitted step time is a mapping of some of {', '.join(names)}", param="step_time")
        for name in values:
            if name not in names:
                raise InvalidRequest(f"{name!r} is not one of {', '.join(names)}", param="step_time")
        return cls(**values)


def _interpolated(table: tuple[tuple[float, float], ...], tokens: float) -> float:
    """Between the entries around ``tokens``; before the first its own, after the last on with the last slope."""
    at = bisect_right(table, (tokens, float("inf")))
    if at == 0 or len(table) == 1:
        return table[0][1]
    at = min(at, len(table) - 1)
    (x0, y0), (x1, y1) = table[at - 1], table[at]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def fit(samples: Iterable[Sample], *, use: Sequence[str] = _LINEAR, knots: Sequence[int] = (), relative: bool = True) -> FittedStep:
    """The coefficients with the least squared error, none negative.

    Args:
        samples: durations and what was done in them.
        use: which coefficients may be above zero; fewer than all where the samples cannot tell them apart.
        knots: token counts of a ``token_table``, from the lowest on; from each to the next it may rise by any amount.
        relative: weigh errors as shares of the duration (steps of 5 ms and of 2 s count alike), not as seconds.

    Raises:
        InvalidRequest: no samples, a duration that is not above 0, an unknown coefficient, or knots that do not rise.
    """
    taken = list(samples)
    if not taken or any(not sample.seconds > 0.0 for sample in taken):
        raise InvalidRequest("a fit needs samples, each with a duration above 0", param="samples")
    if unknown := [name for name in use if name not in _LINEAR]:
        raise InvalidRequest(f"{unknown[0]!r} is not one of {', '.join(_LINEAR)}", param="use")
    if any(low >= high for low, high in pairwise(knots)) or len(knots) == 1:
        raise InvalidRequest("knots are two or more rising token counts", param="knots")
    columns = [_LINEAR.index(name) for name in use]
    rows, wanted = [], []
    for sample in taken:
        weight = 1.0 / sample.seconds if relative else 1.0
        linear = [0.0] * len(_LINEAR)
        rises = [0.0] * max(0, len(knots) - 1)
        for shape in sample.steps:
            linear = [a + b for a, b in zip(linear, shape.features(), strict=True)]
            rises = [
                a + shape.repeats * b for a, b in zip(rises, _rises(knots, shape.prefill_tokens + shape.decode_sequences), strict=True)
            ]
        rows.append([weight * value for value in [linear[column] for column in columns] + rises])
        wanted.append(weight * sample.seconds)
    found = non_negative_least_squares(rows, wanted)
    table: list[tuple[float, float]] = []
    if knots:
        height = 0.0
        table.append((knots[0], 0.0))
        for knot, rise in zip(knots[1:], found[len(columns) :], strict=True):
            height += rise
            table.append((knot, height))
    return FittedStep(**dict(zip(use, found, strict=False)), token_table=tuple(table) if table and table[-1][1] > 0.0 else ())


def _rises(knots: Sequence[int], tokens: float) -> list[float]:
    """Which share of each rise between two knots a step of so many tokens has behind it (more than 1 beyond the last)."""
    shares = [min(1.0, max(0.0, (tokens - low) / (high - low))) for low, high in pairwise(knots)]
    if shares and tokens > knots[-1]:
        shares[-1] = (tokens - knots[-2]) / (knots[-1] - knots[-2])
    return shares


def non_negative_least_squares(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """x >= 0 with the least |rows x - wanted|^2 (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23).

    On the normal equations, with columns scaled to length 1: made for a dozen unknowns and some thousand rows.
    """
    count = len(rows[0])
    length = [sum(row[j] * row[j] for row in rows) ** 0.5 or 1.0 for j in range(count)]
    scaled = [[value / length[j] for j, value in enumerate(row)] for row in rows]
    gram = [[sum(row[i] * row[j] for row in scaled) for j in range(count)] for i in range(count)]
    right = [sum(row[i] * value for row, value in zip(scaled, wanted, strict=True)) for i in range(count)]
    tolerance = 1e-10 * max(1e-300, max(abs(value) for value in right))
    x = [0.0] * count
    passive: list[int] = []
    for _ in range(30 * count):
        gradient = [right[i] - sum(gram[i][j] * x[j] for j in passive) for i in range(count)]
        free = [i for i in range(count) if i not in passive and gradient[i] > tolerance]
        if not free:
            break
        passive.append(max(free, key=lambda i: gradient[i]))
        while True:
            solved = _solve([[gram[i][j] for j in passive] for i in passive], [right[i] for i in passive])
            if min(solved) > 0.0:
                for i, value in zip(passive, solved, strict=True):
                    x[i] = value
                break
            # as far towards that solution as all stay at zero or above; who got there is out
            step = min(x[i] / (x[i] - value) if x[i] > value else 0.0 for i, value in zip(passive, solved, strict=True) if value <= 0.0)
            for i, value in zip(passive, solved, strict=True):
                x[i] += step * (value - x[i])
            out = [i for i, value in zip(passive, solved, strict=True) if value <= 0.0 and x[i] <= 1e-14]
            for i in out:
                x[i] = 0.0
                passive.remove(i)
            if not passive:
                break
    return [value / scale for value, scale in zip(x, length, strict=True)]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with pivots; a column that depends on the others (its pivot is nothing but rounding) gets zero."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    dependent: set[int] = set()
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(rows[r][column]))
        if abs(rows[pivot][column]) < 1e-12:
            dependent.add(column)
            continue
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for r in range(column + 1, size):
            factor = rows[r][column] / rows[column][column]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[column], strict=True)]
    x = [0.0] * size
    for i in reversed(range(size)):
        if i not in dependent:
            x[i] = (rows[i][size] - sum(rows[i][j] * x[j] for j in range(i + 1, size))) / rows[i][i]
    return x

"""From readings to coefficients: the step time, and what a request costs beside the engine's steps. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from control_plane.calibration.measure import Measured, Readings
from control_plane.calibration.plan import Kind, Point
from control_plane.calibration.server import CannotCalibrate
from control_plane.calibration.windows import chunk_sizes
from control_plane.fitted_step import FittedStep, Sample, StepShape, fit, non_negative_least_squares

__all__ = ["Fitted", "Row", "ServerTime", "fit_readings", "median"]

#: a table of token counts is kept where it lowers the median error to this share
_TABLE_PAYS = 0.8
_KNOTS = (1, 16, 64, 256, 1_024, 4_096, 16_384)
#: what is fitted: what a sequence costs of either kind is told by what one of each kind costs
_USED = tuple(each.name for each in fields(FittedStep) if each.name not in ("sequence_s", "token_table"))
#: times that samples are weighed anew; an error that is taken as it is, however small most are
_REWEIGHTED = 8
_LEAST_ERROR = 0.005
#: more points are needed for a fit of as many coefficients
LEAST_POINTS = 8


@dataclass(frozen=True, slots=True)
class ServerTime:
    """What a request costs outside of the engine's steps: HTTP, validation, hand-over and back.

    Attributes:
        request_s: of each request, on the way in and out of the first token, when it is alone.
        serial_s: the part of it that is done for one request after another: of requests at once, the later ones wait for it.
        prompt_token_s: of each prompt token that comes as an id.
        text_token_s: of each prompt token that comes as text, beside that (the tokenizer).
        chunk_s: of each streamed token: the tokens of a step leave one after another.
    """

    request_s: float = 0.0
    serial_s: float = 0.0
    prompt_token_s: float = 0.0
    text_token_s: float = 0.0
    chunk_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {name: float(f"{getattr(self, name):.4g}") for name in (each.name for each in fields(self))}


@dataclass(frozen=True, slots=True)
class Row:
    """A point: its median reading, what the fit says, how far the readings lie apart.

    ``seconds`` is of one step for decode points, of a window of steps for prompts beside others, to the first token for those alone.
    ``spread`` is the middle half of the readings over their median.
    """

    point: Point
    readings: int
    seconds: float
    predicted_s: float
    spread: float

    @property
    def error(self) -> float:
        """Of the fit, as a share; above 0: it says too long."""
        return self.predicted_s / self.seconds - 1.0


@dataclass(frozen=True, slots=True)
class Fitted:
    step: FittedStep
    server: ServerTime
    rows: tuple[Row, ...]

    def mean_error(self, *kinds: Kind) -> float:
        """Mean absolute error over the points of these kinds (all, when none is named); 0.0 where there are none."""
        errors = [abs(row.error) for row in self.rows if not kinds or row.point.kind in kinds]
        return sum(errors) / len(errors) if errors else 0.0


def fit_readings(readings: Readings, max_num_batched_tokens: int) -> Fitted:
    """Raises CannotCalibrate when too little was measured."""
    chosen = {point: _middle(found) for point, found in readings.by_point.items()}
    windows = {point: reading.sample for point, reading in chosen.items() if reading.sample.steps}
    if len(windows) < LEAST_POINTS or not any(point.kind is Kind.DECODE for point in windows):
        lost = f", {readings.lost} readings were lost (tokens merged on the way)" if readings.lost else ""
        raise CannotCalibrate(
            f"only {len(windows)} points could be measured{lost}; give more time (--budget-s) or a larger --max-concurrency"
        )
    step = _fit_step([*windows.values(), *_alone(chosen, max_num_batched_tokens)])
    server = _fit_server(step, chosen, max_num_batched_tokens)
    rows = tuple(_row(point, found, step, server, max_num_batched_tokens) for point, found in readings.by_point.items())
    return Fitted(step, server, rows)


def median(values: Sequence[float]) -> float:
    """The middle one; of an even number the upper of the two."""
    return sorted(values)[len(values) // 2]


# ---------------------------------------------------------------------- steps


def _fit_step(samples: Sequence[Sample]) -> FittedStep:
    """Linear in what a step does; with a table over its tokens where that says much more."""
    line = _robust(samples, ())
    most = max(shape.prefill_tokens + shape.decode_sequences for sample in samples for shape in sample.steps)
    knots = [knot for knot in _KNOTS if knot < most]
    if len(samples) < 2 * (LEAST_POINTS + len(knots)) or len(knots) < 3:
        return line
    bent = _robust(samples, [*knots, int(most)])
    return bent if _middle_error(bent, samples) < _TABLE_PAYS * _middle_error(line, samples) else line


def _alone(chosen: dict[Point, Measured], budget_tokens: int) -> Iterator[Sample]:
    """Prompts alone as steps, without what they cost beside: so what a step with prompts and decoding sequences takes more is told apart
    from what any step with prompts takes."""
    beside = _costs_beside(chosen, budget_tokens)
    if beside is None:
        return
    for point, reading in chosen.items():
        seconds = reading.sample.seconds - beside[0] - reading.prompt_tokens * beside[1]
        # of a short one most is not the step's
        if point.kind is Kind.IDLE and seconds > beside[0]:
            yield Sample(seconds, prompt_shapes(reading.prompt_tokens, budget_tokens))


def _costs_beside(chosen: dict[Point, Measured], budget_tokens: int) -> tuple[float, float] | None:
    """Seconds of a request and of each of its prompt tokens, found together with the steps'. None: no prompt was measured alone."""
    rows, seconds = [], []
    for point, reading in chosen.items():
        alone = point.kind is Kind.IDLE
        shapes = prompt_shapes(reading.prompt_tokens, budget_tokens) if alone else reading.sample.steps
        if shapes:
            steps = [sum(column) for column in zip(*(shape.features() for shape in shapes), strict=True)]
            rows.append([*steps, float(alone), float(alone * reading.prompt_tokens)])
            seconds.append(reading.sample.seconds)
    if not any(row[-2] for row in rows):
        return None
    expected, trust = list(seconds), [1.0] * len(seconds)
    found: list[float] = []
    for _ in range(_REWEIGHTED):
        weights = [math.sqrt(share) / each for share, each in zip(trust, expected, strict=True)]
        scaled = [[weight * value for value in row] for weight, row in zip(weights, rows, strict=True)]
        found = non_negative_least_squares(scaled, [weight * each for weight, each in zip(weights, seconds, strict=True)])
        expected = [max(1e-9, sum(a * b for a, b in zip(row, found, strict=True))) for row in rows]
        trust = _trust(seconds, expected)
    return found[-2], found[-1]


def _trust(seconds: Sequence[float], expected: Sequence[float]) -> list[float]:
    """Less for what lies far off, by how far most do."""
    errors = [abs(seen / each - 1.0) for seen, each in zip(seconds, expected, strict=True)]
    usual = max(2.0 * median(errors), _LEAST_ERROR)
    return [min(1.0, usual / max(error, 1e-12)) for error in errors]


def _robust(samples: Sequence[Sample], knots: Sequence[int]) -> FittedStep:
    """Least squares of shares of what is expected, not of what was seen, and less weight for what lies far off: a reading that a busy
    machine spoilt is too short by any factor as easily as too long."""
    shortest_s = sorted(sample.seconds / sum(shape.repeats for shape in sample.steps) for sample in samples)[len(samples) // 4]
    expected = [max(sample.seconds, shortest_s * sum(shape.repeats for shape in sample.steps)) for sample in samples]
    trust = [1.0] * len(samples)
    found = FittedStep()
    for _ in range(_REWEIGHTED):
        weights = [math.sqrt(share) / seconds for share, seconds in zip(trust, expected, strict=True)]
        scaled = [_scaled(sample, weight) for sample, weight in zip(samples, weights, strict=True)]
        found = fit(scaled, use=_USED, knots=knots, relative=False)
        expected = [max(predict(found, sample.steps), 1e-9) for sample in samples]
        trust = _trust([sample.seconds for sample in samples], expected)
    return found


def _scaled(sample: Sample, weight: float) -> Sample:
    """The form is linear in the number of steps, so a sample counts ``weight`` times as much when all of it is so much larger."""
    return Sample(sample.seconds * weight, [shape._replace(repeats=shape.repeats * weight) for shape in sample.steps])


def _middle_error(step: FittedStep, samples: Sequence[Sample]) -> float:
    return median([abs(predict(step, sample.steps) / sample.seconds - 1.0) for sample in samples])


def predict(step: FittedStep, shapes: Sequence[StepShape]) -> float:
    """Seconds of all these steps. (The form is linear in a shape, so fractions of sequences and tokens are as good.)"""
    return sum(
        shape.repeats
        * step(
            prefill_tokens=int(shape.prefill_tokens),
            prefill_context_tokens=int(shape.prefill_context_tokens),
            decode_sequences=int(shape.decode_sequences),
            decode_context_tokens=int(shape.decode_context_tokens),
            prefill_sequences=int(shape.prefill_sequences),
            prefill_pairs=shape.prefill_pairs,
        )
        for shape in shapes
    )


def prompt_shapes(tokens: int, budget_tokens: int) -> list[StepShape]:
    """The steps of a prompt that is alone."""
    shapes, done = [], 0
    for size in chunk_sizes(tokens, budget_tokens):
        shapes.append(StepShape(prefill_tokens=size, prefill_context_tokens=done))
        done += size
    return shapes


# ---------------------------------------------------------------------- beside the steps


def _fit_server(step: FittedStep, chosen: dict[Point, Measured], budget_tokens: int) -> ServerTime:
    rows, wanted = [], []
    for point, reading in chosen.items():
        if point.kind is Kind.IDLE:
            seconds, tokens = reading.sample.seconds, reading.prompt_tokens
            # as shares: a millisecond counts for a short prompt, not for one that takes a second
            rows.append([1.0 / seconds, tokens / seconds])
            wanted.append((seconds - predict(step, prompt_shapes(tokens, budget_tokens))) / seconds)
    request_s, prompt_token_s = non_negative_least_squares(rows, wanted) if rows else (0.0, 0.0)
    texts = []
    for point, reading in chosen.items():
        if point.kind is Kind.TEXT and reading.prompt_tokens:
            tokens = reading.prompt_tokens
            known_s = request_s + tokens * prompt_token_s + predict(step, prompt_shapes(tokens, budget_tokens))
            texts.append((tokens, (reading.sample.seconds - known_s) / tokens))
    # steps are not taken off: where the server is what holds them up, few are computed in each, while the next are read
    together = sorted((point.prompts, reading.sample.seconds) for point, reading in chosen.items() if point.kind is Kind.TOGETHER)
    serial_s = (together[-1][1] - together[0][1]) / (together[-1][0] - together[0][0]) if len(together) > 1 else 0.0
    chunks = [reading.chunk_s for reading in chosen.values() if reading.chunk_s is not None]
    return ServerTime(
        request_s=request_s,
        serial_s=min(max(0.0, serial_s), request_s),
        prompt_token_s=prompt_token_s,
        text_token_s=max(0.0, max(texts)[1]) if texts else 0.0,
        chunk_s=median(chunks) if chunks else 0.0,
    )


# ---------------------------------------------------------------------- rows


def _row(point: Point, found: Sequence[Measured], step: FittedStep, server: ServerTime, budget_tokens: int) -> Row:
    reading = _middle(found)
    each = sorted(_comparable(one) for one in found)
    spread = (each[-1 - len(each) // 4] - each[len(each) // 4]) / median(each) if len(each) > 1 else 0.0
    sample = reading.sample
    if point.kind is Kind.TOGETHER:
        # the last also waits for the step of those before it
        steps_s = predict(step, [StepShape(prefill_tokens=1, repeats=2)])
        predicted_s = server.request_s + (point.prompts - 1) * server.serial_s + steps_s
        return Row(point, len(found), sample.seconds, predicted_s, spread)
    if not sample.steps:
        tokens = reading.prompt_tokens
        predicted_s = server.request_s + tokens * server.prompt_token_s + predict(step, prompt_shapes(tokens, budget_tokens))
        predicted_s += tokens * server.text_token_s if point.kind is Kind.TEXT else 0.0
        return Row(point, len(found), sample.seconds, predicted_s, spread)
    count = sample.steps[0].repeats if point.kind is Kind.DECODE else 1
    return Row(point, len(found), sample.seconds / count, predict(step, sample.steps) / count, spread)


def _middle(found: Sequence[Measured]) -> Measured:
    """The reading whose time is the median."""
    return sorted(found, key=_comparable)[len(found) // 2]


def _comparable(reading: Measured) -> float:
    """Of decode points the time of a step; of others the whole, which does the same each time."""
    steps = reading.sample.steps
    return reading.sample.seconds / sum(shape.repeats for shape in steps) if len(steps) == 1 else reading.sample.seconds

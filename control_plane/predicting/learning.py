"""What an answer that ended well teaches of its engine, beside what its book takes from streams."""

from __future__ import annotations

from control_plane.predicting.flight import Flight
from control_plane.predicting.step_model import SIZE


def first_token(flight: Flight, uncached_tokens: float, pairs: float, ttft_ms: float) -> None:
    """Its prompt, as much as was not cached, had its first token after ``ttft_ms``."""
    book = flight.book
    steps = book.steps
    if book.compares(flight):
        ratio = steps.kind.ttft_ratio
        book.ttft_ratio.observe(ratio.value * flight.raw_ttft_ms, ttft_ms)
        ratio.observe(flight.raw_ttft_ms, ttft_ms)
    kind = steps.kind
    parts = [0.0] * SIZE
    kind.add_prefill(parts, uncached_tokens, 1.0, flight.batch)
    kind.add_rest(parts, flight.kv_tokens, pairs, flight.batch)
    step_ms = 1000.0 * (flight.first_s - flight.step_s)
    if flight.step_s > 0.0 and step_ms > 0.5:
        steps.learn(step_ms, parts)
    elif flight.exclusive:
        spread_ms = 0.0
        parts[SIZE - 1] = 1.0
        if flight.waits_step:  # it came somewhere in a step: half of it on average, evenly spread
            kind.add_step(parts, 0.5, 0.0, flight.batch, 0.0)
            kind.add_rest(parts, 0.5 * flight.kv_tokens, 0.0, 0.5 * flight.batch)
            spread_ms = 0.29 * steps.decode_ms(flight.batch, flight.kv_tokens)
        steps.learn(ttft_ms, parts, spread_ms)


def decode(flight: Flight, tpot_ms: float) -> None:
    """Its further tokens took ``tpot_ms`` each: what that is beside decoding."""
    book = flight.book
    if book.compares(flight):
        ratio = book.steps.kind.tpot_ratio
        beside_ms = tpot_ms - flight.plain_ms
        book.tpot_ratio.observe(ratio.value * flight.beside_ms, beside_ms)
        ratio.observe(flight.beside_ms, beside_ms)

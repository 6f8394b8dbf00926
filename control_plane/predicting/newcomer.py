"""What one request more does to an engine: the steps of its prompt, by how much they hold up the others, and how much longer each further
step gets. Milliseconds."""

from __future__ import annotations

from control_plane.predicting.book import InstanceBook
from control_plane.predicting.step_model import StepModel


def prompt_ms(
    steps: StepModel, book: InstanceBook, batch: float, kv_tokens: float, cached_tokens: float, uncached_tokens: float
) -> tuple[float, float, float]:
    """Of a prompt that comes now: the steps of the prompts ahead of it, as if none were begun; its own; and by how much it lengthens the
    steps of those in flight on top of the prompts ahead.

    The first prompt of a step costs the others less than what comes on top, since the weights are read anyway.
    """
    pairs = uncached_tokens * (cached_tokens + 0.5 * uncached_tokens)
    decode_ms = steps.decode_ms(batch, kv_tokens)
    own_ms = steps.prefill_ms(uncached_tokens, pairs, 1.0, batch, kv_tokens)
    ahead = (book.current_tokens + book.late_tokens) / book.ranks
    if ahead <= 0.0:
        return 0.0, own_ms, max(0.0, own_ms - steps.steps_of(uncached_tokens, batch) * decode_ms)
    more = (book.current_pairs + book.late_pairs) / book.ranks
    prompts = (book.current_prompts + book.late_prompts) / book.ranks
    ahead_ms = steps.prefill_ms(ahead, more, prompts, batch, kv_tokens)
    all_ms = steps.prefill_ms(ahead + uncached_tokens, more + pairs, prompts + 1.0, batch, kv_tokens)
    further = steps.steps_of(ahead + uncached_tokens, batch) - steps.steps_of(ahead, batch)
    return max(0.0, ahead_ms - decode_ms), own_ms, max(0.0, all_ms - ahead_ms - further * decode_ms)


def marginal_tpot_ms(steps: StepModel, ranks: float, batch: float, kv_tokens: float, context_tokens: float) -> float:
    """By how much one more with so much context lengthens every decode step."""
    return (steps.decode_ms(batch + 1.0, kv_tokens + context_tokens) - steps.decode_ms(batch, kv_tokens)) / ranks

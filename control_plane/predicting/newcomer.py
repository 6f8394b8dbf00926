"""What one request more does to an engine: the steps of its prompt, by how much they hold up the others, and how much longer each further
step gets."""

from __future__ import annotations

from control_plane.predicting.book import TYPICAL_CONTEXT_TOKENS, InstanceBook
from control_plane.predicting.shared_steps import EngineSteps


def steps_ms(
    steps: EngineSteps, book: InstanceBook, batch: float, kv_tokens: float, cached_tokens: float, uncached_tokens: float
) -> tuple[float, float, float, float, float]:
    """Of a request that comes now, milliseconds: the steps of the prompts ahead of its own, as if none were begun; those of its own; by
    how much it lengthens the others' steps on top of the prompts ahead; a decode step with it, with a context as the others have; by how
    much that is longer than without it. What prompts of others will add to its steps is left out: who got some lately is not who gets
    them next. ``batch`` are in flight there, with ``kv_tokens`` of context, of one data-parallel rank.

    The first prompt of a step costs the others less than what comes on top, since the weights are read anyway.
    """
    pairs = uncached_tokens * (cached_tokens + 0.5 * uncached_tokens)
    decode_ms = steps.decode_ms(batch, kv_tokens)
    context = kv_tokens / batch if batch > 0.0 else TYPICAL_CONTEXT_TOKENS
    step_ms = steps.decode_ms(batch + 1.0, kv_tokens + context)
    longer_ms = (step_ms - decode_ms) / book.ranks
    own_ms = steps.prefill_ms(uncached_tokens, pairs, 1.0, batch, kv_tokens)
    ahead = (book.current_tokens + book.late_tokens) / book.ranks
    if ahead <= 0.0:
        return 0.0, own_ms, max(0.0, own_ms - steps.steps_of(uncached_tokens, batch) * decode_ms), step_ms, longer_ms
    more = (book.current_pairs + book.late_pairs) / book.ranks
    prompts = (book.current_prompts + book.late_prompts) / book.ranks
    ahead_ms = steps.prefill_ms(ahead, more, prompts, batch, kv_tokens)
    all_ms = steps.prefill_ms(ahead + uncached_tokens, more + pairs, prompts + 1.0, batch, kv_tokens)
    further = steps.steps_of(ahead + uncached_tokens, batch) - steps.steps_of(ahead, batch)
    return max(0.0, ahead_ms - decode_ms), own_ms, max(0.0, all_ms - ahead_ms - further * decode_ms), step_ms, longer_ms

"""Made-up log probabilities: fixed for a token and its place, plausible, sorted, and the chosen token is the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from control_plane.sim_engine.tokens import Tokenizer
from control_plane.sim_engine.words import WORDS

Json = dict[str, Any]


def _ranked(tokenizer: Tokenizer, token: int, place: int, count: int) -> list[tuple[str, float]]:
    """The token and ``count - 1`` others, each with its log probability."""
    chosen = tokenizer.piece(token)
    mixed = (token * 2_654_435_761 + place * 40_503) & 0xFFFFFFFF
    ranked = [(chosen, -0.05 - (mixed & 0xFF) / 256)]
    while len(ranked) < count:
        other = " " + WORDS[(mixed + len(ranked)) % len(WORDS)]
        ranked.append((chosen + other if other == chosen else other, ranked[-1][1] - 0.25))
    return ranked


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[int], first: int, top: int) -> Json:
    content = []
    for place, token in enumerate(tokens, first):
        ranked = _ranked(tokenizer, token, place, max(1, top))
        entries = [{"token": text, "logprob": logprob, "bytes": list(text.encode())} for text, logprob in ranked]
        content.append({**entries[0], "top_logprobs": entries[:top]})
    return {"content": content}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[int], first: int, offset: int, top: int, echoed: Sequence[int] = ()) -> Json:
    """``offset``: characters of output before the first of these tokens. ``echoed``: the prompt's, whose first has no probability."""
    offsets, logprobs, texts, tops = [], [], [], []
    for place, token in enumerate([*echoed, *tokens], first):
        ranked = _ranked(tokenizer, token, place, max(1, top))
        offsets.append(offset)
        known = not echoed or len(offsets) > 1
        logprobs.append(ranked[0][1] if known else None)
        texts.append(ranked[0][0])
        tops.append(dict(ranked[: max(1, top)]) if known else None)
        offset += len(ranked[0][0])
    return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": texts, "top_logprobs": tops}


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Json | None]:
    """One entry a prompt token; the first has none."""
    result: list[Json | None] = [None]
    for place, token in enumerate(tokens[1:], 1):
        text, logprob = _ranked(tokenizer, token, place, 1)[0]
        result.append({str(token): {"logprob": logprob, "rank": 1, "decoded_token": text}})
    return result

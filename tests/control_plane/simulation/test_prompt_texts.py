"""Texts for requests without any: as many tokens as told, and shared exactly as far as blocks are."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.errors import InvalidRequest
from control_plane.sim_engine.tokens import Tokenizer
from control_plane.simulator.generators import workload_of
from control_plane.simulator.texts import WORDS, prompt_head, prompt_text
from control_plane.simulator.workload import TraceRequest

tokenizer = Tokenizer()


def count(text: str) -> int:
    return len(tokenizer.encode(text))


def shared_letters(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def test_there_are_256_words_of_one_token_each() -> None:
    assert len(set(WORDS)) == 256
    assert all(count(f" {word}") == 1 for word in WORDS)


@given(
    tokens=st.integers(1, 3_000),
    block_tokens=st.sampled_from([16, 64, 512]),
    bytes_per_token=st.sampled_from([1.0, 3.3, 4.0, 4.7]),
    common=st.integers(0, 10),
    limit=st.integers(0, 5_000),
)
def test_texts_are_shared_as_far_as_blocks_are(tokens: int, block_tokens: int, bytes_per_token: float, common: int, limit: int) -> None:
    blocks = -(-tokens // block_tokens)
    ids = tuple(range(blocks))
    branch = ids[:common] + tuple(range(1_000, 1_000 + blocks - common)) if common < blocks else ids
    one, other = (TraceRequest(0.0, tokens, 1, chain) for chain in (ids, branch))
    a, b = (prompt_text(request, block_tokens=block_tokens, bytes_per_token=bytes_per_token) for request in (one, other))
    assert len(a) == len(b) == round(tokens * bytes_per_token)
    assert a.isascii()
    shared = shared_letters(a, b)
    edge = round(min(common, blocks) * block_tokens * bytes_per_token)
    assert shared >= min(edge, len(a))
    if common < blocks and len(a) - edge > 40:
        assert shared < edge + 40
    assert prompt_head(one, limit, block_tokens, bytes_per_token) == a.encode()[:limit]


def test_a_block_that_fills_up_keeps_its_beginning() -> None:
    first = TraceRequest(0.0, 700, 100, (1, 2), "a")
    second = TraceRequest(9.0, 1_000, 100, (1, 2, 3), "a")
    assert prompt_text(second).startswith(prompt_text(first))


def test_what_has_no_blocks_shares_nothing() -> None:
    requests = [TraceRequest(0.001 * n, 1_000, 10) for n in range(200)]
    heads = {prompt_head(one, 40) for one in requests}
    assert len(heads) == 200
    alike = TraceRequest(0.0, 1_000, 10)
    assert prompt_text(alike) == prompt_text(requests[0])
    assert prompt_text(alike, nonce=1)[:40] != prompt_text(requests[0])[:40]
    assert prompt_head(TraceRequest(0.0, 1_000, 10, (5,)), 2_048)[:40] != prompt_head(TraceRequest(0.0, 1_000, 10, (6,)), 2_048)[:40]


def test_ids_of_any_size_have_texts_of_their_own() -> None:
    ids = [0, 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, 2**200]
    assert len({prompt_head(TraceRequest(0.0, 512, 1, (one,)), 40) for one in ids}) == len(ids)


@pytest.mark.parametrize("spec", ["sessions:duration_s=60", "documents:duration_s=60", "poisson:duration_s=20"])
def test_a_tokenizer_counts_what_was_asked_for(spec: str) -> None:
    workload = workload_of(spec, seed=1)
    for one in workload.requests[:60]:
        text = prompt_text(one, block_tokens=workload.block_tokens, count_tokens=count)
        assert count(text) == one.prompt_tokens


def test_a_tokenizer_with_a_mark_of_its_own_and_one_of_letters() -> None:
    for tokens in (1, 2, 17, 512, 1_000):
        request = TraceRequest(0.0, tokens, 1, (4, 5))
        assert count(prompt_text(request, count_tokens=lambda text: count(text) + 1)) == tokens - 1
        assert len(prompt_text(request, count_tokens=len)) == tokens


def test_with_a_tokenizer_too_texts_are_shared_block_by_block() -> None:
    one, other = (TraceRequest(0.0, 300, 1, ids) for ids in ((1, 2, 3, 4, 5), (1, 2, 3, 9, 10)))
    a, b = (prompt_text(request, block_tokens=64, count_tokens=count) for request in (one, other))
    shared = shared_letters(a, b)
    assert 3 * 64 <= count(a[:shared]) < 3 * 64 + 8


def test_a_tokenizer_that_never_agrees_is_told() -> None:
    with pytest.raises(InvalidRequest, match="no text of 10 tokens"):
        prompt_text(TraceRequest(0.0, 10, 1), count_tokens=lambda text: 7)

"""The prefix index: what it believes, what it forgets, what engines' events make exact, and what the dispatch window makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedCall, ScriptedEngine

from control_plane import ConfigurationError, ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.fleet import HealthSettings, PrefixIndex, PrefixSettings
from control_plane.fleet.prefix.blocks import block_keys
from control_plane.fleet.prefix.index import APPROXIMATE
from control_plane.fleet.prefix.pieces import ENDS, MAX_COVERED_BYTES, PIECE_BYTES, chain, chain_of, seed_of
from control_plane.types import Usage

A = ExecutionInstance(instance_id="a", model_name="m")
B = ExecutionInstance(instance_id="b", model_name="m")
TOKENS = PIECE_BYTES // 4


def prompt(text: str, model: str = "m") -> RequestMetadata:
    return RequestMetadata(prompt=text, model_name=model)


@given(shared=st.integers(0, 5000), first=st.integers(0, 2000), second=st.integers(0, 2000))
def test_whole_shared_pieces_count_and_nothing_else(shared: int, first: int, second: int) -> None:
    index = PrefixIndex()
    index.sent(prompt("s" * shared + "1" * first), A)
    index.sent(prompt("other " * 200), B)
    expected = max((end for end in ENDS if end <= shared), default=0) // 4
    assert index.cached_tokens(prompt("s" * shared + "2" * second), A) == expected
    assert index.cached_tokens(prompt("s" * shared), B) == 0
    assert index.cached_tokens(prompt("s" * shared, model="other"), A) == 0


def test_the_oldest_go_first_and_a_chain_loses_its_end_first() -> None:
    index = PrefixIndex()
    small = ExecutionInstance(instance_id="small", model_name="m")
    small.engine.kv_block_size_tokens, small.engine.kv_block_count = 16, 4 * TOKENS // 16
    for letter in "xy":
        index.sent(prompt(letter * PIECE_BYTES * 3), small)
    assert index.cached_tokens(prompt("x" * PIECE_BYTES * 3), small) == TOKENS
    assert index.cached_tokens(prompt("y" * PIECE_BYTES * 3), small) == 3 * TOKENS


def test_nothing_is_believed_of_an_engine_that_restarted_or_does_not_cache() -> None:
    index = PrefixIndex()
    here = ExecutionInstance(instance_id="here", model_name="m")
    index.sent(prompt("x" * 600), here)
    assert index.cached_tokens(prompt("x" * 600), here) == TOKENS
    here.engine.prefix_caching = False
    assert index.cached_tokens(prompt("x" * 600), here) == 0
    here.engine.prefix_caching = True
    index.forget("here")
    assert index.cached_tokens(prompt("x" * 600), here) == 0


@pytest.mark.parametrize(("window", "second"), [(1, "cold"), (64, "warm")])
async def test_the_window_takes_the_warm_request_and_window_one_is_strict(window: int, second: str) -> None:
    engines: list[ScriptedEngine] = []

    def make(instance: ExecutionInstance) -> ScriptedEngine:
        engines.append(ScriptedEngine(instance))
        return engines[-1]

    manager = ControlPlaneManager(
        scheduling_policy="fifo", dispatch_window=window, engine_factory=make, health=HealthSettings(probe_interval_s=30.0)
    )
    manager.register_instance(ExecutionInstance(instance_id="a", model_name="m", max_concurrent_requests=1))
    async with manager:
        shared = "shared " * 600
        for name, text in (("first", shared + "1"), ("cold", "another " * 600), ("warm", shared + "2")):
            await manager.submit_request(RequestMetadata(request_id=name, prompt=text, max_tokens=4, slo_deadline_ms=600_000))
        order: list[str] = []
        end: Callable[[ScriptedCall], None] = ScriptedCall.answer
        while engines[0].open:
            call = engines[0].open[0]
            order.append(call.request.request_id)
            end(call)
    assert order[:2] == ["first", second]
    assert sorted(order) == ["cold", "first", "warm"]


# ---- chains


@given(size=st.integers(0, 2 * MAX_COVERED_BYTES))
def test_a_chain_covers_a_prompt_but_for_an_eighth_at_most(size: int) -> None:
    covered = max((end for end in ENDS if end <= size), default=0)
    assert len(chain_of(b"x" * size, 1)) == sum(end <= size for end in ENDS)
    assert min(size, MAX_COVERED_BYTES) - covered <= max(PIECE_BYTES, covered / 8)


def test_chains_of_other_models_tools_and_texts_have_nothing_in_common() -> None:
    text = b"text " * 1000
    assert chain_of(memoryview(text), seed_of("m")) == chain_of(text, seed_of("m"))
    assert set(chain_of(text, seed_of("m"))).isdisjoint(chain_of(text, seed_of("other")))
    assert chain_of(b"y" + text, 1)[-1] != chain_of(b"z" + text, 1)[-1]


# ---- what engines tell


def fed(index: PrefixIndex, instance: ExecutionInstance, tokens: list[int], keys: list[int] | None = None) -> list[int]:
    """The instance holds the blocks of these tokens; its own hashes are the keys plus one. Returns the keys."""
    slot = index.feed(instance, 16)
    keys = keys or block_keys(tokens, 16)
    index.stored(slot, [key + 1 for key in keys], None, tokens)
    return keys


def learned(index: PrefixIndex, request: RequestMetadata, keys: list[int]) -> None:
    pieces = chain(request)
    index.learn(16, pieces, [end // 4 for end in ENDS[: len(pieces)]], keys)


def test_what_is_learned_and_held_is_known_to_the_piece_and_what_is_evicted_is_not() -> None:
    index = PrefixIndex()
    request, tokens = prompt("word " * 400), list(range(500))
    index.feed(B, 16)
    keys = fed(index, A, tokens)
    assert index.cached_tokens(request, A) == 0
    assert index.sent(request, A) == (0, 0), "it was sent nowhere, so it is new"
    assert index.sent(request, B) == (0, 1), "partly: it returns, and which blocks it is is not known"
    assert index.sent(request, B) == (3 * TOKENS, 1), "until then what was sent there counts"
    assert index.returns(request, A)
    index.forget("b")
    index.feed(B, 16)
    learned(index, request, keys)
    assert not index.returns(request, A)
    assert index.cached_tokens_of(request, [A, B]) == [3 * TOKENS, 0]
    assert index.holders(request, 4) == [A]
    assert index.sent(request, A) == (3 * TOKENS, 0)
    slot = index.find(A)
    assert slot is not None
    index.removed(slot, [key + 1 for key in keys[2 * TOKENS // 16 :]])
    assert index.cached_tokens(request, A) == 2 * TOKENS
    index.lost(slot)
    assert index.sent(request, A) == (0, 0), "exactly nothing"
    index.forget("a")
    assert index.report().blocks == 0
    assert not index.is_fed(A)


def test_blocks_say_more_than_what_was_sent() -> None:
    index = PrefixIndex()
    request, tokens = prompt("word " * 400), list(range(500))
    keys = fed(index, A, tokens)
    learned(index, request, keys)
    index.sent(request, A)
    slot = index.find(A)
    assert slot is not None
    index.removed(slot, [key + 1 for key in keys])
    assert index.cached_tokens(request, A) == 0, "it was sent there, and the engine says that it holds nothing of it"


def test_no_more_blocks_and_pieces_are_kept_than_were_allowed() -> None:
    index = PrefixIndex(PrefixSettings(max_blocks=10, max_pieces=4))
    tokens = list(range(500))
    request = prompt("word " * 400)
    keys = fed(index, A, tokens)
    report = index.report()
    assert (report.blocks, report.refused_blocks) == (10, 21)
    learned(index, request, keys)
    for number in range(20):
        learned(index, prompt(f"{number} " * 400), [number] * len(keys))
    assert index.report().pieces == 4
    assert index.cached_tokens(request, A) == TOKENS, "whose blocks are held is kept"


@pytest.mark.parametrize(
    "wrong", [{"max_blocks": 0}, {"max_pieces": 1.5}, {"learn_per_s": -1}, {"kv_events": "yes"}, {"learn_per_s": float("nan")}]
)
def test_wrong_bounds_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=rf"prefix\.{next(iter(wrong))}"):
        PrefixSettings(**wrong)  # type: ignore[arg-type]


# ---- what was sent


def test_answers_take_room_and_the_ratio_of_bytes_to_tokens_is_learned() -> None:
    index = PrefixIndex()
    small = ExecutionInstance(instance_id="small", model_name="m")
    small.engine.kv_block_size_tokens, small.engine.kv_block_count = 16, 8 * TOKENS // 16
    first = prompt("x" * PIECE_BYTES * 3)
    usage = Usage(3 * TOKENS, 5 * TOKENS, 0, exact=True)
    index.ended(first, small, index.sent(first, small), usage)
    assert index.cached_tokens(first, small) == 3 * TOKENS
    other = prompt("y" * PIECE_BYTES)
    index.sent(other, small)
    assert index.cached_tokens(first, small) == 3 * TOKENS, "the answer before goes first"
    for number in range(40):
        dense = prompt(f"{number}" * PIECE_BYTES)
        index.ended(dense, A, index.sent(dense, A), Usage(dense.prompt_bytes // 2, 1, 0, exact=True))
    assert index.cached_tokens(prompt("0" * PIECE_BYTES), A) == pytest.approx(2 * TOKENS, abs=8)


def test_errors_are_summed_by_how_the_match_came_about() -> None:
    index = PrefixIndex()
    request = prompt("x" * PIECE_BYTES * 2)
    for cached in (0, 3 * TOKENS, None):
        expected = index.sent(request, A)
        index.ended(request, A, expected, Usage(2 * TOKENS, 1, cached, exact=True))
    report = index.report()
    assert report.requests == (0, 0, 3, 0)
    assert report.errors[2] == (2, 2 * TOKENS, 3 * TOKENS, 0, TOKENS)
    assert report.exact_share == 0.0


def test_what_each_holds_and_who_holds_the_most() -> None:
    index = PrefixIndex()
    asked = prompt("x" * PIECE_BYTES * 3)
    index.sent(prompt("x" * PIECE_BYTES * 2), A)
    index.sent(asked, B)

    assert index.cached_tokens_of(asked, [A, B]) == [2 * TOKENS, 3 * TOKENS]
    assert index.holders(asked, 16) == [B, A]
    assert index.holders(asked, 1) == [B]
    assert index.holders(prompt("y" * PIECE_BYTES * 3), 16) == []
    assert index.holders(prompt("short"), 16) == []


def test_room_costs_what_is_asked_for_again_after_it_went() -> None:
    index = PrefixIndex()
    small = ExecutionInstance(instance_id="small", model_name="m")
    small.engine.kv_block_size_tokens, small.engine.kv_block_count = 16, 4 * TOKENS // 16
    index.sent(prompt("a" * PIECE_BYTES), small)
    assert index.lost_tokens(small, 10 * TOKENS) == 0.0, "nothing ever went"
    for k in range(400):  # six prompts in turn, of which four fit: each is asked for soon after it went
        index.sent(prompt("bcdefg"[k % 6] * PIECE_BYTES), small)
    missed = index.lost_tokens(small, TOKENS)
    assert 0.6 * TOKENS < missed <= TOKENS
    for k in range(400):  # each once, never again
        index.sent(prompt(f"{k:04}" * (PIECE_BYTES // 4)), small)
    assert 0.0 < index.lost_tokens(small, TOKENS) < 0.3 * missed
    index.forget("small")
    assert index.lost_tokens(small, TOKENS) == 0.0


@given(turns=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(0, 3000)), max_size=60))
def test_a_mirror_holds_no_more_than_its_engine_and_always_beginnings(turns: list[tuple[int, int, int]]) -> None:
    index = PrefixIndex()
    small = ExecutionInstance(instance_id="small", model_name="m")
    small.engine.kv_block_size_tokens, small.engine.kv_block_count = 16, 10 * TOKENS // 16
    for which, pieces, output in turns:
        request = prompt(f"{which}" * PIECE_BYTES * pieces)
        usage = Usage(TOKENS * pieces, output, None, exact=True)
        index.ended(request, small, index.sent(request, small), usage)
        assert index.report().sent_pieces <= 10
        assert index.report().sent_pieces * TOKENS >= index.cached_tokens(request, small)
    held = sum(index.cached_tokens(prompt(f"{which}" * PIECE_BYTES * 8), small) for which in range(6))
    assert held <= 10 * TOKENS


# ---- the next turn of a conversation


def turn(index: PrefixIndex, instance: ExecutionInstance, text: str, answer_tokens: int) -> None:
    request = prompt(text)
    usage = Usage(len(text) // 4, answer_tokens, None, exact=True)
    index.ended(request, instance, index.sent(request, instance), usage)


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    index, here, there = PrefixIndex(), ExecutionInstance("here", model_name="m"), ExecutionInstance("there", model_name="m")
    asked = "q" * (3 * PIECE_BYTES + 200)  # 434 tokens, of which three pieces are whole
    turn(index, there, "q" * 3 * PIECE_BYTES, 0)
    turn(index, here, asked, 100)
    follows = prompt(asked + "a" * 400 + "and then?")
    assert index.cached_tokens(follows, here) == (434 + 100) // 16 * 16
    assert index.cached_tokens(follows, there) == 3 * TOKENS, "it ran here"
    assert index.cached_tokens_of(follows, [there, here]) == [3 * TOKENS, (434 + 100) // 16 * 16]
    assert index.sent(follows, here) == ((434 + 100) // 16 * 16, APPROXIMATE)


def test_another_question_about_the_same_document_does_not() -> None:
    index, here = PrefixIndex(), ExecutionInstance("here", model_name="m")
    document = "d" * 8 * PIECE_BYTES
    turn(index, here, document + "first question? ", 100)
    assert index.cached_tokens(prompt(document + "the second one? "), here) == 8 * TOKENS


def test_an_answer_that_was_pushed_out_is_not_found() -> None:
    index, here = PrefixIndex(), ExecutionInstance("here", model_name="m")
    here.engine.kv_block_size_tokens, here.engine.kv_block_count = 16, 8 * TOKENS // 16
    turn(index, here, "q" * 3 * PIECE_BYTES, 128)
    follows = prompt("q" * 3 * PIECE_BYTES + "a" * 512 + "and then?")
    assert index.cached_tokens(follows, here) == 4 * TOKENS
    turn(index, here, "x" * 5 * PIECE_BYTES, 0)
    assert index.cached_tokens(follows, here) == 3 * TOKENS, "it takes an answer's room first"
    turn(index, here, "y" * 5 * PIECE_BYTES, 0)
    assert index.cached_tokens(follows, here) == 0

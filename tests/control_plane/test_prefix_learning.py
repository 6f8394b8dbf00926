"""From texts to blocks: places of a request's JSON found in what its tokens spell, and a gateway that learns while it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.fleet import HealthSettings, PrefixSettings
from control_plane.fleet.prefix.learning import token_bytes, tokens_at
from control_plane.fleet.prefix.pieces import ENDS
from control_plane.sim_engine import SimEngine

WORDS = ["alpha", "beta", "gamma,", "delta.", 'say "so"', "back\\slash", "line\nbreak", "naïve", "日本語", "it's", "tab\there", "😀"]


def templated(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages) + "<|im_start|>assistant\n"


def conversation(rng: Random, turns: int, words: int) -> list[dict[str, str]]:
    return [
        {"role": ("system", "user", "assistant")[min(at, 1 + at % 2)], "content": " ".join(rng.choice(WORDS) for _ in range(words))}
        for at in range(turns)
    ]


def cut(text: str, rng: Random) -> list[bytes]:
    """Tokens of some letters each."""
    pieces, at = [], 0
    while at < len(text):
        size = rng.randrange(1, 7)
        pieces.append(text[at : at + size].encode())
        at += size
    return pieces


@given(seed=st.integers(0, 10_000), turns=st.integers(1, 5), words=st.integers(20, 300), ascii_only=st.booleans())
def test_no_more_is_claimed_than_two_requests_really_share(seed: int, turns: int, words: int, ascii_only: bool) -> None:
    rng = Random(seed)
    messages = conversation(rng, turns, words)
    raw = json.dumps(messages, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    places = [end for end in ENDS if end <= len(raw)]
    spelled = cut(templated(messages), rng)
    found = tokens_at(raw, places, spelled)
    assert found == sorted(found)
    for place, tokens in zip(places, found, strict=True):
        # another request with the same JSON up to there, and something else behind it
        shared = _text_up_to(messages, raw, place, ascii_only)
        assert b"".join(spelled[:tokens]) == templated(messages).encode()[: sum(map(len, spelled[:tokens]))]
        assert sum(map(len, spelled[:tokens])) <= shared


def _text_up_to(messages: list[dict[str, str]], raw: bytes, place: int, ascii_only: bool) -> int:
    """Bytes of the templated text that are settled by ``raw[:place]``, counted letter by letter."""
    text = 0
    at = len("[")
    for message in messages:
        head = f'{{"role":"{message["role"]}","content":"'
        at += len(head)
        if at > place:
            return text
        text += len(f"<|im_start|>{message['role']}\n".encode())
        for letter in message["content"]:
            at += len(json.dumps(letter, ensure_ascii=ascii_only).encode()) - 2
            if at > place:
                return text
            text += len(letter.encode())
        at += len('"},')
        text += len(b"<|im_end|>\n")
    return text


def test_places_in_plain_text_are_found_to_the_token() -> None:
    rng = Random(1)
    content = " ".join(f"word{rng.randrange(10_000)}" for _ in range(2_000))
    messages = [{"role": "user", "content": content}]
    raw = json.dumps(messages).encode()
    spelled = cut(templated(messages), rng)
    places = [end for end in ENDS if end <= len(raw)]
    frame = raw.index(content[:20].encode()) - templated(messages).encode().index(content[:20].encode())
    for place, tokens in zip(places, tokens_at(raw, places, spelled), strict=True):
        settled = place - frame
        covered = sum(map(len, spelled[:tokens]))
        assert settled - 16 < covered <= settled


@pytest.mark.parametrize(
    ("strs", "spelled"),
    [
        (["The", "Ġquick", "Ċ", "Ã©"], ["The", " quick", "\n", "é"]),
        (["▁The", "▁quick", "<0x0A>", "é"], [" The", " quick", "\n", "é"]),
        (["The", " quick", "\n", "é"], ["The", " quick", "\n", "é"]),
    ],
    ids=["byte-level", "sentencepiece", "as it is"],
)
def test_tokens_are_spelled_in_the_three_usual_ways(strs: list[str], spelled: list[str]) -> None:
    assert token_bytes(strs) == [one.encode() for one in spelled]


# ---- while it serves

CONFIG = {"enable_kv_cache_events": True, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"}


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def text(rng: Random, words: int) -> str:
    return " ".join(f"{rng.choice(['north', 'south', 'east', 'west'])} {rng.randrange(1000)}" for _ in range(words))


def published(engine: SimEngine) -> int:
    assert engine.kv_events is not None
    return engine.kv_events.published


async def serve(requests: list[dict[str, Any]], **options: Any) -> tuple[ControlPlaneManager, list[Any]]:
    """One after the other over an engine that publishes its events, and time to learn after each."""
    engine = SimEngine("h100-llama3-8b", speed=1000.0, kv_events_config=CONFIG, block_size=16)
    await engine.start()
    manager = ControlPlaneManager(
        "fifo", health=HealthSettings(probe_interval_s=0.1, scrape_interval_s=0.1), prefix=PrefixSettings(learn_per_s=1000.0, **options)
    )
    manager.register_instance(ExecutionInstance(instance_id="e", url=engine.url))
    ended = []
    async with manager:
        await until(lambda: manager.get_instances()[0].is_usable)
        await manager.kv_events.look()
        for fields in requests:
            ended.append(await manager.result(await manager.submit_request(RequestMetadata(max_tokens=4, **fields))))
            assert ended[-1].state == "completed", ended[-1].error
            await until(lambda: [one.order.due for one in manager.kv_events.subscriptions] == [published(engine)])
            task = manager.prefix_learner._task
            if task is not None:
                await task
    await engine.stop()
    return manager, ended


@pytest.mark.parametrize("kind", ["completion", "chat", "ids"])
async def test_a_prefix_that_returns_is_learned_and_then_matched_exactly(kind: str) -> None:
    rng = Random(7)
    shared = text(rng, 600)
    tails = [text(rng, 40) for _ in range(5)]
    if kind == "ids":
        ids = [rng.randrange(100_000) for _ in range(2000)]
        requests = [{"extra_body": {"prompt": ids + [at] * 50}, "input": ids + [at] * 50, "kind": "completion"} for at in range(5)]
    elif kind == "chat":
        system = {"role": "system", "content": shared}
        requests = [{"messages": [system, {"role": "user", "content": tail}]} for tail in tails]
    else:
        requests = [{"prompt": shared + tail, "kind": "completion"} for tail in tails]
    manager, ended = await serve(requests)
    report = manager.get_prefix_report()
    assert report.learned_prompts >= 1, report
    assert report.unlearned_prompts == 0
    assert report.errors[0].requests >= 2, report
    assert report.errors[0].over_tokens == 0, "what is expected exactly is there"
    error = report.errors[0]
    assert error.expected_tokens >= 0.85 * error.cached_tokens > 0
    assert all(status.usage is not None for status in ended)


async def test_salted_prompts_are_learned_as_such_or_not_at_all() -> None:
    rng = Random(9)
    shared = text(rng, 300)
    requests = [
        {"prompt": shared + text(rng, 30), "kind": "completion", "extra_body": {"cache_salt": "ours"} if at % 2 else {}} for at in range(6)
    ]
    manager, _ = await serve(requests)
    report = manager.get_prefix_report()
    assert report.errors[0].requests > 0
    assert report.learned_prompts > 0


async def test_nothing_is_asked_of_engines_where_learning_is_off() -> None:
    rng = Random(3)
    shared = text(rng, 300)
    manager = ControlPlaneManager(prefix=PrefixSettings(learn_per_s=0.0))
    assert manager.prefix_learner.learned == 0
    served, _ = await serve([{"prompt": shared + str(at), "kind": "completion"} for at in range(3)], max_pieces=1)
    assert served.get_prefix_report().pieces == 1

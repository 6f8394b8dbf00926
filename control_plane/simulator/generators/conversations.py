"""Requests that share beginnings: conversations, agents, questions about long documents.

Turns after the first are a closed loop: each comes ``think_s`` after the answer before it. ``arrival_s`` is then the earliest, as if
answers took no time; with real answers sessions take longer, and the rate is a little below the one asked for. The workload is cut out of
traffic that has been going on: of sessions that began before it the later turns are there, so that the rate holds from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Final

from control_plane.simulator.generators.draws import (
    MAX_PROMPT_TOKENS,
    BlockIds,
    check_count,
    geometric,
    lognormal,
    output_length,
    poisson_arrivals,
    prompt_length,
)
from control_plane.simulator.workload import TraceRequest

THINK_SIGMA: Final = 0.8
PAUSE_SIGMA: Final = 1.2
#: sessions begin so many mean lengths before the workload, or so many times its duration if that is less
_LEAD_LENGTHS: Final = 4.0
_LEAD_DURATIONS: Final = 10.0


def sessions(
    rng: Random,
    *,
    rate_rps: float = 10.0,
    duration_s: float = 600.0,
    turns: float = 5.0,
    think_s: float = 15.0,
    system_tokens: int = 500,
    prompt_tokens: int = 200,
    output_tokens: int = 200,
) -> list[TraceRequest]:
    """People who chat: every turn repeats the conversation so far and adds a question, so prompts grow and their beginnings are cached
    where the last turn ran. This is what session affinity and prefix-aware routing are for.

    Sessions begin as a Poisson process; their number of turns is geometric with mean ``turns``; all share a system prompt of
    ``system_tokens``. Questions (median ``prompt_tokens``, sigma 1.0), answers (0.8) and the time to read and type (median ``think_s``,
    0.8) are lognormal. ``block_ids`` cover prompt and answer, so that the next turn repeats both.
    """
    starts = _starts(rng, rate_rps, duration_s, turns, think_s, THINK_SIGMA)
    blocks = BlockIds()
    system = blocks.shared(system_tokens)
    found: list[TraceRequest] = []
    for number, start_s in enumerate(starts):
        chat = _Growing(blocks, system, system_tokens, f"chat{number}", start_s)
        for _ in range(geometric(rng, turns)):
            chat.turn(prompt_length(rng, prompt_tokens), output_length(rng, output_tokens))
            chat.pause(lognormal(rng, think_s, THINK_SIGMA))
        found += _within(chat.turns, duration_s)
    return _in_order(found)


def agents(
    rng: Random,
    *,
    rate_rps: float = 10.0,
    duration_s: float = 600.0,
    kinds: int = 5,
    steps: float = 8.0,
    pause_s: float = 2.0,
    system_tokens: int = 6_000,
    task_tokens: int = 300,
    result_tokens: int = 400,
    output_tokens: int = 80,
) -> list[TraceRequest]:
    """Agents: a very long system prompt with its tools, which all agents of a kind share, then many short steps; between them a tool
    runs for seconds, not a person for minutes. Nearly all of a prompt is cached, if it goes where it went before.

    Tasks begin as a Poisson process; of ``kinds`` of agents the i-th is as frequent as 1/i (Zipf), its system prompt 0.5 to 1.5 times
    ``system_tokens``; the number of steps is geometric with mean ``steps``. Task, tool result and what the agent says are lognormal
    around their medians (sigma 1.0, 1.0, 0.8), the tool's pause around ``pause_s`` with sigma 1.2: most are quick, some hang.
    """
    starts = _starts(rng, rate_rps, duration_s, steps, pause_s, PAUSE_SIGMA)
    blocks = BlockIds()
    lengths = [max(1, round(system_tokens * (0.5 + rng.random()))) for _ in range(kinds)]
    systems = [(blocks.shared(length), length) for length in lengths]
    weights = [1.0 / rank for rank in range(1, kinds + 1)]
    found: list[TraceRequest] = []
    for number, start_s in enumerate(starts):
        kind = rng.choices(range(kinds), weights)[0]
        agent = _Growing(blocks, *systems[kind], f"agent{number}", start_s, tenant=f"agents{kind}")
        asked = prompt_length(rng, task_tokens)
        for _ in range(geometric(rng, steps)):
            agent.turn(asked, output_length(rng, output_tokens))
            agent.pause(lognormal(rng, pause_s, PAUSE_SIGMA))
            asked = prompt_length(rng, result_tokens)
        found += _within(agent.turns, duration_s)
    return _in_order(found)


def documents(
    rng: Random,
    *,
    rate_rps: float = 5.0,
    duration_s: float = 600.0,
    document_tokens: int = 20_000,
    questions: float = 4.0,
    think_s: float = 30.0,
    question_tokens: int = 60,
    output_tokens: int = 250,
) -> list[TraceRequest]:
    """Somebody asks several questions about one long document: the first reads tens of thousands of tokens, the others could find them
    cached, and while one is read nobody else's first token comes. For prefill/decode separation and for cache against balance.

    Readers begin as a Poisson process; each has a document of its own (lognormal, median ``document_tokens``, sigma 0.6) and asks a
    geometric number of questions with mean ``questions``. A prompt is the document and one question; answers are not repeated.
    """
    starts = _starts(rng, rate_rps, duration_s, questions, think_s, THINK_SIGMA)
    blocks = BlockIds()
    found: list[TraceRequest] = []
    for number, start_s in enumerate(starts):
        length = max(1, round(lognormal(rng, document_tokens, 0.6, MAX_PROMPT_TOKENS)))
        document = blocks.shared(length)
        asks: list[TraceRequest] = []
        due_s, pause_s = start_s, None
        for _ in range(geometric(rng, questions)):
            asked, answered = length + prompt_length(rng, question_tokens), output_length(rng, output_tokens)
            ids = blocks.extended(document, asked + answered)
            asks.append(TraceRequest(due_s, asked, answered, ids, f"reader{number}", think_s=pause_s))
            pause_s = lognormal(rng, think_s, THINK_SIGMA)
            due_s += pause_s
        found += _within(asks, duration_s)
    return _in_order(found)


class _Growing:
    """A session whose every turn repeats all before it. It ends where its prompt would be longer than MAX_PROMPT_TOKENS."""

    def __init__(self, blocks: BlockIds, ids: tuple[int, ...], tokens: int, name: str, start_s: float, tenant: str = "") -> None:
        self._blocks = blocks
        self._ids = ids
        self._tokens = tokens
        self._name = name
        self._due_s = start_s
        self._pause_s: float | None = None
        self._tenant = tenant
        self.turns: list[TraceRequest] = []

    def turn(self, asked_tokens: int, answered_tokens: int) -> None:
        prompt = self._tokens + asked_tokens
        if prompt > MAX_PROMPT_TOKENS and self.turns:
            return
        self._tokens = prompt + answered_tokens
        self._ids = self._blocks.extended(self._ids, self._tokens)
        self.turns.append(TraceRequest(self._due_s, prompt, answered_tokens, self._ids, self._name, self._tenant, think_s=self._pause_s))

    def pause(self, seconds: float) -> None:
        self._pause_s = seconds
        self._due_s += seconds


def _starts(rng: Random, rate_rps: float, duration_s: float, turns: float, gap_s: float, gap_sigma: float) -> Iterator[float]:
    """When sessions begin, from well before 0 on; their turns come ``gap_s`` (median) after each other. Raises InvalidRequest."""
    length_s = (turns - 1.0) * gap_s * math.exp(gap_sigma * gap_sigma / 2.0)
    lead_s = min(_LEAD_LENGTHS * length_s, _LEAD_DURATIONS * duration_s)
    check_count(rate_rps, duration_s)
    return poisson_arrivals(rng, rate_rps / turns, duration_s + lead_s, start_s=-lead_s)


def _within(turns: list[TraceRequest], end_s: float) -> list[TraceRequest]:
    """Those between 0 and ``end_s``; the first of them waits for nothing."""
    found = [turn for turn in turns if 0.0 <= turn.arrival_s < end_s]
    if found:
        found[0].think_s = None
    return found


def _in_order(requests: list[TraceRequest]) -> list[TraceRequest]:
    requests.sort(key=lambda one: one.arrival_s)
    return requests

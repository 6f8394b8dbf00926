"""Some 400 requests, good and bad, to every endpoint: the simulated engine answers as the real one does, and the gateway changes
nothing of what an engine answers.

What is compared, and which differences are meant, is in support/observed.py; the requests are in support/golden_requests.py and
golden_refusals.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_requests import CONTEXT_TOKENS, EMBEDDING_CASES, MODEL, Answer, Case, send, send_all
from observed import ALL_CASES, GENERATING_CASES, differences, observe, read, unexpected
from threaded_engines import threaded_engines
from vllm_server import VllmServer

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

RECORDED = Path(__file__).parents[1] / "data" / "vllm_golden.json.gz"
Answers = dict[str, Answer]

#: relayed cases that the gateway treats otherwise than an engine, on purpose
LENIENT = {
    "chat_priority_string": "names of priorities are the gateway's own",
    "chat_content_type_missing": "a JSON body without a content type is taken for JSON",
    "chat_priority_null": "null is no priority",
    "completion_priority_null": "null is no priority",
    "messages_model_empty": "without a model the only one there is serves",
}
#: kinds that no engine of this pair serves never reach one, see test_real_embedding
_NOT_SERVED = ("/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score")
RELAYED = tuple(case for case in GENERATING_CASES if case.method == "POST" and case.path not in _NOT_SERVED and case.path[-1] != "/")
#: how many tokens an event of a stream carries is chance on a real engine, above all on a busy machine: then both are asked again
ATTEMPTS = 4


@pytest.fixture(scope="module")
def real(started_pair: tuple[VllmServer, VllmServer]) -> Answers:
    return send_all(started_pair[0].url, GENERATING_CASES)


@pytest.fixture(scope="module")
def real_embedding(embedding_server: VllmServer) -> Answers:
    return send_all(embedding_server.url, EMBEDDING_CASES)


@pytest.fixture(scope="module")
def simulated() -> Iterator[Answers]:
    found: Answers = {}
    for kind, cases in (("generate", GENERATING_CASES), ("embedding", EMBEDDING_CASES)):
        with threaded_engines(1, model_name=MODEL, max_model_len=CONTEXT_TOKENS, kind=kind, speed=20.0) as ports:
            found |= send_all(f"http://127.0.0.1:{ports[0]}", cases)
    return found


@pytest.fixture(scope="module")
def relayed(serving: str, real: Answers) -> Answers:
    return send_all(serving, RELAYED)


@pytest.mark.parametrize("case", GENERATING_CASES, ids=lambda case: case.name)
def test_the_simulated_engine_answers_as_the_real_one(
    case: Case, real: Answers, simulated: Answers, started_pair: tuple[VllmServer, VllmServer]
) -> None:
    wanted = observe(case, simulated[case.name])
    assert _unlike(case, wanted, real[case.name], started_pair[0]) == []


def _unlike(case: Case, wanted: Any, answer: Answer, server: VllmServer) -> list[str]:
    """How the engine's answer differs from what is wanted; a stream is asked for again when it does."""
    lines = unexpected(case, observe(case, answer), wanted)
    for _ in range(ATTEMPTS if case.stream else 0):
        if lines:
            lines = unexpected(case, observe(case, send(case, server.url)), wanted)
    return lines


@pytest.mark.parametrize("case", EMBEDDING_CASES, ids=lambda case: case.name)
def test_the_simulated_embedding_engine_answers_as_the_real_one(case: Case, real_embedding: Answers, simulated: Answers) -> None:
    assert unexpected(case, observe(case, real_embedding[case.name]), observe(case, simulated[case.name])) == []


def test_what_is_recorded_is_what_the_real_one_answers(
    real: Answers, real_embedding: Answers, started_pair: tuple[VllmServer, VllmServer]
) -> None:
    recorded, answers = read(RECORDED), real | real_embedding
    assert recorded["vllm_version"] == answers["version"].json()["version"]
    changed = {
        case.name: lines
        for case in ALL_CASES
        if (lines := _unlike(case, recorded["cases"][case.name], answers[case.name], started_pair[0]))
    }
    assert changed == {}


@pytest.mark.parametrize("case", RELAYED, ids=lambda case: case.name)
def test_the_gateway_answers_as_the_engine_behind_it(
    case: Case, real: Answers, relayed: Answers, serving: str, started_pair: tuple[VllmServer, VllmServer]
) -> None:
    """Errors word for word, streams event for event. What never reached an engine has at least the engine's status."""
    direct, through = real[case.name], relayed[case.name]
    if through.header("x-instance-id") is None:
        # vLLM's own health page is not a path of the gateway's
        assert through.status == direct.status or case.path == "/ping"
        assert through.json()["error"]["message"]
        return
    if case.name in LENIENT:
        assert (direct.status, through.status) == (400, 200)
        return
    if refusal := _refused_in_stream(direct):
        # the engine said 200 before it knew; nothing has been sent yet when the gateway hears of it
        assert (through.status, through.json()) == (refusal["error"]["code"], refusal)
        return
    found = _changed(case, direct, through)
    for _ in range(ATTEMPTS if case.stream else 0):
        if found:
            found = _changed(case, send(case, started_pair[0].url), send(case, serving))
    assert found == []
    assert through.header("x-request-id")


def _refused_in_stream(answer: Answer) -> Any:
    """The error that is the only event of a stream, if it is."""
    first = answer.events[0] if answer.events else ""
    return json.loads(first.removeprefix("data: ")) if first.startswith('data: {"error"') else None


def _changed(case: Case, direct: Answer, through: Answer) -> list[str]:
    found = differences(observe(case, direct), observe(case, through))
    return [line for line in found if not line.startswith("headers") and not _is_hidden_usage(line)]


def _is_hidden_usage(line: str) -> bool:
    """The gateway asks for usage and hides it; vLLM then tells its fingerprint in the hidden event instead of in the last of a choice."""
    return line.startswith("events[") and ".system_fingerprint: real" in line

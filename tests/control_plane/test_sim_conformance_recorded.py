"""The simulated engine against what a real vLLM answered to the same requests, recorded (data/vllm_golden.json.gz names its version).

The same comparison against servers that run now is in real/test_real_conformance.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_requests import CASES, CONTEXT_TOKENS, EMBEDDING_CASES, MODEL, Answer, Case, send_all
from observed import ALL_CASES, ALLOWANCES, GENERATING_CASES, observe, read, unexpected
from threaded_engines import threaded_engines

from control_plane.sim_engine.engine import VLLM_VERSION

RECORDED = read(Path(__file__).parent / "data" / "vllm_golden.json.gz")


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, Answer]]:
    """Every case's answer from a simulated engine of its kind."""
    found: dict[str, Answer] = {}
    for kind, cases in (("generate", GENERATING_CASES), ("embedding", EMBEDDING_CASES)):
        with threaded_engines(1, model_name=MODEL, max_model_len=CONTEXT_TOKENS, kind=kind, speed=50.0) as ports:
            found |= send_all(f"http://127.0.0.1:{ports[0]}", cases)
    return found


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_the_simulated_engine_answers_as_vllm_did(case: Case, answers: dict[str, Answer]) -> None:
    real: Any = RECORDED["cases"][case.name]
    assert unexpected(case, real, observe(case, answers[case.name])) == []


def test_every_case_is_recorded_from_the_version_that_is_imitated() -> None:
    assert RECORDED["vllm_version"] == VLLM_VERSION
    assert list(RECORDED["cases"]) == [case.name for case in ALL_CASES]
    assert {allowance.case for allowance in ALLOWANCES} <= set(RECORDED["cases"])


def test_an_answer_that_differs_is_noticed() -> None:
    """The comparison itself: an answer unlike the recorded one does not pass for it, allowances or not."""
    case = next(case for case in CASES if case.name == "chat_plain")
    other = Answer(status=404, headers=(("date", "now"),), body=b"{}", events=None)
    assert any(line.startswith("status: real 200") for line in unexpected(case, RECORDED["cases"][case.name], observe(case, other)))

"""Every example runs by itself and has something to say."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from python_source import tree_of

import control_plane.examples

FOLDER = Path(control_plane.examples.__file__).parent
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "local"))
#: what each says when it has shown what it is there for
SAYS = {
    "demo_control_plane": ("cost_optimized", "least_response_time", ", 0 failed"),
    "example_admin_api": ("engine-0: draining", "'priority'", "'round_robin'", "request ask-me", "1 completed"),
    "example_affinity": ("affinity", "met up to 1 instances"),
    "example_anthropic_client": ("16 tokens", "streamed: "),
    "example_budgets": ("no deadline: l40s", "within 2 s: h100", "refused: cost_budget"),
    "example_cancel": ("0 wait", "works on 0", "(code cancelled)", "cancelled, engine at 0"),
    "example_custom_policy": ("started: greedy-0, modest-0",),
    "example_custom_router": ("premium -> engine-0: 3",),
    "example_embeddings": ("2 vectors", "no instance of it takes completion", "rerank over HTTP: 200"),
    "example_explain": ("r8: completed", "predicted", "a new request would go to"),
    "example_failover": ("30 of 30 completed", "a healthy, b healthy", "instance_down", "instance_recovered"),
    "example_http_client": ("one answer, from engine-", "why there: adaptive order", "404 The model"),
    "example_metrics": ("20 of 20 completed", "targets met", "control_plane_requests_total"),
    "example_multi_model": ("asked for llama-3-70b: llama-3-70b", "The model `gpt-42` does not exist"),
    "example_openai_client": ("tokens", "served by engine-", "model_not_found"),
    "example_parallelism": ("(8, 1, 2)", "the smallest that would: 8 GPUs", "GiB a GPU"),
    "example_pd_separation": ("10 words: decoding, went to decode", "3000 words: prefilling, went to prefill-1"),
    "example_policies": ("fifo            report   chat     alert    nightly  soon", "priority        alert"),
    "example_priorities_and_deadlines": ("critical-0: waited", "deadline_unreachable"),
    "example_streaming": ("finished by 'length'", "stream 7: 24 pieces"),
    "example_yaml_config": ("slo_aware, affinity, 2 instances: completed", "did you mean max_concurrent_requests?"),
}


def test_every_example_is_told_apart() -> None:
    assert sorted(SAYS) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    for variable in ("ENGINE_A", "ENGINE_B"):  # the YAML example sets them
        monkeypatch.setenv(variable, "")
    runpy.run_module(f"control_plane.examples.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    for words in SAYS[name]:
        assert words in printed, printed


@pytest.mark.parametrize("path", [FOLDER / f"{name}.py" for name in EXAMPLES] + [FOLDER.parent / "example.py"], ids=lambda path: path.stem)
def test_the_docstring_says_how_to_run_it(path: Path) -> None:
    told = ast.get_docstring(tree_of(path.read_text(encoding="utf-8"))) or ""
    module = "control_plane.example" if path.stem == "example" else f"control_plane.examples.{path.stem}"
    assert f"Run:  python -m {module}" in told


@pytest.mark.parametrize("command", [["-m", "control_plane.example"], [str(FOLDER.parent / "example.py")]], ids=["module", "file"])
def test_the_first_example_as_a_user_runs_it(command: list[str]) -> None:
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert ": completed" in ended.stdout
    assert "throughput:" in ended.stdout

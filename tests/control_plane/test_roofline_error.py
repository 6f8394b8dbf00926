"""The roofline against measured operator times: no further off than the docs say (on the excerpt that the project carries)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "roofline_error.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("roofline_error", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline_error"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, dict[str, float]]]:
    done = subprocess.run([sys.executable, SCRIPT, "--json", "-"], capture_output=True, text=True, timeout=60, check=True)
    told: dict[str, dict[str, dict[str, float]]] = json.loads(done.stdout)["errors"]
    return told


def test_a_layer_is_within_a_tenth_on_the_mean_for_every_model_tp_and_size(errors: dict[str, dict[str, dict[str, float]]]) -> None:
    for group in ("layer by model", "layer by TP", "layer by tokens"):
        for name, row in errors[group].items():
            assert row["mean"] < 0.12, (group, name)
            assert row["max"] < 0.40, (group, name)


def test_matrix_products_are_within_a_fifth_and_all_reduces_of_some_size_within_a_quarter(
    errors: dict[str, dict[str, dict[str, float]]],
) -> None:
    for name, row in errors["matrix products by tokens"].items():
        assert row["mean"] < 0.2, name
    for name, row in errors["all-reduce by bytes"].items():
        if int(name.split("-")[0]) > 1 << 20:
            assert row["mean"] < 0.27, name


def test_the_constants_are_near_what_the_excerpt_gives(script: Any) -> None:
    layers = script.balanced(script.layers_in(script.EXCERPT))
    ours = script.Constants()
    fitted, error = script.fit_layers(layers)
    assert fitted.compute == pytest.approx(ours.compute, rel=0.1)
    assert fitted.bandwidth == pytest.approx(ours.bandwidth, rel=0.1)
    assert fitted.layer_overhead_s == pytest.approx(ours.layer_overhead_s, rel=0.3)
    assert error < 0.08
    latency_s, share = script.fit_reduces([r for r in script.reduces_in(script.EXCERPT) if r.size_bytes > 1 << 20])
    assert 10e-6 < latency_s < 60e-6
    assert 0.5 < share < 0.8

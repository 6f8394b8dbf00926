"""Any bytes: the kept cases of earlier finds, and some seconds of new ones. ``make fuzz`` goes on for longer."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_targets
from fuzz_targets import SEEDS
from other_parsers import PEERS
from run import KEPT, changed

TARGETS = {**fuzz_targets.TARGETS, **PEERS}
#: inputs a target in every run of the tests
INPUTS = 1500


def run(target: str, inputs: list[bytes]) -> None:
    async def within() -> None:
        for data in inputs:
            TARGETS[target](data)

    asyncio.run(within())


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_and_kept_cases(target: str) -> None:
    run(target, SEEDS[target])
    for path in sorted((KEPT / target).glob("*")) if (KEPT / target).exists() else ():
        try:
            run(target, [path.read_bytes()])
        except Exception as error:
            raise AssertionError(f"{path.name} fails again") from error


@pytest.mark.parametrize("target", TARGETS)
def test_changed_seeds(target: str) -> None:
    rng = random.Random(1)
    run(target, [changed(rng.choice(SEEDS[target]), rng.choice(SEEDS[target]), rng) for _ in range(INPUTS)])


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes(target: str) -> None:
    @given(st.binary(max_size=200))
    @settings(max_examples=150)
    def one(data: bytes) -> None:
        run(target, [data])

    one()

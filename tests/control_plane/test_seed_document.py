"""Every Python block of the user's document runs as written, against live engines; only host and port are put in place."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from threaded_engines import threaded_engines

from control_plane import ControlPlaneManager, ExecutionInstance

SEED = Path(__file__).parents[2] / "docs" / "SEED.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", SEED.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
MODEL = "meta-llama/Llama-2-7b"

PRELUDE = """
import abc, asyncio, collections, dataclasses, typing
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Optional
from control_plane import *
"""


def block_name(code: str) -> str:
    for line in code.splitlines():
        text = line.strip("# =").strip()
        if text:
            return text[:40]
    return "empty"


def with_ports(code: str, ports: list[int]) -> str:
    """The seed's ports 8000 and 8001 on localhost, replaced by those of the engines."""
    for seed_port, port in zip((8000, 8001), ports, strict=True):
        code = code.replace(f"port={seed_port}", f"port={port}").replace(f'"port": {seed_port}', f'"port": {port}')
    return code.replace('"localhost"', '"127.0.0.1"')


def run_block(code: str, ports: list[int], names: dict[str, object] | None = None) -> dict[str, object]:
    """Executes a block in a module of its own; a block with top-level ``await`` is awaited on a fresh loop."""
    module = types.ModuleType("seed_block")
    space = module.__dict__
    exec(PRELUDE, space)
    space.update(names or {})
    compiled = compile(with_ports(code, ports), str(SEED), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if compiled.co_flags & inspect.CO_COROUTINE:
        raise AssertionError("a block with top-level await needs a loop: use run_flow")
    exec(compiled, space)
    return space


async def run_flow(code: str, ports: list[int]) -> dict[str, object]:
    """The flow block: with a started ``manager`` and ``available_instances``."""
    module = types.ModuleType("seed_flow")
    space = module.__dict__
    exec(PRELUDE, space)
    manager = ControlPlaneManager()
    for index, port in enumerate(ports):
        manager.register_instance(ExecutionInstance(instance_id=f"engine-{index}", host="127.0.0.1", port=port, model_name=MODEL))
    async with manager:
        space.update(manager=manager, available_instances=manager.get_instances())
        compiled = compile(code, str(SEED), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        await eval(compiled, space)
        space["final"] = await manager.result("req-123")
    return space


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    with threaded_engines(2, model_name=MODEL, speed=20.0) as found:
        yield found


def test_the_document_has_its_blocks() -> None:
    assert len(BLOCKS) >= 13


def test_flow_block(ports: list[int]) -> None:
    space = asyncio.run(run_flow(BLOCKS[0], ports))
    assert space["request_id"] == "req-123"
    assert space["result"]["choices"]  # type: ignore[index]
    assert space["phase"] in ("prefilling", "decoding")
    assert space["final"] == "completed"
    assert space["metrics"].total_requests == 1  # type: ignore[attr-defined]


def test_integration_block_returns_a_completed_status(ports: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    space = run_block(BLOCKS[1], ports)
    status = asyncio.run(space["integrate_with_sage_app"]())  # type: ignore[operator]
    assert status.state == "completed"
    assert isinstance(status.output, str)
    assert status.output
    assert "Throughput:" in capsys.readouterr().out


def test_service_block_prints_an_answer(ports: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    run_block(BLOCKS[2], ports)
    printed = capsys.readouterr().out
    assert re.search(r"^Output: +\S", printed, re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS[3:], ids=[block_name(code) for code in BLOCKS[3:]])
def test_sketches_and_configurations_execute(code: str, ports: list[int]) -> None:
    space = run_block(code, ports)
    assert len(space) > 20

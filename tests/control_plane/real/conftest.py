"""Two real vLLM servers for all tests of this folder, and the control plane over them: as a manager, a gateway, a process.

Left out by default; `make test-real` installs vLLM and runs them. A server that a test has killed is started again for the next.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from child_environment import child_environment
from process_guard import guard, release
from vllm_server import EMBEDDING, MODEL, VllmServer, eventually, instance_of

from control_plane import ControlPlaneManager, ExecutionInstance
from control_plane.fleet import HealthSettings
from control_plane.gateway import Gateway, GatewaySettings

SERVERS = pytest.StashKey[list[VllmServer]]()
#: quick to find out, and patient enough for two engines, their clients and the gateway on two cores
HEALTH = HealthSettings(
    probe_interval_s=0.5, probe_timeout_s=3.0, down_interval_s=0.5, down_interval_max_s=1.0, models_interval_s=1.0, lost_after_s=5.0
)

Pair = tuple[VllmServer, VllmServer]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows the end of the servers' logs."""
    report: Any = yield
    if report.failed:
        for server in item.config.stash.get(SERVERS, []):
            report.sections.append((f"end of {server.log}", server.log_tail()))
    return report


def _stop_all(servers: list[VllmServer]) -> None:
    for server in servers:
        server.thaw()
        server.kill()


@pytest.fixture(scope="session")
def started_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both servers, started side by side, each on a core of its own."""
    logs = tmp_path_factory.mktemp("vllm")
    pair = (VllmServer("first", 0, logs), VllmServer("second", 1 % (os.cpu_count() or 1), logs))
    request.config.stash.setdefault(SERVERS, []).extend(pair)
    try:
        _bring_up(pair)
        yield pair
    finally:
        _stop_all(list(pair))


def _bring_up(servers: tuple[VllmServer, ...]) -> None:
    for server in servers:
        server.launch()
    for server in servers:
        server.wait_ready()
        server.warm_up()


@pytest.fixture
def servers(started_pair: Pair) -> Pair:
    """Both servers, well and serving MODEL whatever the tests before have done to them."""
    for server in started_pair:
        if server.alive:
            server.thaw()
    ill = tuple(server for server in started_pair if server.model != MODEL or not server.is_ready())
    for server in ill:
        server.kill()
    _bring_up(ill)
    return started_pair


@pytest.fixture
def server(servers: Pair) -> VllmServer:
    return servers[0]


@pytest.fixture(scope="session")
def embedding_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """The same model, serving embeddings, rerank and score instead."""
    server = VllmServer("embedding", 1 % (os.cpu_count() or 1), tmp_path_factory.mktemp("vllm"), EMBEDDING)
    request.config.stash.setdefault(SERVERS, []).append(server)
    try:
        _bring_up((server,))
        yield server
    finally:
        _stop_all([server])


# ---- the control plane over them


MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
MakeGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def make_manager() -> AsyncIterator[MakeManager]:
    """``await make_manager(*instances, **options)``: started, and every instance is usable unless ``wait=False``."""
    async with AsyncExitStack() as stack:

        async def make(*instances: ExecutionInstance, wait: bool = True, **options: Any) -> ControlPlaneManager:
            manager = ControlPlaneManager(**{"health": HEALTH} | options)
            for instance in instances:
                manager.register_instance(instance)
            await manager.start()
            stack.push_async_callback(manager.stop, 0.0)
            if wait:
                await eventually(lambda: all(one.is_usable and one.engine.at_s for one in instances), 30.0)
            return manager

        yield make


@pytest.fixture
async def manager(make_manager: MakeManager, servers: Pair) -> ControlPlaneManager:
    """Over both servers, with the default strategies."""
    return await make_manager(*map(instance_of, servers))


@pytest.fixture
async def make_gateway() -> AsyncIterator[MakeGateway]:
    """``await make_gateway(manager)``: the gateway in this process, so that a test sees the manager behind it."""
    async with AsyncExitStack() as stack:

        async def make(manager: ControlPlaneManager) -> Gateway:
            gateway = Gateway(manager, GatewaySettings(access_log=False))
            await gateway.start("127.0.0.1", 0)
            stack.push_async_callback(gateway.stop, 0.0)
            return gateway

        yield make


@pytest.fixture(scope="session")
def serving(started_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`control-plane serve` over both servers, as a process of its own; yields its URL."""
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    environment = child_environment()
    command = [sys.executable, "-m", "control_plane.cli", "serve", "--port", "0", "--health.down-interval-max-s", "1"]
    for server in started_pair:
        command += ["--engine", server.url]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, process_group=0)
    guard(process.pid)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("listening on http://"), f"{said}{log.read_text()}"
        yield said.removeprefix("listening on ").strip()
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
            release(process.pid)
            process.stdout.close()


@pytest.fixture
def gateway_url(serving: str, servers: Pair) -> str:
    """The gateway process, with both servers in service."""
    limit_s = time.monotonic() + 30.0
    while not _is_ready(serving, len(servers)):
        assert time.monotonic() < limit_s, "the gateway did not find both servers"
        time.sleep(0.1)
    return serving


def _is_ready(url: str, usable: int) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return b'"usable_instances":%d' % usable in answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        return False

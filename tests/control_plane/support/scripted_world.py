"""A manager over scripted engines: everything above the network, at the pace of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from scripted_engine import ScriptedCall, ScriptedEngine

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata, RequestStatusInfo
from control_plane.fleet import HealthSettings

MODEL = "m"


class World:
    """A manager, and the scripted engines that it made for its instances."""

    def __init__(self, names: str = "ab", *, answer: bool = False, **options: object) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.on_start: Callable[[ScriptedCall], None] | None = ScriptedCall.answer if answer else None
        given = {"seed": 3, "health": HealthSettings(probe_interval_s=30.0), **options}
        self.manager = ControlPlaneManager(engine_factory=self._make, **given)  # type: ignore[arg-type]
        for name in names:
            self.add(name)

    def _make(self, instance: ExecutionInstance) -> ScriptedEngine:
        engine = self.engines[instance.instance_id] = ScriptedEngine(instance, self.on_start)
        return engine

    def add(self, name: str, **fields: object) -> ExecutionInstance:
        instance = ExecutionInstance(**{"instance_id": name, "model_name": MODEL, **fields})  # type: ignore[arg-type]
        self.manager.register_instance(instance)
        return instance

    def open_on(self, name: str) -> list[ScriptedCall]:
        return self.engines[name].open if name in self.engines else []

    @property
    def open(self) -> list[ScriptedCall]:
        return [call for engine in self.engines.values() for call in engine.open]

    async def submit(self, request_id: str, **fields: object) -> str:
        content = {} if {"prompt", "messages", "input"} & set(fields) else {"prompt": "x"}
        return await self.manager.submit_request(RequestMetadata(request_id=request_id, **{**content, **fields}))  # type: ignore[arg-type]

    async def status(self, request_id: str) -> RequestStatusInfo:
        return await self.manager.get_request_status(request_id)

    async def state(self, request_id: str) -> str:
        return (await self.status(request_id)).state


Make = Callable[..., World]
"""``make(...)``, the fixture: a World that is stopped when its test is over."""


async def until(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Waits for ``holds()`` to be true."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


def ids(calls: list[ScriptedCall]) -> list[str]:
    return [call.request.request_id for call in calls]


def stream(world: World, name: str, prompt: str = "x", **fields: object) -> asyncio.Task[None]:
    """A streamed request, read to its end."""

    async def read() -> None:
        async for _ in world.manager.stream(RequestMetadata(request_id=name, prompt=prompt, **fields)):  # type: ignore[arg-type]
            pass

    return asyncio.get_running_loop().create_task(read())

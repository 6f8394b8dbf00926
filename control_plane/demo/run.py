"""How the demo goes: engines up, gateway up, load on, one engine killed and brought back, tables."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from dataclasses import replace

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from control_plane.clock import Clock
from control_plane.demo.engines import SimulatedEngine
from control_plane.demo.load import CLASSES, Load
from control_plane.demo.report import Kill, by_class, by_instance, cost_of_failure, one_decision
from control_plane.fleet import HealthSettings
from control_plane.gateway import Gateway, GatewaySettings
from control_plane.gateway.metrics_page import make_exporter
from control_plane.manager import ControlPlaneManager
from control_plane.terminal import console
from control_plane.transport import ClientLimits, HttpClient
from control_plane.types import ExecutionInstance

MODEL = "demo-llama3-8b"
PROFILE = "h100-llama3-8b"
ENGINES = 3
#: requests an engine takes at once: so few that the load makes a queue, and its order shows, on any laptop
CONCURRENCY = 8
RATE_RPS = 20.0
#: shares of the duration at which one engine is killed and brought back
KILL_AT, BACK_AT = 0.4, 0.7


def run_demo(*, duration_s: float, seed: int, keep: bool, port: int) -> int:
    """Run it and print the tables. 0: every request had an answer or a stated reason; raises ControlPlaneError when it cannot run."""
    logging.getLogger("control_plane").addHandler(logging.NullHandler())  # the tables tell the story; logs would cut through it
    logging.getLogger("control_plane").propagate = False
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_until_signal(_Demo(console(), duration_s, seed).run(keep, port), keep))


async def _until_signal(running: Coroutine[None, None, int], keep: bool) -> int:
    """SIGTERM and SIGINT end it in good order: no engine is left behind. That is how ``--keep`` ends well; else it is a failure."""
    task = asyncio.create_task(running)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return 0 if keep else 1


class _Demo:
    def __init__(self, out: Console, duration_s: float, seed: int) -> None:
        self._out = out
        self._duration_s = duration_s
        self._seed = seed
        self._engines = [SimulatedEngine(f"engine-{letter}", MODEL, PROFILE, seed + index) for index, letter in enumerate("abc"[:ENGINES])]

    async def run(self, keep: bool, port: int) -> int:
        self._say(f"starting {ENGINES} simulated vLLM engines ({PROFILE}: answers and times are simulated, everything else is real)")
        manager = ControlPlaneManager(seed=self._seed, health=HealthSettings(probe_interval_s=0.5))
        gateway = Gateway(manager, GatewaySettings(access_log=False), metrics=make_exporter(manager).render)
        try:
            await asyncio.gather(*(engine.start() for engine in self._engines))
            for engine in self._engines:
                manager.register_instance(
                    ExecutionInstance(
                        instance_id=engine.name, url=engine.url, model_name=MODEL, profile=PROFILE, max_concurrent_requests=CONCURRENCY
                    )
                )
            await manager.start()
            await gateway.start("127.0.0.1", port)
            self._say(f"gateway listening on {gateway.url}")
            await self._load(manager, gateway.url)
            self._next_steps(gateway.url, keep)
            if keep:
                await asyncio.Event().wait()
        finally:
            await gateway.stop(0.0)
            await manager.stop(0.0)
            await asyncio.gather(*(engine.stop() for engine in self._engines))
        return 0

    async def _load(self, manager: ControlPlaneManager, url: str) -> None:
        client = HttpClient(url, limits=ClientLimits(first_byte_timeout_s=None, chunk_timeout_s=60.0))
        load = Load(client, manager.clock, MODEL, rate_rps=RATE_RPS, duration_s=self._duration_s, seed=self._seed)
        mix = ", ".join(f"{one.share:.0%} {one.name} ({one.priority})" for one in CLASSES)
        self._say(
            f"sending {RATE_RPS:g} chat requests/s for {self._duration_s:g} s: {mix}; {CONCURRENCY} at once per engine, the rest queues"
        )
        killing = asyncio.create_task(self._kill_one(manager.clock))
        progress = asyncio.create_task(self._show_progress(load, manager))
        try:
            await load.run()
            kill = await killing
        finally:
            for task in (killing, progress):
                task.cancel()
            await asyncio.gather(killing, progress, return_exceptions=True)
            await client.close()
        self._report(load, kill, manager.metrics.retried)

    async def _kill_one(self, clock: Clock) -> Kill:
        victim = self._engines[1]
        await asyncio.sleep(self._duration_s * KILL_AT)
        kill = Kill(victim.name, victim.kill(), clock.now_s(), 0.0)
        self._say(f"killed {victim.name} (kill -9 {kill.pid})")
        await asyncio.sleep(self._duration_s * (BACK_AT - KILL_AT))
        await victim.stop()
        await victim.start()
        self._say(f"{victim.name} is back")
        return replace(kill, back_s=clock.now_s())

    async def _show_progress(self, load: Load, manager: ControlPlaneManager) -> None:
        if not self._out.is_terminal:
            return
        words = TextColumn("{task.description}")
        with Progress(words, BarColumn(), TimeElapsedColumn(), console=self._out, transient=True, refresh_per_second=4) as bar:
            shown = bar.add_task("", total=self._duration_s * RATE_RPS)
            while True:
                failed = sum(not one.completed for one in load.seen)
                queued, running = len(manager.pending_queue), len(manager.running_requests)
                text = f"{load.sent} sent, {queued} queued, {running} running, {len(load.seen) - failed} done, {failed} failed"
                bar.update(shown, completed=load.sent, description=text)
                await asyncio.sleep(0.25)

    def _report(self, load: Load, kill: Kill, retried: int) -> None:
        out = self._out
        out.print()
        out.print(by_class(load.seen, self._duration_s))
        out.print(by_instance(load.seen))
        for line in one_decision(load.seen):
            self._say(line)
        out.print("\nWhat the failure cost", style="bold")
        for line in cost_of_failure(load.seen, kill, retried):
            self._say(f"- {line}")

    def _next_steps(self, url: str, keep: bool) -> None:
        body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 20}}'
        self._out.print("\nTry next", style="bold")
        if not keep:
            self._say("control-plane demo --keep --port 8080     (this, and it goes on serving)")
            url = "http://127.0.0.1:8080"
        self._say(f"curl -i {url}/v1/chat/completions -H 'content-type: application/json' -H 'x-explain: 1' -d '{body}'")
        self._say(f"control-plane top --url {url}")
        self._say("control-plane serve --engine http://YOUR-VLLM:8000     (the same over your own engines)")

    def _say(self, text: str) -> None:
        self._out.print(text, markup=False, soft_wrap=True)  # a command that is cut into lines cannot be copied

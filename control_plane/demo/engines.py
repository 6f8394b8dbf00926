"""The demo's engines: processes of ``control-plane sim-engine``, to be started, killed by their process id, and started again."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process

from control_plane.errors import ControlPlaneError

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0


class SimulatedEngine:
    """One simulated vLLM server in a process of its own."""

    def __init__(self, name: str, model: str, profile: str, seed: int) -> None:
        self.name = name
        self.port = 0
        self._options = ("--model", model, "--profile", profile, "--seed", str(seed))
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Begin to serve, on the port it had before if it had one. Raises ControlPlaneError when it does not come up."""
        command = (sys.executable, "-m", "control_plane.cli", "sim-engine", "--port", str(self.port), *self._options)
        self._process = process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while line := (await process.stdout.readline()).decode():
                    if "listening on http://" in line:
                        self.port = int(line.rsplit(":", 1)[1])
                        return
        except TimeoutError:
            pass
        await self.stop()
        raise ControlPlaneError(f"the simulated engine {self.name} did not come up: {await self._last_words(process)}")

    def kill(self) -> int:
        """SIGKILL, as a crash would; returns the process id it had."""
        if self._process is None:
            return 0
        self._process.kill()
        return self._process.pid

    async def stop(self) -> None:
        """End it, politely first. May repeat, and after a kill."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _last_words(self, process: Process) -> str:
        assert process.stderr is not None
        return (await process.stderr.read()).decode("utf-8", "replace").strip()[-500:] or "it said nothing"

"""A real vLLM server as a test needs it: started, awaited, killed, stopped like a hung process, started again on the same port."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from process_guard import guard, release

from control_plane import ExecutionInstance

SERVE = Path(__file__).parents[3] / "scripts" / "real_vllm" / "serve.sh"
MODEL = "tiny"
#: few sequences at once, so that a small load already makes requests wait inside the engine
GENERATING = ("--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-num-seqs", "8")
EMBEDDING = ("--runner", "pooling", "--convert", "embed")
#: a cold start on a busy machine; a warm one takes 15 to 30 s
START_LIMIT_S = 240.0


class VllmServer:
    """One server on one CPU core, in a process group of its own. Its output goes to ``log`` and outlives restarts.

    ``core``: with data-parallel ranks one for each, such as ``0|1``.
    ``others_core``: what is not the model's own work (HTTP, scheduling) keeps to that core; None: to any.
    """

    def __init__(
        self, label: str, core: int | str, log_dir: Path, flags: tuple[str, ...] = GENERATING, *, others_core: int | None = None
    ) -> None:
        self.label = label
        self.model = MODEL
        self.core = core
        self.flags = flags
        self._pinned = [] if others_core is None else ["taskset", "-c", str(others_core)]
        self.log = log_dir / f"vllm_{label}.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    # ---- life

    def launch(self, model: str = MODEL) -> None:
        """Begin to start; :meth:`wait_ready` waits for it."""
        self.model = model
        command = [*self._pinned, str(SERVE), model, str(self.port), str(self.core), *self.flags]
        with self.log.open("ab") as out:
            # a group, not a session, of its own: Linux shares the cores out by session first, and vLLM's engine spins on `sched_yield`,
            # so that in another session the tests' own process would wait for seconds
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, process_group=0)
        guard(self._process.pid)

    def wait_ready(self) -> None:
        """Until it answers ``/health``. Raises RuntimeError with the end of its log when it ends, or takes too long."""
        limit_s = time.monotonic() + START_LIMIT_S
        while not self.is_ready():
            if not self.alive or time.monotonic() > limit_s:
                raise RuntimeError(f"vLLM {self.label} did not come up:\n{self.log_tail()}")
            time.sleep(0.25)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def group(self) -> int:
        """Its process group; 0 before it was launched."""
        return self._process.pid if self._process is not None else 0

    def warm_up(self) -> None:
        """The first requests compile and allocate; sampling with a seed takes seconds the first time on a machine."""
        if self.flags is EMBEDDING:
            self.ask("/v1/embeddings", {"model": self.model, "input": "warm"})
            return
        body = {"model": self.model, "prompt": "warm", "max_tokens": 4, "ignore_eos": True}
        self.ask("/v1/completions", body)
        self.ask("/v1/completions", body | {"n": 2, "seed": 1, "temperature": 1})

    def terminate(self) -> None:
        """SIGTERM to the server alone, as a supervisor would."""
        if self._process is not None:
            self._process.terminate()

    def wait_gone(self) -> None:
        """Until the server's process has ended; what is left of its group is killed."""
        if self._process is not None:
            self._process.wait(60)
            self.kill()

    @contextmanager
    def up(self) -> Iterator[None]:
        """Launched and warm inside, killed after it."""
        self.launch()
        try:
            self.wait_ready()
            self.warm_up()
            yield
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group: the engine is a process of its own and outlives the server."""
        if self._process is not None:
            self.signal_group(signal.SIGKILL)
            self._process.wait(30)
            release(self._process.pid)

    def freeze(self) -> None:
        """SIGSTOP to the group: the port accepts and nothing answers."""
        self.signal_group(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal_group(signal.SIGCONT)

    def signal_group(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of its output, without the requests that it logs."""
        if not self.log.exists():
            return "(no log)"
        said = [line for line in self.log.read_text(errors="replace").splitlines() if not line.startswith("INFO:     127.0.0.1:")]
        return "\n".join(said[-lines:])

    # ---- questions

    def ask(self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        """One JSON request straight to the server."""
        sent = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), sent)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def gauge(self, name: str) -> float:
        """The sum of one ``vllm:`` series over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def running(self) -> int:
        """Requests that the engine works on, or keeps waiting."""
        return int(self.gauge("num_requests_running") + self.gauge("num_requests_waiting"))

    def answered(self) -> int:
        """Requests that it has finished, since its start."""
        return int(self.gauge("request_success_total"))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def instance_of(server: VllmServer, **fields: Any) -> ExecutionInstance:
    """Known by its address alone: model, kinds and limits are to be asked from the server."""
    return ExecutionInstance(**{"instance_id": server.label, "url": server.url} | fields)


async def eventually(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until ``true()`` is; fails after ``seconds``."""
    limit_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit_s, "it did not come true in time"
        await asyncio.sleep(0.05)


async def working(count: int, *servers: VllmServer, seconds: float = 10.0) -> None:
    """Wait until the engines themselves say that they work on ``count`` requests in all; fails after ``seconds``."""
    limit_s = time.monotonic() + seconds
    while (now := [await asyncio.to_thread(one.running) for one in servers]) and sum(now) != count:
        assert time.monotonic() < limit_s, f"the engines work on {now}, not on {count} requests"
        await asyncio.sleep(0.05)


async def idle(*servers: VllmServer, seconds: float = 10.0) -> None:
    """Wait until the engines work on nothing; fails after ``seconds``."""
    await working(0, *servers, seconds=seconds)

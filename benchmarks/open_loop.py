"""An open-loop client: every request is sent at its planned time, whatever became of those before it.

A request's latency counts from its planned time, so that a server that holds the client up is not spared (no coordinated omission); how
late the client itself sent is told beside it. One process, one event loop, a connection for each request under way.

As a program it is told what to do by a line of JSON (a :class:`Load`, the router's port, and where the outcome goes) and says
``measuring`` and ``measured`` around the judged time; ``benchmarks/peers.py`` runs it so.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import uvloop

from control_plane.errors import InstanceFailed
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.outcome import COMPLETED, FAILED, LIVE, REJECTED, UNSENT, Outcomes
from control_plane.simulator.resample import at_rate
from control_plane.simulator.run import BEGIN_S
from control_plane.simulator.scenario import Scenario
from control_plane.simulator.slo import SloClass, parse_slo
from control_plane.simulator.texts import prompt_text
from control_plane.simulator.workload import TraceRequest
from control_plane.transport import ClientLimits, HttpClient

#: what every request allows; how long its answer is stands in its structured output, which no router reads
MOST_OUTPUT_TOKENS: Final = 16_384
#: kept of an answer's end: its last event, with the usage
_TAIL_BYTES: Final = 4096
_USAGE: Final = re.compile(rb'"usage":\{"prompt_tokens":(\d+),"total_tokens":\d+,"completion_tokens":(\d+)')
_CACHED: Final = re.compile(rb'"cached_tokens":(\d+)')
#: a request that is not over so many real seconds after the last one was sent has failed
PATIENCE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, the same to every arm. Seconds of ``warmup_s``, ``duration_s``, ``tail_s`` and the targets in ``slo`` are model
    seconds; the engines, and so the client, run ``speed`` of them in a real one."""

    trace: str
    fleet: str
    rate_rps: float
    warmup_s: float
    duration_s: float
    tail_s: float
    slo: str
    seed: int = 0
    speed: float = 1.0
    jitter: float = 0.02

    def at(self, rate_rps: float) -> Load:
        return replace(self, rate_rps=rate_rps)

    def base(self) -> Scenario:
        """All that the trace has and the fleet can hold, at its own rate."""
        fleet = parse_fleet(self.fleet)
        workload = workload_of(self.trace, seed=self.seed)
        # an open loop: a turn comes when the trace says, not so long after the answer before it
        fitting = [replace(one, think_s=None) for one in workload.requests if one.prompt_tokens + one.output_tokens <= fleet.context_tokens]
        workload = workload.with_requests(fitting, workload.duration_s)
        return Scenario(fleet, workload, parse_slo(self.slo), seed=self.seed, jitter=self.jitter)

    def scenario(self) -> Scenario:
        """What is sent, as the simulator takes it."""
        base = self.base()
        length_s = self.warmup_s + self.duration_s + self.tail_s
        workload = at_rate(base.workload, self.rate_rps, length_s, Random(f"arrivals {self.seed} {self.rate_rps!r}"))
        return replace(base, workload=workload, warmup_s=self.warmup_s, duration_s=self.duration_s)


def classes_of(scenario: Scenario) -> list[SloClass]:
    """Of each request; the simulator draws the same."""
    return scenario.slo.assign(scenario.workload.requests, Random(f"classes {scenario.seed}"))


@dataclass(slots=True)
class Planned:
    """One request: real seconds after the start, its headers as they stand in a head, its body."""

    due_s: float
    lines: bytes
    body: bytes


def planned(load: Load, scenario: Scenario, model: str) -> list[Planned]:
    """Everything that will be sent, made beforehand."""
    requests, block_tokens = scenario.workload.requests, scenario.workload.block_tokens
    encode = msgspec.json.Encoder().encode
    most_tokens = min(MOST_OUTPUT_TOKENS, scenario.fleet.context_tokens)
    made = []
    for row, (request, slo) in enumerate(zip(requests, classes_of(scenario), strict=True)):
        text, answer = texts_of(request, block_tokens, row)
        body: dict[str, Any] = {"model": model, "prompt": text, "max_tokens": most_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if answer:
            body["structured_outputs"] = {"choice": [answer]}
        else:
            body["max_tokens"] = 1
        made.append(Planned(request.arrival_s / load.speed, head_lines(row, request, slo, load.speed), encode(body)))
    return made


def texts_of(request: TraceRequest, block_tokens: int, row: int) -> tuple[str, str]:
    """The prompt, and the answer that its structured output asks for; blanks count the tokens of both. The answer ends with one token
    without a text, and is what its session's next prompt goes on with where the blocks say so."""
    whole = replace(request, prompt_tokens=request.prompt_tokens + request.output_tokens)
    # what has no blocks gets a text of its own by its row
    text = prompt_text(whole, block_tokens=block_tokens, count_tokens=_blanks, nonce=row)
    split = 5 * request.prompt_tokens
    return text[:split], text[split:-5]


def _blanks(text: str) -> int:
    return text.count(" ")


def head_lines(row: int, request: TraceRequest, slo: SloClass, speed: float) -> bytes:
    """Who asks and by when, as our gateway reads them; session ids are read by other routers, too."""
    lines = {"content-type": "application/json", "x-request-id": f"r{row}"}
    if request.session_id:
        lines["x-session-id"] = request.session_id
    if request.tenant:
        lines["x-user-id"] = request.tenant
    priority = slo.priority.name.lower() if request.priority == "normal" else request.priority
    if priority != "normal":
        lines["x-priority"] = priority
    for name, value in (("x-slo-ttft-ms", slo.ttft_ms), ("x-slo-tpot-ms", slo.tpot_ms), ("x-slo-deadline-ms", slo.e2e_ms)):
        if value is not None:
            lines[name] = f"{value / speed:.3f}"
    return "".join([f"{name}: {value}\r\n" for name, value in lines.items()]).encode()


class OpenLoop:
    """One run against one port. All times of ``outcomes`` are model seconds, from ``BEGIN_S`` on, as a simulation's."""

    def __init__(
        self,
        load: Load,
        scenario: Scenario,
        plan: Sequence[Planned],
        port: int,
        engines: Sequence[int] = (),
        told: Callable[[str], None] = print,
    ) -> None:
        """``engines``: their ports, in the order of the scenario's fleet; where a router tells which one answered, it is kept."""
        self.outcomes = Outcomes(len(plan))
        self.late_ms = array("d")
        self.codes: dict[str, int] = {}
        self.numbers = {b"127.0.0.1:%d" % engine: number for number, engine in enumerate(engines)}
        self._speed = load.speed
        self._plan = plan
        self._told = told
        self._scenario = scenario
        self._client = HttpClient(
            f"http://127.0.0.1:{port}",
            limits=ClientLimits(connect_timeout_s=10.0, chunk_timeout_s=None, max_idle=4096, keepalive_s=2.0),
        )
        self._at = 0
        self._live = 0
        self._awaited = 0
        self._window_s = (load.warmup_s / load.speed, (load.warmup_s + load.duration_s) / load.speed)

    async def run(self) -> None:
        """Until the judged requests have ended, or patience has."""
        self._loop = loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._start_s = loop.time() + 0.2
        loop.call_at(self._start_s + self._window_s[0], self._told, "measuring")
        loop.call_at(self._start_s + self._window_s[1], self._window_over)
        loop.call_at(self._start_s + self._plan[0].due_s, self._feed)
        await self._done
        for row in range(len(self._plan)):
            if self.outcomes.state[row] == LIVE:
                self.outcomes.state[row] = FAILED if self._judged(row) else UNSENT
                if self._judged(row):
                    self.codes["no end"] = self.codes.get("no end", 0) + 1
        await self._client.close()

    def model_s(self, at_s: float) -> float:
        return BEGIN_S + (at_s - self._start_s) * self._speed

    def _judged(self, row: int) -> bool:
        return self._window_s[0] <= self._plan[row].due_s < self._window_s[1]

    def _feed(self) -> None:
        """Send all that is due, and come back for the next."""
        if self._done.done():
            return
        plan, loop, start_s = self._plan, self._loop, self._start_s
        while self._at < len(plan):
            row = self._at
            due_s = start_s + plan[row].due_s
            now_s = loop.time()
            if due_s > now_s:
                loop.call_at(due_s, self._feed)
                return
            self._at += 1
            self.late_ms.append((now_s - due_s) * 1000.0)
            self._send(row)
        loop.call_later(PATIENCE_S, self._end)
        self._check_done()

    def _send(self, row: int) -> None:
        request, outcomes = self._scenario.workload.requests[row], self.outcomes
        outcomes.arrival_s[row] = BEGIN_S + request.arrival_s
        outcomes.prompt_tokens[row] = request.prompt_tokens
        outcomes.state[row] = LIVE
        self._live += 1
        self._awaited += self._judged(row)
        one = self._plan[row]
        self._client.send("POST", "/v1/completions", (), one.body, _Answer(self, row), lines=one.lines)
        one.body = b""

    def ended(self, row: int, state: int, code: str = "") -> None:
        """Of a request's answer; those that are cut off at the end of the run are not heard."""
        if self._done.done():
            return
        self.outcomes.end_s[row] = self.model_s(self._loop.time())
        self.outcomes.state[row] = state
        if code:
            self.codes[code] = self.codes.get(code, 0) + 1
        self._live -= 1
        self._awaited -= self._judged(row)
        self._check_done()

    def _window_over(self) -> None:
        self._told("measured")
        self._check_done()

    def _check_done(self) -> None:
        window_over = self._loop.time() >= self._start_s + self._window_s[1]
        if window_over and not self._awaited:
            self._end()

    def _end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


class _Answer:
    """Receives one answer: when its first token came, when it ended, and what its usage says."""

    __slots__ = ("_first", "_row", "_run", "_status", "_tail")

    def __init__(self, run: OpenLoop, row: int) -> None:
        self._run = run
        self._row = row
        self._status = 0
        self._first = False
        self._tail = b""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        for name, value in headers:
            if name == b"x-instance-id":
                self._run.outcomes.instance[self._row] = self._run.numbers.get(value, -1)

    def on_body(self, data: bytes) -> None:
        if not self._first and b'"choices":[{' in data:
            self._first = True
            run = self._run
            run.outcomes.first_s[self._row] = run.model_s(run._loop.time())
        self._tail = data if len(data) >= _TAIL_BYTES else (self._tail + data)[-_TAIL_BYTES:]

    def on_complete(self) -> None:
        run, row, tail = self._run, self._row, self._tail
        if self._status != 200:
            run.ended(row, REJECTED if self._status in (429, 503) else FAILED, f"status {self._status}")
            return
        usage, cached = _USAGE.search(tail), _CACHED.search(tail)
        if usage is None or not self._first or b"data: [DONE]" not in tail:
            run.ended(row, FAILED, "cut off")
            return
        run.outcomes.prompt_tokens[row] = int(usage[1])
        run.outcomes.output_tokens[row] = int(usage[2])
        run.outcomes.cached_tokens[row] = int(cached[1]) if cached else 0
        run.ended(row, COMPLETED)

    def on_error(self, error: InstanceFailed) -> None:
        self._run.ended(self._row, FAILED, "connection")


def outcome_document(run: OpenLoop) -> dict[str, Any]:
    """What the run gave, as JSON has it."""
    columns = {name: list(getattr(run.outcomes, name)) for name in Outcomes.__slots__}
    return {"columns": columns, "late_ms": list(run.late_ms), "codes": run.codes}


def outcomes_from(document: dict[str, Any]) -> Outcomes:
    """The columns of :func:`outcome_document`."""
    columns = document["columns"]
    outcomes = Outcomes(len(columns["state"]))
    for name, values in columns.items():
        column = getattr(outcomes, name)
        column[:] = array(column.typecode, values)
    return outcomes


def told_as_json(load: Load, port: int, model: str, engines: Sequence[int], out: Path) -> str:
    """The line that the program reads."""
    return json.dumps({"load": asdict(load), "port": port, "model": model, "engines": engines, "out": str(out)})


def main() -> None:
    given = json.loads(sys.stdin.readline())
    load = Load(**given["load"])
    scenario = load.scenario()
    plan = planned(load, scenario, given["model"])
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would make requests late, and what is made here has no cycles

    def told(line: str) -> None:
        print(line, flush=True)

    run = OpenLoop(load, scenario, plan, given["port"], given["engines"], told)
    told("ready")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run.run())
    Path(given["out"]).write_bytes(msgspec.json.encode(outcome_document(run)))
    told("done")


if __name__ == "__main__":
    main()

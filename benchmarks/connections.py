"""Many connections: what idle ones cost and disturb, and how many new ones a second are served.

    python benchmarks/connections.py [--idle 10000] [--rate 1000] [--seconds 10]

Starts a gateway over one simulated engine, each a process of its own. First asks it alone; then beside ``--idle`` open connections that
say nothing; then with ``--rate`` new connections a second, each of which sends one request for the list of models and closes.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND = (sys.executable, "-m", "control_plane.cli")
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":2}'
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


def start(*arguments: str) -> tuple[subprocess.Popen[str], str, int]:
    """A process of ours, its host and port once it listens."""
    process = subprocess.Popen((*COMMAND, *arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
    assert found is not None
    return process, found[1], int(found[2])


def resident_kb(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


async def asked(port: int, seconds: float) -> list[float]:
    """Milliseconds of chat requests one after the other, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        writer.write(CHAT)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert head.startswith(b"HTTP/1.1 200"), head
        assert length is not None
        await reader.readexactly(int(length[1]))
        times.append((time.perf_counter() - began) * 1e3)
        await asyncio.sleep(0.005)
    writer.close()
    return times


async def one_visit(port: int) -> tuple[bool, float]:
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(MODELS)
        answer = await reader.read()
        writer.close()
    except OSError:
        return False, 0.0
    return answer.startswith(b"HTTP/1.1 200"), (time.perf_counter() - began) * 1e3


async def visits(port: int, rate: int, seconds: float) -> tuple[list[tuple[bool, float]], float]:
    """``rate`` visits begun a second, whether those before have ended or not; the seconds that it took."""
    began = time.perf_counter()
    tasks = []
    for number in range(int(rate * seconds)):
        wait_s = began + number / rate - time.perf_counter()
        if wait_s > 0.002:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(one_visit(port)))
    return list(await asyncio.gather(*tasks)), time.perf_counter() - began


def told(name: str, times: list[float]) -> None:
    times = sorted(times)
    print(f"{name}: {len(times):,} answers, median {statistics.median(times):.1f} ms, 99th {times[int(len(times) * 0.99)]:.1f} ms")


async def measure(pid: int, port: int, options: argparse.Namespace) -> None:
    told("alone", await asked(port, 3.0))
    before_kb = resident_kb(pid)
    began = time.perf_counter()
    idle = []
    for at in range(0, options.idle, 500):
        idle += await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(min(500, options.idle - at))))
    took_s = time.perf_counter() - began
    told(f"beside {len(idle):,} idle connections (opened in {took_s:.1f} s)", await asked(port, 5.0))
    print(f"memory: {before_kb / 1e3:.0f} MB before, {(resident_kb(pid) - before_kb) * 1e3 / len(idle):,.0f} bytes an idle connection")
    cut = sum(reader.at_eof() for reader, _ in idle)
    for _, writer in idle:
        writer.close()
    print(f"cut off by the gateway: {cut}")
    await asyncio.sleep(0.5)
    beside, (came, took_s) = await asyncio.gather(asked(port, options.seconds), visits(port, options.rate, options.seconds))
    good = [ms for fine, ms in came if fine]
    told(f"beside {len(came) / took_s:,.0f} connects a second", beside)
    told(f"those connects ({len(came) - len(good)} failed)", good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--rate", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.idle + 1_000 > most:
        print(f"only {most} file descriptors are allowed: raise the limit (ulimit -n) or ask for fewer with --idle", file=sys.stderr)
        return 1
    processes = []
    try:
        engine, _, engine_port = start("sim-engine", "--port", "0", "--model", "m", "--speed", "100")
        processes.append(engine)
        gateway, _, port = start("serve", "--port", "0", "--engine", f"http://127.0.0.1:{engine_port}", "--no-access-log")
        processes.append(gateway)
        asyncio.run(measure(gateway.pid, port, options))
    finally:
        for process in processes:
            process.terminate()
            process.wait(10)
    return 0


if __name__ == "__main__":
    sys.exit(main())

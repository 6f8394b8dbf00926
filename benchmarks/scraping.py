"""What one scrape of an engine costs the control plane: CPU microseconds to read a page, and beside it the client library's parser.

``python benchmarks/scraping.py`` builds the pages of simulated engines (vLLM's own series, help texts and buckets): one engine and eight
data-parallel ranks, each read by a reader that knows nothing and by one that has read the page before. A fleet of FLEET instances scraped
every INTERVAL_S seconds is what the last column is reckoned for. Last, scrapes over a socket: the CPU time of this process for asking,
receiving and reading, the engine being a process of its own.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from control_plane.clock import SystemClock
from control_plane.engines import OpenAICompatibleEngine
from control_plane.fleet.scraper import PageReader
from control_plane.sim_engine import SimEngine
from control_plane.types import ExecutionInstance

FLEET = 2000
INTERVAL_S = 2.0
#: each figure is the best of so many rounds of so many reads
ROUNDS, READS = 7, 200


def cpu_us(call: Callable[[], object], reads: int = READS) -> float:
    best_s = float("inf")
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(reads):
            call()
        best_s = min(best_s, (time.process_time() - began_s) / reads)
    return 1e6 * best_s


async def socket_us(url: str) -> float:
    """CPU microseconds of this process for one scrape."""
    engine, reader = OpenAICompatibleEngine(ExecutionInstance(instance_id="a", url=url), SystemClock()), PageReader()

    async def scrape() -> None:
        _, page = await engine.get("/metrics", 5.0)
        reader.read(page)

    best_s = float("inf")
    try:
        await scrape()
        for _ in range(ROUNDS):
            began_s = time.process_time()
            for _ in range(READS):
                await scrape()
            best_s = min(best_s, (time.process_time() - began_s) / READS)
    finally:
        await engine.close()
    return 1e6 * best_s


def over_socket() -> None:
    command = [sys.executable, "-m", "control_plane.cli", "sim-engine", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        us = asyncio.run(socket_us(url))
        print(f"{'1 rank(s), over a socket':<28}{'':>8}{'asked and read':>22}{us:>10.1f}{us * FLEET / INTERVAL_S / 1e6:>25.1%}")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    print(f"{'page':<28}{'bytes':>8}{'how':>22}{'CPU us':>10}{f'share of a core at {FLEET}':>26}")
    for ranks in (1, 8):
        engine = SimEngine(data_parallel_size=ranks)
        for rank in engine.ranks:
            rank.metrics.step(0.02, 16, 512, 1)  # an engine that has not run tells less
        page = engine.metrics_page()
        known = PageReader()
        known.read(page)
        text = page.decode()
        measured = (
            ("first look", cpu_us(lambda page=page: PageReader().read(page))),  # type: ignore[misc]
            ("each further look", cpu_us(lambda known=known, page=page: known.read(page))),  # type: ignore[misc]
            ("prometheus_client", cpu_us(lambda text=text: list(text_string_to_metric_families(text)), 5)),  # type: ignore[misc]
        )
        for how, us in measured:
            print(f"{f'{ranks} rank(s)':<28}{len(page):>8}{how:>22}{us:>10.1f}{us * FLEET / INTERVAL_S / 1e6:>25.1%}")
    over_socket()


if __name__ == "__main__":
    main()

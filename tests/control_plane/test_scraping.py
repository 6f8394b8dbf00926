"""What scrapes do to an instance: others' load, saturation, restarts, and what a page leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from control_plane.clock import ManualClock
from control_plane.errors import InstanceFailed
from control_plane.fleet import Fleet, HealthSettings
from control_plane.fleet.scraper import parse_metrics
from control_plane.fleet.series import find
from control_plane.prediction import LatencyPredictor
from control_plane.sim_engine import SimEngine
from control_plane.sim_engine.metrics import DIALECTS
from control_plane.types import ExecutionInstance


class Server:
    """An Engine that serves a metrics page of its own making: gauges and counters by rank."""

    def __init__(self, instance: ExecutionInstance) -> None:
        self.instance = instance
        self.ranks: list[dict[str, float]] = [{}]
        self.started_at: float | None = 1000.0
        self.gone = False
        self.broken = False
        #: series that the page tells, of ranks that have run only
        self.once_run: tuple[str, ...] = ()

    def tell(self, rank: int = 0, **figures: float) -> None:
        while len(self.ranks) <= rank:
            self.ranks.append({})
        self.ranks[rank].update(figures)

    def page(self) -> bytes:
        names = {
            "running": "num_requests_running",
            "waiting": "num_requests_waiting",
            "usage": "kv_cache_usage_perc",
            "preemptions": "num_preemptions_total",
            "tokens": "prompt_tokens_total",
        }
        lines = [f"process_start_time_seconds {self.started_at}"] if self.started_at else []
        for key, name in names.items():
            ranks = [(rank, told) for rank, told in enumerate(self.ranks) if told.get("tokens") or key not in self.once_run]
            lines += [f'vllm:{name}{{engine="{rank}"}} {told.get(key, 0.0)}' for rank, told in ranks]
        return "\n".join(lines).encode() + b"\n"

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        if path == "/metrics":
            if self.gone:
                raise InstanceFailed("no answer", timed_out=True)
            if self.broken:
                return 500, b"Internal Server Error"
            return 200, self.page()
        if path == "/version":
            return 200, b'{"version":"0.32.0"}'
        if path == "/v1/models":
            return 200, b'{"data":[{"id":"m"}]}'
        return 200, b""

    async def close(self) -> None: ...


class House:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.events: list[str] = []
        self.servers: dict[str, Server] = {}
        self.fleet = Fleet(clock, LatencyPredictor(), self, self.make, HealthSettings())  # type: ignore[arg-type]
        self.instance = ExecutionInstance(instance_id="a", model_name="m")
        self.fleet.add(self.instance)
        self.fleet.engine("a")
        self.server = self.servers["a"]
        self.forgotten: list[str] = []
        self.fleet.on_forget = lambda instance: self.forgotten.append(instance.instance_id)

    def make(self, instance: ExecutionInstance) -> Server:
        return self.servers.setdefault(instance.instance_id, Server(instance))

    def event(self, name: str, message: str, **fields: Any) -> None:
        self.events.append(name)

    async def look(self, times: int = 1, **figures: float) -> None:
        self.server.tell(**figures)
        for _ in range(times):
            self.clock.advance(2.0)
            await self.fleet.check(self.instance, self.server)  # type: ignore[arg-type]

    def send(self, count: int) -> None:
        for _ in range(count):
            self.fleet.placed(self.instance, 1.0)


@pytest.fixture
def house(clock: ManualClock) -> House:
    return House(clock)


class TestOthers:
    async def test_what_two_scrapes_have_beyond_ours_is_others(self, house: House) -> None:
        house.send(10)
        await house.look(running=12, waiting=5)
        assert house.instance.others_requests == 0
        await house.look(running=14)
        assert house.instance.others_requests == 7

    async def test_what_was_ours_a_moment_ago_is_not(self, house: House) -> None:
        house.send(10)
        await house.look(running=10)
        for _ in range(8):
            house.fleet.released(house.instance, 1.0)
        await house.look(running=9)
        assert house.instance.others_requests == 0
        await house.look(running=2)
        assert house.instance.others_requests == 0

    async def test_a_server_that_we_have_just_met_may_be_busy_already(self, house: House) -> None:
        await house.look(running=20, waiting=3)
        assert house.instance.others_requests == 23

    async def test_it_fades_while_nothing_more_is_told(self, house: House) -> None:
        await house.look(running=20)
        house.server.gone = True
        await house.look(times=2)
        assert house.instance.others_requests == 20
        await house.look()
        assert house.instance.others_requests == pytest.approx(10)
        await house.look(times=50)
        assert house.instance.others_requests < 1e-6
        assert house.instance.is_usable


class TestSaturation:
    async def test_requests_kept_waiting(self, house: House) -> None:
        await house.look(running=64, waiting=40)
        assert house.instance.saturation == 0.0
        await house.look()
        assert (house.instance.saturation, house.instance.engine.pressed_by) == (1.0, "waiting")
        await house.look(waiting=4)
        assert house.instance.saturation == 0.5
        await house.look(waiting=0)
        assert house.instance.saturation == 0.0

    async def test_preemptions_that_rise(self, house: House) -> None:
        await house.look(preemptions=500)
        assert house.instance.saturation == 0.0
        await house.look(preemptions=501)
        assert (house.instance.saturation, house.instance.engine.pressed_by) == (1.0, "preemptions")
        await house.look()
        assert house.instance.saturation == 0.5
        await house.look(times=8)
        assert house.instance.saturation == 0.0

    async def test_a_full_kv_cache(self, house: House) -> None:
        await house.look(usage=0.95)
        assert house.instance.saturation == pytest.approx(0.5)

    async def test_it_never_stops_dispatch_and_fades(self, house: House) -> None:
        await house.look(usage=1.0)
        assert house.instance.can_accept_request
        house.server.gone = True
        await house.look(times=3)
        assert house.instance.saturation == pytest.approx(0.5)


class TestRestarts:
    async def test_of_one_rank(self, house: House) -> None:
        house.server.tell(1, tokens=700, running=3)
        await house.look(tokens=400, running=2)
        assert [one.instance_id for one in house.fleet.instances()] == ["a@0", "a@1"]
        house.server.started_at = None  # as where several processes serve one address
        await house.look(tokens=500)
        house.server.tell(1, tokens=900)
        await house.look(tokens=600)
        house.server.tell(1, tokens=20)
        await house.look(tokens=4000)
        assert house.forgotten == ["a@1"]
        assert house.events.count("instance_restarted") == 1
        assert house.fleet.get("a@0").engine.running == 2  # type: ignore[union-attr]

    async def test_of_the_server(self, house: House) -> None:
        house.server.tell(1)
        await house.look()
        house.server.started_at = 2000.0
        await house.look()
        assert sorted(house.forgotten) == ["a", "a@0", "a@1"]

    async def test_a_page_that_is_broken_for_a_moment_changes_nothing(self, house: House) -> None:
        house.server.tell(1, running=4)
        await house.look(times=2, running=3)  # a rank has figures from the look after the one that finds it
        house.server.broken = True
        await house.look(times=2)
        assert [one.engine.running for one in house.fleet.instances()] == [3, 4]
        assert house.events.count("engine_metrics_missing") == 1

    async def test_ranks_that_are_no_more_are_one_target_again(self, house: House) -> None:
        house.server.tell(1)
        await house.look()
        del house.server.ranks[1]
        await house.look()
        assert list(house.fleet.instances()) == [house.instance]
        assert house.events.count("data_parallel_ranks") == 2


class TestGaugesThatWereNeverSet:
    """A server of several processes, as vLLM with ranks: no start time, and no gauge of an engine that has not run yet."""

    @pytest.fixture(autouse=True)
    def several_processes(self, house: House) -> None:
        house.server.started_at = None
        house.server.once_run = ("running", "waiting", "usage")

    async def test_ranks_that_have_not_run_are_targets_all_the_same(self, house: House) -> None:
        house.server.tell(1)
        await house.look(times=2)
        assert [one.instance_id for one in house.fleet.instances()] == ["a@0", "a@1"]
        assert all(one.engine.at_s for one in house.fleet.instances())

    async def test_one_rank_alone_tells_its_own(self, house: House) -> None:
        house.server.tell(1, tokens=10, running=3, waiting=1, usage=0.5)
        await house.look(times=2)
        told = [(one.engine.running, one.engine.waiting, one.engine.kv_cache_usage) for one in house.fleet.instances()]
        assert told == [(0, 0, 0.0), (3, 1, 0.5)]
        server = house.instance.engine
        assert (server.running, server.waiting, server.kv_cache_usage) == (3, 1, 0.25)

    async def test_an_engine_alone_is_idle_until_it_tells(self, house: House) -> None:
        await house.look()
        assert house.instance.engine.at_s
        await house.look(tokens=10, running=3)
        assert house.instance.engine.running == 3
        assert "engine_metrics_missing" in house.events  # of its blocks
        assert not any(name.endswith(("running", "waiting", "usage_perc")) for name in parse_metrics(house.server.page()).missing)


def test_gauges_that_an_engine_with_work_behind_it_does_not_tell_are_missing() -> None:
    scrape = parse_metrics(b'vllm:prompt_tokens_total{engine="0"} 7.0\n')
    assert scrape.running is None
    assert "vllm:num_requests_running" in scrape.missing


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_simulated_engines_page_is_read_by_any_name(dialect: str, ranks: int) -> None:
    engine = SimEngine(data_parallel_size=ranks, metrics_dialect=dialect)
    scrape = parse_metrics(engine.metrics_page())
    assert (scrape.running, scrape.waiting, scrape.kv_cache_usage, scrape.preemptions) == (0, 0, 0.0, 0)
    assert (scrape.prompt_tokens, scrape.generation_tokens, scrape.prefix_cache_hits) == (0, 0, 0)
    assert sorted(scrape.ranks) == (list(range(ranks)) if ranks > 1 else [])
    assert scrape.missing == (("vllm:cache_config_info",) if dialect == "sglang" else ())


def test_sglangs_pool_is_counted_in_tokens() -> None:
    scrape = parse_metrics(b'sglang:max_total_num_tokens{model_name="m"} 161721.0\nsglang:num_running_reqs{dp_rank="1"} 4.0\n')
    assert (scrape.kv_block_size_tokens, scrape.kv_block_count, scrape.running) == (1, 161721, 4)


def test_a_rank_alone_behind_its_address_is_no_fleet_of_ranks() -> None:
    page = b'vllm:num_requests_running{engine="3"} 4.0\nvllm:num_requests_waiting{engine="3"} 1.0\n'
    assert parse_metrics(page).ranks == {}
    assert find(page, b"vllm:num_requests_running") == 0

"""Probes, what servers tell of themselves, restarts, warm-up and recovery, against an engine that does as the test says.

Most tests probe by hand (``fleet.check``) in time that stands still; those of the loop run it at intervals of milliseconds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from control_plane.clock import ManualClock, SystemClock
from control_plane.errors import ControlPlaneError, EngineError, InstanceFailed
from control_plane.fleet import Fleet, HealthSettings
from control_plane.job import LaneKey
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import EngineOutcome, Sink, WireRequest
from control_plane.types import ExecutionInstance, Leg, RequestKind, RequestMetadata

CHAT = LaneKey("m", RequestKind.CHAT)
GENERATES = {"/v1/chat/completions", "/v1/completions"}
SICK = EngineError(500, b"boom")
SLOW = InstanceFailed("no byte within 60 s", timed_out=True)
REFUSED = InstanceFailed("connection refused", connected=False)


class Events(list[tuple[str, str, dict[str, Any]]]):
    def event(self, name: str, message: str, **fields: Any) -> None:
        self.append((name, message, fields))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self]


class ScriptedEngine:
    """An Engine in memory: what its server would answer stands in its attributes."""

    def __init__(self, instance: ExecutionInstance) -> None:
        self.instance = instance
        self.refuses = False
        self.hangs = False
        self.health = 200
        self.models: list[dict[str, Any]] | None = [{"id": "m", "max_model_len": 4096}]
        self.paths = set(GENERATES)
        self.tells_metrics = True
        self.started_at = 1_795_000_000.0
        self.running = self.waiting = self.tokens = 0
        self.prefix_caching = True
        self.warmup_error: ControlPlaneError | None = None
        self.gets: Counter[str] = Counter()
        self.requests: list[WireRequest] = []
        self.held: list[Sink] = []
        self.holds_warmup = False
        self.closed = False

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        self.gets[path] += 1
        await asyncio.sleep(0)
        if self.refuses:
            raise InstanceFailed("connection refused", connected=False)
        if self.hangs:
            raise InstanceFailed("no answer in time", timed_out=True)
        return self.answer(path)

    def answer(self, path: str) -> tuple[int, bytes]:
        if path == "/health":
            return self.health, b""
        if path == "/version":
            return 200, b'{"version":"0.32.0"}'
        if path == "/v1/models" and self.models is not None:
            return 200, msgspec.json.encode({"object": "list", "data": self.models})
        if path == "/metrics" and self.tells_metrics:
            return 200, self.page().encode()
        return (405 if path in self.paths else 404), b'{"detail":"no"}'

    def page(self) -> str:
        gauges = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "kv_cache_usage_perc": 0.25,
            "prefix_cache_queries_total": self.tokens,
            "prefix_cache_hits_total": 0,
            "num_preemptions_total": 0,
            "prompt_tokens_total": self.tokens,
            "generation_tokens_total": self.tokens,
        }
        lines = [f'vllm:{name}{{engine="0",model_name="m"}} {value}.0' for name, value in gauges.items() if value != 0.25]
        lines.append('vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25')
        config = f'block_size="16",enable_prefix_caching="{self.prefix_caching}",num_gpu_blocks="2048"'
        lines += [f"vllm:cache_config_info{{{config}}} 1.0", f"process_start_time_seconds {self.started_at}"]
        return "\n".join(lines) + "\n"

    def restart(self) -> None:
        self.started_at += 100.0
        self.tokens = self.running = self.waiting = 0

    def start(self, leg: Leg, wire: WireRequest, sink: Sink, request: RequestMetadata) -> ScriptedEngine:
        self.requests.append(wire)
        if self.holds_warmup:
            self.held.append(sink)
        elif self.warmup_error is not None:
            sink.failed(self.warmup_error)
        else:
            sink.started(200, (), self)
            sink.finished(EngineOutcome())
        return self

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cancel(self) -> None: ...

    async def close(self) -> None:
        self.closed = True


class House:
    """A fleet over scripted engines, by hand."""

    def __init__(self, clock: ManualClock, *instances: ExecutionInstance, **settings: Any) -> None:
        self.clock = clock
        self.events = Events()
        self.engines: dict[str, ScriptedEngine] = {}
        self.fleet = Fleet(clock, LatencyPredictor(), self.events, self.make, HealthSettings(**settings))
        self.changed: list[str] = []
        self.hung: list[str] = []
        self.fleet.on_change = lambda instance: self.changed.append(instance.instance_id)
        self.fleet.on_hung = lambda instance: self.hung.append(instance.instance_id)
        for instance in instances or (ExecutionInstance(instance_id="a", model_name="m"),):
            self.fleet.add(instance)
            self.fleet.engine(instance.instance_id)
        self.instance = self.fleet.instances()[0]
        self.engine = self.engines[self.instance.instance_id]

    def make(self, instance: ExecutionInstance) -> ScriptedEngine:
        return self.engines.setdefault(instance.instance_id, ScriptedEngine(instance))

    async def probe(self, after_s: float = 2.0, instance_id: str = "") -> bool:
        self.clock.advance(after_s)
        instance = self.fleet.get(instance_id) or self.instance
        return await self.fleet.check(instance, self.fleet.engine(instance.instance_id))

    @property
    def state(self) -> str:
        return str(self.instance.health_status)

    @property
    def serves(self) -> bool:
        return self.instance in self.fleet.eligible(CHAT)


@pytest.fixture
def house(clock: ManualClock) -> House:
    return House(clock)


class TestLearning:
    async def test_the_first_contact_tells_all(self, house: House) -> None:
        assert await house.probe()
        engine = house.instance.engine
        assert (engine.version, engine.max_model_len_tokens, engine.simulated) == ("0.32.0", 4096, False)
        assert (engine.kv_block_size_tokens, engine.kv_block_count, engine.prefix_caching) == (16, 2048, True)
        assert (engine.running, engine.waiting, engine.kv_cache_usage, engine.at_s) == (0, 0, 0.25, house.clock.now_s())
        assert house.instance.supported_request_types == {"chat", "completion"}
        assert house.events.names == ["instance_up"]

    async def test_an_embedding_server_takes_no_chat(self, house: House) -> None:
        house.engine.paths = {"/v1/embeddings", "/v1/score", "/v1/rerank"}
        await house.probe()
        assert house.instance.supported_request_types == {"embedding", "score", "rerank"}
        assert not house.serves
        assert house.fleet.eligible(LaneKey("m", RequestKind.EMBEDDING)) == [house.instance]

    async def test_a_server_that_does_not_tell_its_kinds_is_tried_for_all(self, house: House) -> None:
        house.engine.paths = set()
        await house.probe()
        assert house.instance.supported_request_types is None
        assert house.serves

    async def test_a_server_that_wants_a_key_for_everything_does_not_tell_its_kinds(self, house: House) -> None:
        answer = house.engine.answer
        house.engine.answer = lambda path: (401, b"") if path.startswith("/v1/c") else answer(path)  # type: ignore[method-assign]
        house.engine.paths = {"/v1/embeddings"}
        await house.probe()
        assert house.instance.supported_request_types is None

    async def test_kinds_given_by_the_owner_stay(self, house: House) -> None:
        house.instance.supported_request_types = {"embedding"}
        await house.probe()
        house.engine.restart()
        await house.probe()
        assert house.instance.supported_request_types == {"embedding"}

    async def test_an_unnamed_instance_takes_its_servers_name_and_aliases(self, clock: ManualClock) -> None:
        house = House(clock, ExecutionInstance(instance_id="a"))
        house.engine.models = [{"id": "lora", "parent": "m"}, {"id": "m"}, {"id": "alias"}]
        assert house.state == "starting"
        assert not house.fleet.knows("m")
        assert await house.probe()
        assert (house.state, house.instance.model_name) == ("healthy", "m")
        assert house.instance.served_models == ["m", "alias", "lora"]
        assert house.serves
        assert house.fleet.knows("lora")
        assert "a" in house.changed

    async def test_a_server_that_serves_nothing_yet_is_said_once_and_asked_again(self, clock: ManualClock) -> None:
        house = House(clock, ExecutionInstance(instance_id="a"))
        house.engine.models = []
        assert not await house.probe()
        assert not await house.probe(1.0)
        assert house.state == "starting"
        assert house.events.names == ["nothing_served"]
        house.engine.models = [{"id": "m"}]
        assert await house.probe(1.0)
        assert house.serves

    async def test_a_configured_name_is_believed_where_models_are_not_told(self, house: House) -> None:
        house.engine.models = None
        assert await house.probe()
        assert house.serves
        assert "models_unreadable" in house.events.names

    async def test_configured_names_that_are_not_served_are_said(self, house: House) -> None:
        house.instance.served_models = ["m", "dream"]
        await house.probe()
        assert house.events.names.count("models_differ") == 1
        assert not house.fleet.knows("dream")

    async def test_prefix_caching_off_and_missing_metrics_are_said_once(self, house: House) -> None:
        house.engine.prefix_caching = False
        for _ in range(3):
            await house.probe()
        assert house.events.names.count("prefix_caching_off") == 1
        house.engine.tells_metrics = False
        for _ in range(3):
            await house.probe()
        assert house.events.names.count("engine_metrics_missing") == 1
        assert house.serves

    async def test_a_page_without_metrics_is_looked_at_rarely(self, house: House) -> None:
        house.engine.tells_metrics = False
        for _ in range(10):
            await house.probe()
        assert house.engine.gets["/metrics"] == 1
        house.engine.tells_metrics = True
        for _ in range(10):
            await house.probe()
        assert house.instance.engine.kv_block_count == 2048

    async def test_without_monitoring_health_is_asked_and_metrics_are_not(self, clock: ManualClock) -> None:
        house = House(clock, monitoring=False)
        assert await house.probe()
        assert house.engine.gets["/health"] == 1
        assert house.engine.gets["/metrics"] == 0

    async def test_a_full_engine_teaches_its_cap_and_a_restart_forgets_it(self, house: House) -> None:
        await house.probe()
        house.engine.running, house.engine.waiting = 16, 30
        house.instance.active_requests = 46
        for _ in range(3):
            await house.probe()
        assert house.instance.learned_concurrency == 20
        assert not house.fleet.has_room(house.instance)
        assert house.events.names.count("concurrency_learned") == 1
        house.changed.clear()
        house.engine.running, house.engine.waiting = 20, 0
        await house.probe()
        assert house.instance.learned_concurrency == 30
        assert house.changed == ["a"]
        house.engine.restart()
        await house.probe()
        assert house.instance.learned_concurrency is None
        assert house.changed == ["a", "a"]


class TestDownAndUp:
    async def test_down_at_start_is_said_and_it_is_used_once_it_comes(self, house: House) -> None:
        house.engine.refuses = True
        assert house.serves
        assert not await house.probe()
        assert not house.serves
        assert house.fleet.knows("m")
        await house.probe()
        assert house.events.names == ["instance_down"]
        house.engine.refuses = False
        assert await house.probe()
        assert house.serves
        assert house.events.names == ["instance_down", "instance_recovered"]
        assert house.changed[-1] == "a"

    async def test_a_server_that_says_it_cannot_serve_is_down(self, house: House) -> None:
        house.engine.health = 503
        assert not await house.probe()
        assert house.state == "unhealthy"
        assert house.fleet.eligible(CHAT) == []

    async def test_a_hung_engine_is_down_and_its_requests_are_given_up(self, house: House) -> None:
        house.engine.hangs = True
        assert not await house.probe()
        await house.probe()
        assert house.state == "unhealthy"
        assert house.hung == ["a"]

    async def test_one_that_closed_its_port_may_finish_for_a_while_and_no_longer(self, house: House) -> None:
        """vLLM that was told to stop may close its port and leave what runs there without an answer for ever."""
        house.engine.refuses = True
        await house.probe()
        await house.probe(after_s=29.0)
        assert house.hung == []
        await house.probe()
        assert house.hung == ["a"]
        house.engine.refuses = False
        assert await house.probe()
        house.engine.refuses = True
        await house.probe(after_s=60.0)
        assert house.hung == ["a"]

    async def test_one_that_answers_requests_meanwhile_is_not_hung(self, house: House) -> None:
        house.engine.hangs = True
        get = house.engine.get

        async def busy(path: str, timeout_s: float) -> tuple[int, bytes]:
            house.clock.advance(timeout_s)
            house.fleet.record_success(house.instance)
            return await get(path, timeout_s)

        house.engine.get = busy  # type: ignore[method-assign]
        await house.probe()
        assert house.state == "healthy"

    async def test_a_good_probe_brings_back_what_its_owner_called_unhealthy(self, clock: ManualClock) -> None:
        house = House(clock, ExecutionInstance(instance_id="a", model_name="m", is_healthy=False))
        assert not house.serves
        await house.probe()
        assert house.serves

    async def test_drained_it_stays_drained_whatever_probes_say(self, house: House) -> None:
        house.fleet.drain("a")
        assert await house.probe()
        assert house.state == "draining"
        house.engine.refuses = True
        await house.probe()
        assert house.state == "draining"
        house.engine.refuses = False
        await house.probe()
        house.fleet.undrain("a")
        assert house.serves

    async def test_a_stranger_is_asked_and_nothing_is_kept(self, house: House) -> None:
        stranger = ExecutionInstance(instance_id="b")
        engine = ScriptedEngine(stranger)
        assert await house.fleet.check(stranger, engine)
        engine.refuses = True
        assert not await house.fleet.check(stranger, engine)
        assert stranger.is_usable


class TestRestarts:
    async def test_a_restart_between_two_probes_is_noticed(self, house: House) -> None:
        await house.probe()
        house.engine.paths = {"/v1/embeddings"}
        house.engine.restart()
        await house.probe()
        assert house.events.names == ["instance_up", "instance_restarted"]
        assert house.instance.supported_request_types == {"embedding"}

    async def test_only_a_restart_and_leaving_are_told_as_forgetting(self, house: House) -> None:
        forgotten: list[str] = []
        house.fleet.on_forget = lambda instance: forgotten.append(instance.instance_id)
        for _ in range(5):
            await house.probe()
        assert forgotten == []
        house.engine.restart()
        await house.probe()
        assert forgotten == ["a"]
        house.fleet.remove("a")
        assert forgotten == ["a", "a"]

    async def test_falling_counters_show_it_where_no_start_time_is_told(self, house: House) -> None:
        page = house.engine.page
        house.engine.page = lambda: page().split("process_start")[0]  # type: ignore[method-assign]
        house.engine.tokens = 500
        await house.probe()
        house.engine.tokens = 10
        await house.probe()
        assert "instance_restarted" in house.events.names

    async def test_another_model_after_a_restart(self, house: House) -> None:
        await house.probe()
        house.engine.models = [{"id": "other"}]
        house.engine.restart()
        assert not await house.probe()
        assert house.state == "wrong_model"
        assert not house.serves
        assert house.fleet.knows("m")
        assert not house.fleet.knows("other")
        name, message, fields = house.events[-1]
        assert (name, fields["served"]) == ("wrong_model", ["other"])
        assert "other" in message

        house.engine.models = [{"id": "m"}]
        assert await house.probe(1.0)
        assert house.serves
        assert house.events.names[-1] == "instance_recovered"

    async def test_an_unnamed_instance_follows_its_server(self, clock: ManualClock) -> None:
        house = House(clock, ExecutionInstance(instance_id="a"))
        await house.probe()
        house.engine.models = [{"id": "other"}]
        house.engine.restart()
        assert await house.probe()
        assert house.instance.model_name == "other"
        assert not house.fleet.knows("m")
        assert "model_changed" in house.events.names
        assert house.fleet.eligible(LaneKey("other", RequestKind.CHAT)) == [house.instance]

    async def test_a_change_of_models_without_a_restart_is_seen_at_the_next_look(self, house: House) -> None:
        await house.probe()
        house.engine.models = [{"id": "m"}, {"id": "adapter", "parent": "m"}]
        await house.probe()
        assert not house.fleet.knows("adapter")
        await house.probe(10.0)
        assert house.fleet.knows("adapter")

    async def test_an_owner_may_rename_a_wrong_one(self, house: House) -> None:
        house.engine.models = [{"id": "other"}]
        await house.probe()
        house.instance.model_name = "other"
        assert await house.probe(1.0)
        assert house.fleet.eligible(LaneKey("other", RequestKind.CHAT)) == [house.instance]


class TestWarmup:
    @pytest.fixture
    def house(self, clock: ManualClock) -> House:
        return House(clock, ExecutionInstance(instance_id="a", model_name="m", warmup=True))

    async def test_before_traffic_and_again_after_a_restart(self, house: House) -> None:
        assert house.state == "starting"
        assert await house.probe()
        assert house.serves
        assert house.events.names == ["warmup_done", "instance_up"]
        (wire,) = house.engine.requests
        assert wire.path == "/v1/completions"
        assert msgspec.json.decode(wire.body) == {"model": "m", "prompt": "warm-up", "max_tokens": 1}
        await house.probe()
        assert len(house.engine.requests) == 1

        house.engine.restart()
        house.engine.holds_warmup = True
        probing = asyncio.create_task(house.probe())
        while not house.engine.held:
            await asyncio.sleep(0)
        assert house.state == "starting"
        assert not house.serves
        house.engine.held[0].finished(EngineOutcome())
        assert await probing
        assert house.serves

    async def test_again_when_it_was_away_and_does_not_tell_whether_it_restarted(self, house: House) -> None:
        house.engine.tells_metrics = False
        await house.probe()
        house.engine.refuses = True
        await house.probe()
        house.engine.refuses = False
        await house.probe()
        assert len(house.engine.requests) == 2

    async def test_not_again_when_only_the_way_there_was_cut(self, house: House) -> None:
        await house.probe()
        house.engine.refuses = True
        await house.probe()
        house.engine.refuses = False
        await house.probe()
        assert len(house.engine.requests) == 1
        assert house.serves

    async def test_an_embedding_server_is_warmed_by_an_embedding(self, house: House) -> None:
        house.engine.paths = {"/v1/embeddings"}
        await house.probe()
        assert [wire.path for wire in house.engine.requests] == ["/v1/embeddings"]

    async def test_failed_it_is_tried_again(self, house: House) -> None:
        house.engine.warmup_error = SICK
        assert not await house.probe()
        assert not await house.probe()
        assert house.state == "unhealthy"
        assert house.fleet.eligible(CHAT) == []
        assert house.events.names.count("warmup_failed") == 1
        house.engine.warmup_error = None
        assert await house.probe()
        assert house.serves

    async def test_a_refused_one_does_not_keep_the_server_out(self, house: House) -> None:
        house.engine.warmup_error = EngineError(400, b'{"message": "no such field"}')
        assert await house.probe()
        assert house.serves
        assert "warmup_failed" in house.events.names

    async def test_unanswered_it_has_failed(self, clock: ManualClock) -> None:
        house = House(clock, ExecutionInstance(instance_id="a", model_name="m", warmup=True), warmup_timeout_s=0.01)
        house.engine.holds_warmup = True
        assert not await house.probe()
        assert house.state == "unhealthy"


class TestEjections:
    async def eject(self, house: House) -> None:
        for _ in range(5):
            house.fleet.record_failure(house.instance, SICK)
        assert house.state == "unhealthy"

    @pytest.fixture
    def house(self, clock: ManualClock) -> House:
        return House(clock, *(ExecutionInstance(instance_id=name, port=port, model_name="m") for port, name in enumerate("ab")))

    async def test_it_lasts_its_time_then_one_request_tries(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        assert not await house.probe(4.0)
        assert not house.serves
        assert await house.probe(1.0)
        assert house.instance in house.fleet.with_room(CHAT)
        house.fleet.placed(house.instance, 1.0)
        assert not house.fleet.has_room(house.instance)
        assert house.instance not in house.fleet.with_room(CHAT)
        house.fleet.record_success(house.instance)
        house.fleet.released(house.instance, 1.0)
        for _ in range(50):
            assert house.fleet.has_room(house.instance)
            house.fleet.placed(house.instance, 1.0)

    async def test_a_trial_holds_nothing_back_where_there_is_nothing_better(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        await house.probe(5.0)
        other = house.fleet.get("b")
        assert other is not None
        house.fleet.placed(house.instance, 1.0)
        assert house.fleet.with_room(CHAT) == [other]
        other.health_status = "draining"
        assert house.fleet.with_room(CHAT) == [house.instance]

    async def test_it_is_not_tried_out_with_a_request_that_failed_before(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        await house.probe(5.0)
        third = ExecutionInstance(instance_id="c", port=7, model_name="m")
        house.fleet.add(third)
        assert house.instance in house.fleet.with_room(CHAT)
        assert house.fleet.with_room(CHAT._replace(avoid=frozenset("b"))) == [third]
        assert house.fleet.with_room(CHAT._replace(avoid=frozenset("bc"))) == [house.instance]

    async def test_a_failed_trial_ejects_for_longer_each_time(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        lasted: list[float] = []
        for _ in range(14):
            waited_s = 1.0
            while not await house.probe(1.0):
                waited_s += 1.0
            lasted.append(waited_s)
            house.fleet.record_failure(house.instance, SICK)
            assert house.state == "unhealthy"
        assert lasted == [5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0, 60.0, 60.0, 60.0]

    async def test_a_trial_cancelled_by_its_client_frees_its_place(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        await house.probe(5.0)
        house.fleet.placed(house.instance, 1.0)
        house.fleet.released(house.instance, 1.0)
        assert house.fleet.has_room(house.instance)

    async def test_after_a_long_good_time_it_begins_anew(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        await house.probe(5.0)
        house.fleet.record_success(house.instance)
        house.clock.advance(100.0)
        await self.eject(house)
        assert house.events[-1][2]["ejected_s"] == 5.0

    async def test_an_ejected_one_that_comes_to_serve_another_model(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        house.engine.models = [{"id": "other"}]
        house.engine.restart()
        await house.probe(5.0)
        assert house.state == "wrong_model"
        house.engine.models = [{"id": "m"}]
        assert await house.probe(1.0)
        for _ in range(50):
            assert house.fleet.has_room(house.instance), "its old ejection is forgotten, it needs no trial"
            house.fleet.placed(house.instance, 1.0)

    async def test_an_ejected_one_that_dies_comes_back_with_its_server(self, house: House) -> None:
        await house.probe()
        await self.eject(house)
        house.engine.refuses = True
        await house.probe(0.5)
        assert house.events[-1][2]["cause"] == "unreachable"
        house.engine.refuses = False
        house.engine.restart()
        assert await house.probe(0.5)
        assert house.serves


FAST = {"probe_interval_s": 0.01, "probe_timeout_s": 0.01, "down_interval_s": 0.005, "down_interval_max_s": 0.01, "scrape_interval_s": 0.01}


class Living(House):
    """A fleet whose loop runs, on the machine's clock."""

    def __init__(self, *instances: ExecutionInstance, **settings: Any) -> None:
        super().__init__(SystemClock(), *instances, **{**FAST, **settings})  # type: ignore[arg-type]


Begin = Callable[..., Living]


@pytest.fixture
async def begin() -> AsyncIterator[Begin]:
    houses: list[Living] = []

    def build(*instances: ExecutionInstance, **settings: Any) -> Living:
        houses.append(Living(*instances, **settings))
        return houses[-1]

    yield build
    for house in houses:
        await house.fleet.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.002)


class TestLoop:
    async def test_usable_right_after_start_then_down_then_up_again(self, begin: Begin) -> None:
        house = begin()
        house.fleet.start()
        house.fleet.start()
        assert house.serves
        await until(lambda: house.events.names)  # the whole first look, of which the models are the last
        house.engine.refuses = True
        await until(lambda: not house.serves)
        house.engine.refuses = False
        await until(lambda: house.serves)
        assert house.events.names == ["instance_up", "instance_down", "instance_recovered"]

    async def test_a_refusal_needs_no_second_probe(self, begin: Begin) -> None:
        house = begin(probe_misses=1_000_000)
        house.engine.refuses = True
        house.fleet.start()
        await until(lambda: house.state == "unhealthy")

    async def test_a_missed_probe_makes_it_second_choice_two_make_it_unhealthy(self, begin: Begin) -> None:
        house = begin(*(ExecutionInstance(instance_id=name, port=port, model_name="m") for port, name in enumerate("ab")))
        house.fleet.start()
        await until(lambda: all(instance.engine.version for instance in house.fleet.instances()))
        house.engine.hangs = True
        seen: set[str] = set()
        async with asyncio.timeout(5.0):
            while house.instance.is_healthy:  # type: ignore[truthy-bool]
                if not house.serves:
                    seen.add(house.state)
                await asyncio.sleep(0)
        assert seen == {"healthy"}
        assert house.hung == ["a"]
        assert [instance.instance_id for instance in house.fleet.eligible(CHAT)] == ["b"]

    async def test_instances_come_and_go_while_it_runs(self, begin: Begin) -> None:
        house = begin()
        house.fleet.start()
        late = ExecutionInstance(instance_id="late")
        house.fleet.add(late)
        await until(lambda: late.model_name == "m")
        house.fleet.remove("late")
        await asyncio.sleep(0.02)
        asked = house.engines["late"].gets["/health"]
        await asyncio.sleep(0.03)
        assert house.engines["late"].gets["/health"] == asked
        assert house.engines["late"].closed

    async def test_a_lost_connection_is_looked_into_at_once(self, begin: Begin) -> None:
        house = begin(probe_interval_s=30.0)
        house.fleet.start()
        await until(lambda: house.events.names == ["instance_up"])
        house.engine.refuses = True
        house.fleet.record_failure(house.instance, InstanceFailed("connection reset"))
        assert house.serves
        await until(lambda: not house.serves)
        house.engine.refuses = False
        await until(lambda: house.serves)

    @pytest.mark.parametrize(("refuses", "cause"), [(True, "unreachable"), (False, "errors")])
    async def test_lost_connections_are_said_once_as_what_they_are(self, begin: Begin, refuses: bool, cause: str) -> None:
        house = begin(probe_interval_s=30.0)
        house.fleet.start()
        await until(lambda: house.events.names == ["instance_up"])
        house.engine.refuses = refuses
        for _ in range(2):
            house.fleet.record_failure(house.instance, InstanceFailed("connection reset"))
        assert house.state == "unhealthy"
        await until(lambda: house.events.names[1:2] == ["instance_down"])
        await asyncio.sleep(0.02)
        ((_, _, fields),) = [event for event in house.events if event[0] == "instance_down"]
        assert fields["cause"] == cause

    async def test_a_refusal_that_was_a_moment_costs_a_moment(self, begin: Begin) -> None:
        house = begin(probe_interval_s=30.0)
        house.fleet.start()
        await until(lambda: house.events.names == ["instance_up"])
        house.fleet.record_failure(house.instance, REFUSED)
        assert not house.serves
        await until(lambda: house.serves)

    async def test_a_404_is_looked_into(self, begin: Begin) -> None:
        house = begin(probe_interval_s=0.05, models_interval_s=30.0)
        house.fleet.start()
        await until(lambda: house.events.names == ["instance_up"])
        house.engine.models = [{"id": "other"}]
        await asyncio.sleep(0.05)
        house.fleet.record_failure(house.instance, EngineError(404, b"{}"))
        await until(lambda: house.state == "wrong_model")

    async def test_an_engine_that_raises_anything_stays_watched(self, begin: Begin) -> None:
        house = begin()
        good = house.engine.answer

        def bad(path: str) -> tuple[int, bytes]:
            raise LookupError("a bug of the user's")

        house.engine.answer = bad  # type: ignore[method-assign]
        house.fleet.start()
        await until(lambda: house.state == "unhealthy")
        house.engine.answer = good  # type: ignore[method-assign]
        await until(lambda: house.serves)

    async def test_stopped_it_asks_nothing_and_starts_again(self, begin: Begin) -> None:
        house = begin()
        house.fleet.start()
        await until(lambda: house.engine.gets["/health"] > 2)
        await house.fleet.stop()
        await house.fleet.stop()
        assert house.engine.closed
        asked = house.engine.gets["/health"]
        await asyncio.sleep(0.03)
        assert house.engine.gets["/health"] == asked
        house.fleet.start()
        await until(lambda: house.engine.gets["/health"] > asked)

    def test_it_serves_one_event_loop_after_another(self) -> None:
        house = Living()

        async def session() -> None:
            house.fleet.start()
            asked = house.engine.gets["/health"]
            await until(lambda: house.engine.gets["/health"] > asked + 2)
            await house.fleet.stop()

        asyncio.run(session())
        asyncio.run(session())
        assert house.serves

"""The fleet without a network: who may serve what, what is in flight, and what failures of requests do to an instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from control_plane.clock import ManualClock
from control_plane.errors import ConfigurationError, EngineError, InstanceFailed, InstanceNotFound, InvalidRequest
from control_plane.fleet import Fleet, HealthSettings
from control_plane.fleet.concurrency import ConcurrencyLearner
from control_plane.job import LaneKey
from control_plane.prediction import LatencyPredictor
from control_plane.types import DecodingConfig, ExecutionInstance, HealthStatus, PrefillingConfig, RequestKind

CHAT = LaneKey("m", RequestKind.CHAT)
REFUSED = InstanceFailed("connection refused", connected=False)
BROKEN = InstanceFailed("connection closed in the middle")
SLOW = InstanceFailed("no byte within 60 s", timed_out=True)
SICK = EngineError(500, b'{"error": {"message": "boom"}}')
Make = Callable[..., Fleet]


class Events(list[tuple[str, str, dict[str, Any]]]):
    def event(self, name: str, message: str, **fields: Any) -> None:
        self.append((name, message, fields))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self]


class IdleEngine:
    """An Engine that nobody asks anything: it only knows whether it was closed."""

    closed = False

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def make(clock: ManualClock, events: Events) -> Make:
    def build(*instances: ExecutionInstance, **settings: Any) -> Fleet:
        fleet = Fleet(clock, LatencyPredictor(), events, lambda _: IdleEngine(), HealthSettings(**settings))  # type: ignore[arg-type,return-value]
        for instance in instances:
            fleet.add(instance)
        return fleet

    return build


def some(count: int, **fields: Any) -> list[ExecutionInstance]:
    return [ExecutionInstance(instance_id=f"i{k}", port=8000 + k, **{"model_name": "m", **fields}) for k in range(count)]


def ids(instances: list[ExecutionInstance]) -> list[str]:
    return [instance.instance_id for instance in instances]


class TestMembership:
    def test_by_id_and_in_order(self, make: Make) -> None:
        a, b = some(2)
        fleet = make(a, b)
        assert fleet.get("i1") is b
        assert fleet.get("nobody") is None
        assert list(fleet.instances()) == [a, b]

    def test_the_same_object_again_is_no_change_and_another_of_its_id_is_refused(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a, a)
        assert list(fleet.instances()) == [a]
        with pytest.raises(InvalidRequest, match="i0"):
            fleet.add(ExecutionInstance(instance_id="i0"))

    def test_what_is_removed_gets_nothing_and_is_unknown(self, make: Make) -> None:
        a, b = some(2)
        fleet = make(a, b)
        assert fleet.remove("i0") is a
        assert fleet.eligible(CHAT) == [b]
        with pytest.raises(InstanceNotFound):
            fleet.remove("i0")
        with pytest.raises(InstanceNotFound):
            fleet.engine("i0")

    async def test_a_removed_engine_closes_after_its_last_request(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        engine = fleet.engine("i0")
        fleet.placed(a, 5.0)
        fleet.remove("i0")
        await asyncio.sleep(0)
        assert not engine.closed  # type: ignore[attr-defined]
        fleet.released(a, 5.0)
        await asyncio.sleep(0)
        assert engine.closed  # type: ignore[attr-defined]

    async def test_an_idle_engine_closes_when_removed_and_all_when_stopped(self, make: Make) -> None:
        fleet = make(*some(2))
        first, second = fleet.engine("i0"), fleet.engine("i1")
        fleet.remove("i0")
        await asyncio.sleep(0)
        assert (first.closed, second.closed) == (True, False)  # type: ignore[attr-defined]
        await fleet.stop()
        assert second.closed  # type: ignore[attr-defined]
        assert fleet.engine("i1") is not second

    def test_the_dispatcher_hears_of_instances_that_come_and_go(self, make: Make) -> None:
        a, b = some(2)
        fleet = make()
        heard: list[ExecutionInstance] = []
        fleet.on_change = heard.append
        fleet.add(a)
        fleet.add(b)
        fleet.remove("i0")
        assert heard == [a, b, a]


class TestEligible:
    def test_model_names_and_aliases(self, make: Make) -> None:
        a, b = some(2)
        b.model_name, b.served_models = "other", ["other", "alias", "m"]
        fleet = make(a, b)
        assert fleet.eligible(CHAT) == [a, b]
        assert fleet.eligible(LaneKey("alias", RequestKind.CHAT)) == [b]
        assert fleet.eligible(LaneKey("nobody", RequestKind.CHAT)) == []
        assert fleet.knows("alias")
        assert not fleet.knows("nobody")
        assert sorted(fleet.models()) == ["alias", "m", "other"]

    @pytest.mark.parametrize("count", [3, 100])
    def test_what_the_owner_sets_counts_at_once(self, make: Make, clock: ManualClock, count: int) -> None:
        fleet = make(*some(count))
        first, second = fleet.instances()[:2]
        clock.advance(0.2)
        assert len(fleet.eligible(CHAT)) == count
        first.is_available = False
        second.health_status = "unhealthy"
        assert len(fleet.eligible(CHAT)) == count - 2
        first.is_available = True
        second.is_healthy = True
        assert len(fleet.eligible(CHAT)) == count
        first.model_name = "renamed"
        first.served_models = ["renamed"]
        clock.advance(0.2)
        assert fleet.eligible(LaneKey("renamed", RequestKind.CHAT)) == [first]
        assert len(fleet.eligible(CHAT)) == count - 1

    def test_an_alias_added_in_place_is_found(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        a.served_models.append("adapter")
        assert fleet.eligible(LaneKey("adapter", RequestKind.CHAT)) == [a]

    @pytest.mark.parametrize(
        ("fields", "kind", "fits"),
        [
            ({}, RequestKind.CHAT, True),
            ({}, RequestKind.EMBEDDING, True),
            ({"instance_type": "embedding"}, RequestKind.CHAT, False),
            ({"instance_type": "embedding"}, RequestKind.SCORE, True),
            ({"supported_request_types": {"chat", "completion"}}, RequestKind.CHAT, True),
            ({"supported_request_types": {"chat", "completion"}}, RequestKind.EMBEDDING, False),
            ({"supported_request_types": {"chat", "completion"}}, RequestKind.ANY, True),
            ({"supported_request_types": set()}, RequestKind.CHAT, False),
        ],
    )
    def test_only_to_those_that_can_do_the_kind(self, make: Make, fields: dict[str, Any], kind: RequestKind, fits: bool) -> None:
        fleet = make(*some(1, **fields))
        assert bool(fleet.eligible(LaneKey("m", kind))) is fits

    def test_pinned_and_avoided(self, make: Make) -> None:
        a, b, c = some(3)
        fleet = make(a, b, c)
        assert fleet.eligible(CHAT._replace(pinned="i1")) == [b]
        assert fleet.eligible(CHAT._replace(avoid=frozenset({"i0", "i2"}))) == [b]
        assert fleet.registered_for(CHAT._replace(avoid=frozenset({"i0"}))) == [b, c]
        b.is_healthy = False
        assert fleet.eligible(CHAT._replace(pinned="i1")) == []
        assert fleet.registered_for(CHAT._replace(pinned="i1")) == [], "what only its process held is not waited for"

    def test_what_is_kept_on_an_instance_is_asked_for_also_while_it_drains_or_is_full(self, make: Make) -> None:
        a, b = some(2, max_concurrent_requests=1)
        fleet = make(a, b)
        fleet.placed(b, 1.0)
        kept = LaneKey("m", RequestKind.ANY, "i1")
        assert fleet.with_room(kept) == [b]
        fleet.drain("i1")
        assert fleet.with_room(kept) == fleet.eligible(kept) == [b]
        assert fleet.eligible(kept._replace(kind=RequestKind.CHAT)) == [], "new work is not"

    def test_a_large_fleet_is_sampled_all_around(self, make: Make) -> None:
        instances = some(100)
        fleet = make(*instances)
        for instance in instances[::2]:
            instance.is_healthy = False
        seen: set[str] = set()
        for _ in range(50):
            sampled = ids(fleet.eligible(CHAT, limit=8))
            assert len(sampled) == len(set(sampled)) == 8
            seen.update(sampled)
        assert seen == {instance.instance_id for instance in instances[1::2]}

    def test_a_sample_finds_the_one_with_room(self, make: Make) -> None:
        instances = some(100, max_concurrent_requests=1)
        fleet = make(*instances)
        for instance in instances:
            if instance.instance_id != "i77":
                fleet.placed(instance, 1.0)
        assert ids(fleet.with_room(CHAT, limit=8)) == ["i77"]

    def test_an_instance_without_a_name_and_one_to_be_warmed_wait_for_their_server(self, make: Make) -> None:
        unnamed, cold = ExecutionInstance(instance_id="u"), ExecutionInstance(instance_id="c", model_name="m", warmup=True)
        fleet = make(unnamed, cold)
        assert (unnamed.health_status, cold.health_status) == ("starting", "starting")
        assert fleet.eligible(CHAT) == []
        assert fleet.knows("m")


class TestLastResort:
    """If all are bad, all are candidates that may still answer."""

    def test_ejected_ones_when_nothing_better_is_there(self, make: Make) -> None:
        a, b = some(2)
        fleet = make(a, b)
        for _ in range(5):
            fleet.record_failure(a, SICK)
        assert a.health_status == "unhealthy"
        assert fleet.eligible(CHAT) == [b]
        for _ in range(5):
            fleet.record_failure(b, SICK)
        assert fleet.eligible(CHAT) == fleet.with_room(CHAT) == [a, b]

    def test_not_while_a_healthy_one_is_merely_full_or_avoided(self, make: Make) -> None:
        a, b = some(2, max_concurrent_requests=1)
        fleet = make(a, b)
        for _ in range(5):
            fleet.record_failure(a, SICK)
        fleet.placed(b, 1.0)
        assert fleet.with_room(CHAT) == []
        assert fleet.eligible(CHAT._replace(avoid=frozenset({"i1"}))) == []


class TestSecondTry:
    def test_not_where_the_last_one_failed(self, make: Make) -> None:
        instances = a, b, c = some(3)
        fleet = make(*instances)
        fleet.record_failure(a, SICK)
        fleet.record_failure(b, BROKEN)
        assert fleet.with_room(CHAT) == [a, b, c], "one failure says little"
        assert fleet.with_room(CHAT._replace(avoid=frozenset({"i0"}))) == [c], "but there is only one more try"
        fleet.record_success(b)
        assert fleet.with_room(CHAT._replace(avoid=frozenset({"i0"}))) == [b, c]
        assert fleet.with_room(CHAT._replace(avoid=frozenset({"i1", "i2"}))) == [a]


class TestLoadThatIsRefused:
    """An engine that answers 408 or 429 is well, and answers so fast that it would draw all the load."""

    @pytest.mark.parametrize("status", [408, 429])
    def test_others_first_for_a_while_or_until_one_ends_well(self, make: Make, events: Events, clock: ManualClock, status: int) -> None:
        a, b = some(2, max_concurrent_requests=1)
        fleet = make(a, b)
        fleet.record_failure(a, EngineError(status, b"{}"))
        assert a.is_usable
        assert fleet.eligible(CHAT) == fleet.with_room(CHAT) == [b]
        fleet.placed(b, 1.0)
        assert fleet.with_room(CHAT) == [], "better here than there"
        fleet.record_success(a)
        assert fleet.with_room(CHAT) == [a]
        fleet.record_failure(a, EngineError(status, b"{}", retry_after_s=5.0))
        clock.advance(4.9)
        assert fleet.eligible(CHAT) == [b]
        clock.advance(0.2)
        assert fleet.eligible(CHAT) == [a, b]
        assert events.names == ["instance_busy"], "said once"

    def test_all_of_them_are_candidates_all_the_same(self, make: Make) -> None:
        instances = some(2)
        fleet = make(*instances)
        for instance in instances:
            fleet.record_failure(instance, EngineError(429, b"{}", retry_after_s=3600.0))
        assert fleet.with_room(CHAT) == instances

    @pytest.mark.parametrize("state", ["unhealthy", "draining", "starting", "wrong_model"])
    def test_never_what_its_owner_or_its_server_took_out(self, make: Make, state: str) -> None:
        (a,) = some(1)
        fleet = make(a)
        a.health_status = state
        assert fleet.eligible(CHAT) == []

    def test_never_one_that_refuses_connections(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        fleet.record_failure(a, REFUSED)
        assert a.health_status == "unhealthy"
        assert fleet.eligible(CHAT) == []
        assert fleet.knows("m")


class TestInFlight:
    def test_counts_load_and_milliseconds(self, make: Make) -> None:
        (a,) = some(1, max_concurrent_requests=4)
        fleet = make(a)
        fleet.placed(a, 100.0, "prefilling")
        fleet.placed(a, 50.0, "decoding")
        assert (a.active_requests, a.outstanding_ms, a.current_load) == (2, 150.0, 0.5)
        assert (a.prefilling_active_requests, a.decoding_active_requests) == (1, 1)
        fleet.released(a, 100.0, "prefilling")
        fleet.released(a, 50.0, "decoding")
        assert (a.active_requests, a.outstanding_ms, a.current_load) == (0, 0.0, 0.0)
        assert (a.prefilling_active_requests, a.decoding_active_requests) == (0, 0)

    def test_never_below_nothing(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        fleet.placed(a, 1.0)
        fleet.placed(a, 1.0)
        fleet.released(a, 500.0)
        assert a.outstanding_ms == 0.0
        fleet.released(a, 1.0)
        fleet.released(a, 1.0, "decoding")
        assert (a.active_requests, a.decoding_active_requests) == (0, 0)

    def test_without_a_cap_load_is_a_share_of_a_usual_batch(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        for _ in range(64):
            fleet.placed(a, 1.0)
        assert a.current_load == 0.25
        assert fleet.has_room(a)
        for _ in range(300):
            fleet.placed(a, 1.0)
        assert a.current_load == 1.0
        assert fleet.has_room(a)

    def test_room_by_hard_cap_learned_cap_and_role(self, make: Make) -> None:
        hard, learned = some(2)
        fleet = make(hard, learned)
        hard.max_concurrent_requests, hard.learned_concurrency = 2, 1
        learned.learned_concurrency = 1
        for instance in (hard, learned):
            fleet.placed(instance, 1.0)
        assert fleet.has_room(hard)
        assert not fleet.has_room(learned)
        assert fleet.with_room(CHAT) == [hard]
        hard.prefilling_config, hard.decoding_config = PrefillingConfig(target_batch_size=1), DecodingConfig(max_parallel_requests=1)
        fleet.released(hard, 1.0)
        fleet.placed(hard, 1.0, "prefilling")
        assert not fleet.has_room(hard, "prefilling")
        assert fleet.has_room(hard, "decoding")
        assert fleet.has_room(hard)


class TestPassiveMarking:
    def test_a_refused_connection_counts_at_once(self, make: Make, events: Events) -> None:
        a, b = some(2)
        fleet = make(a, b)
        fleet.record_failure(a, REFUSED)
        assert fleet.eligible(CHAT) == [b]
        assert events.names == ["instance_down"]
        assert events[0][2] == {"instance_id": "i0", "cause": "unreachable", "reason": "connection refused"}

    @pytest.mark.parametrize(("error", "until_out"), [(BROKEN, 2), (SLOW, 3), (SICK, 5)], ids=["broken", "slow", "5xx"])
    def test_failures_in_a_row(self, make: Make, error: InstanceFailed, until_out: int) -> None:
        a, b = some(2)
        fleet = make(a, b)
        for _ in range(until_out - 1):
            fleet.record_failure(a, error)
        fleet.record_success(a)
        for _ in range(until_out - 1):
            fleet.record_failure(a, error)
        assert a.is_usable
        fleet.record_failure(a, error)
        assert fleet.eligible(CHAT) == [b]

    @pytest.mark.parametrize("status", [400, 401, 404, 408, 422, 429])
    def test_a_4xx_never_counts(self, make: Make, status: int) -> None:
        (a,) = some(1)
        fleet = make(a)
        for _ in range(100):
            fleet.record_failure(a, EngineError(status, b"no"))
        assert a.is_usable

    def test_every_other_request_failing_is_caught_by_the_rate(self, make: Make, clock: ManualClock) -> None:
        a, _ = some(2)
        fleet = make(a)
        failed = 0
        while a.is_usable and failed < 100:
            fleet.record_success(a)
            fleet.record_failure(a, SICK)
            failed += 1
            clock.advance(0.1)
        assert failed == 10

    def test_a_few_failures_among_many_are_not(self, make: Make, clock: ManualClock) -> None:
        (a,) = some(1)
        fleet = make(a)
        for _ in range(100):
            fleet.record_success(a)
            fleet.record_success(a)
            fleet.record_failure(a, SICK)
            clock.advance(0.1)
        assert a.is_usable

    def test_old_failures_do_not_add_up_to_a_rate(self, make: Make, clock: ManualClock) -> None:
        (a,) = some(1)
        fleet = make(a)
        for _ in range(10):
            fleet.record_failure(a, SICK)
            for _ in range(8):
                fleet.record_success(a)
                fleet.record_failure(a, SICK)
            fleet.record_success(a)
            clock.advance(20.0)
        assert a.is_usable

    @pytest.mark.parametrize(("count", "out_at_most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (8, 4)])
    def test_time_limits_alone_take_out_half_at_most(self, make: Make, events: Events, count: int, out_at_most: int) -> None:
        instances = some(count)
        fleet = make(*instances)
        for _ in range(10):
            for instance in instances:
                fleet.record_failure(instance, SLOW)
        assert len(fleet.eligible(CHAT)) == count - out_at_most
        assert events.names.count("ejection_withheld") == count - out_at_most

    def test_half_of_every_name_that_it_serves(self, make: Make) -> None:
        adapted = some(2, served_models=["m", "adapter"])
        plain = [ExecutionInstance(instance_id=f"p{k}", port=9000 + k, model_name="m") for k in range(6)]
        fleet = make(*adapted, *plain)
        for instance in adapted:
            for _ in range(3):
                fleet.record_failure(instance, SLOW)
        assert len(fleet.eligible(CHAT._replace(model="adapter"))) == 1

    def test_errors_may_take_out_all(self, make: Make) -> None:
        instances = some(4)
        fleet = make(*instances)
        for instance in instances:
            for _ in range(5):
                fleet.record_failure(instance, SICK)
        assert not any(instance.is_usable for instance in instances)

    def test_the_owner_is_believed_over_an_ejection(self, make: Make) -> None:
        a, b = some(2)
        fleet = make(a, b)
        for _ in range(5):
            fleet.record_failure(a, SICK)
        a.is_healthy = True
        for _ in range(4):
            fleet.record_failure(a, SICK)
        assert a.is_usable
        fleet.record_failure(a, SICK)
        assert not a.is_usable

    def test_of_strangers_nothing_is_recorded(self, make: Make) -> None:
        (a,) = some(1)
        (stranger,) = some(1)
        fleet = make(a)
        fleet.record_failure(stranger, REFUSED)
        fleet.record_success(stranger)
        assert a.is_usable
        assert stranger.is_usable


class TestDraining:
    def test_no_new_work_and_its_end_is_said(self, make: Make, events: Events) -> None:
        a, b = some(2)
        fleet = make(a, b)
        fleet.placed(a, 1.0)
        fleet.drain("i0")
        assert a.health_status == HealthStatus.DRAINING
        assert fleet.eligible(CHAT) == [b]
        assert events.names == ["instance_draining"]
        fleet.released(a, 1.0)
        assert events.names == ["instance_draining", "instance_drained"]

    def test_an_idle_one_is_drained_at_once(self, make: Make, events: Events) -> None:
        fleet = make(*some(1))
        fleet.drain("i0")
        fleet.drain("i0")
        assert events.names == ["instance_draining", "instance_drained"]

    def test_failures_do_not_undo_it_and_are_remembered(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        fleet.drain("i0")
        fleet.record_failure(a, REFUSED)
        assert a.health_status == "draining"
        fleet.undrain("i0")
        assert a.health_status == "unhealthy"

    def test_undrained_it_works_again(self, make: Make) -> None:
        (a,) = some(1)
        fleet = make(a)
        heard: list[ExecutionInstance] = []
        fleet.on_change = heard.append
        fleet.drain("i0")
        fleet.undrain("i0")
        fleet.undrain("i0")
        assert fleet.eligible(CHAT) == [a] == heard
        with pytest.raises(InstanceNotFound):
            fleet.drain("nobody")


class TestLearnedConcurrency:
    def observe(self, *seen: tuple[int, int, int]) -> int | None:
        learner = ConcurrencyLearner()
        for running, waiting, ours in seen:
            learner.observe(running, waiting, ours)
        return learner.cap

    def test_a_full_batch_with_more_waiting_three_times_is_the_cap(self) -> None:
        assert self.observe((64, 40, 104), (64, 44, 108)) is None
        assert self.observe((64, 40, 104), (64, 44, 108), (63, 41, 104)) == 72

    def test_a_growing_batch_is_no_cap(self) -> None:
        assert self.observe((8, 90, 98), (20, 80, 100), (31, 70, 101), (44, 60, 104)) is None

    def test_a_few_waiting_are_no_cap(self) -> None:
        assert self.observe(*[(64, 8, 72)] * 10) is None

    def test_others_load_is_no_cap(self) -> None:
        assert self.observe(*[(64, 100, 20)] * 10) is None

    def test_an_engine_that_runs_nothing_is_no_cap(self) -> None:
        assert self.observe(*[(0, 50, 50)] * 10) is None

    def test_it_grows_when_we_are_at_it_and_nothing_waits(self) -> None:
        full = [(64, 40, 104)] * 3
        assert self.observe(*full, (72, 0, 72)) == 108
        assert self.observe(*full, (60, 0, 60)) == 72
        assert self.observe(*full, (64, 8, 72)) == 72

    def test_others_share_of_the_batch_is_not_ours_to_send(self) -> None:
        learner = ConcurrencyLearner()
        for _ in range(3):
            learner.observe(64, 40, 80, others=24)
        assert learner.cap == 64 - 24 + 8

    def test_requests_thrown_out_of_the_kv_cache_show_a_full_batch_though_few_wait(self) -> None:
        learner = ConcurrencyLearner()
        for _ in range(3):
            learner.observe(32, 2, 34, preempted=3, kv_cache_usage=1.0)
        assert learner.cap == 36
        assert ConcurrencyLearner().observe(32, 2, 34, preempted=3) is None

    def test_it_grows_slowly_where_the_kv_cache_is_nearly_full(self) -> None:
        learner = ConcurrencyLearner()
        for _ in range(3):
            learner.observe(64, 40, 104)
        assert learner.observe(72, 0, 72, kv_cache_usage=0.95) == 81

    def test_it_shrinks_with_the_batch(self) -> None:
        assert self.observe(*[(64, 40, 104)] * 3, *[(20, 52, 72)] * 3) == 24


@pytest.mark.parametrize("field", ["probe_interval_s", "errors_to_eject", "ejection_s"])
def test_settings_must_be_above_zero(field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        HealthSettings(**{field: 0})


def test_a_share_is_not_above_one() -> None:
    with pytest.raises(ConfigurationError, match="jitter"):
        HealthSettings(jitter=1.5)

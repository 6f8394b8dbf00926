"""Engines that are killed, stopped, hang and come back, under load: what their clients see, and how soon the rest goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from raw_http import RawAnswer, post
from vllm_server import MODEL, VllmServer, eventually, idle, instance_of

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.errors import ModelNotFound
from control_plane.gateway import Gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

#: long enough to run when the outage comes
STREAM_TOKENS = 2000
Pair = tuple[VllmServer, VllmServer]
MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
MakeGateway = Callable[[ControlPlaneManager], Awaitable[Gateway]]


@dataclass(slots=True)
class Stand:
    """A gateway over a pair of which the second is about to fail."""

    manager: ControlPlaneManager
    gateway: Gateway
    survivor: VllmServer
    victim: VllmServer

    @property
    def instance(self) -> ExecutionInstance:
        """The victim's."""
        return next(one for one in self.manager.get_instances() if one.instance_id == self.victim.label)

    def ask(self, tokens: int, *, stream: bool = False, prompt: str = "Once upon a time") -> RawAnswer:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": stream, "temperature": 0, "ignore_eos": True}
        return post(self.gateway.url, "/v1/completions", body)

    def attempts(self, answer: RawAnswer) -> int:
        """How many engines a request reached."""
        return int(self.manager.explain(answer.headers["x-request-id"])["attempts"])

    async def used(self) -> set[str]:
        """Where the next few requests go."""
        answers = await asyncio.gather(*(self.ask(2).done() for _ in range(8)))
        assert [answer.status for answer in answers] == [200] * 8
        return {answer.instance for answer in answers}

    def happened(self, name: str) -> list[str]:
        """What the events of one name say of the victim, oldest first."""
        of_victim = [event for event in reversed(self.manager.events.recent(1000)) if event.fields.get("instance_id") == self.victim.label]
        return [event.message for event in of_victim if event.name == name]


@pytest.fixture
async def stand(servers: Pair, make_manager: MakeManager, make_gateway: MakeGateway) -> Stand:
    instances = [instance_of(server, model_name=MODEL) for server in servers]
    # a machine that stalls for seconds is no failure of the engine that is to survive
    manager = await make_manager(*instances, chunk_timeout_s=15.0, connect_timeout_s=10.0)
    return Stand(manager, await make_gateway(manager), *servers)


@dataclass(slots=True)
class Load:
    """Streams that run on both engines, then more of everything than the engines run at once: those wait there."""

    begun: list[RawAnswer]
    waiting: list[RawAnswer]
    unary: list[RawAnswer]

    def all(self) -> list[RawAnswer]:
        return [*self.begun, *self.waiting, *self.unary]

    async def done(self) -> None:
        for answer in self.all():
            await answer.done()


async def put_load(stand: Stand) -> Load:
    """The victim is stopped (SIGSTOP) when this returns: what it had sent has come in, and what is open on it stays open.

    Begun anew where nothing of that kind was open any more: engines compile at their first batch, one of them may be done before the
    other begins, and an engine may be ahead of the client by all that is still to be read.
    """
    for _ in range(5):
        begun = [stand.ask(STREAM_TOKENS, stream=True, prompt=f"Story {i}") for i in range(8)]
        await eventually(lambda begun=begun: all(len(answer.events) > 3 for answer in begun), 60.0)
        unary = [stand.ask(150, prompt=f"Tale {i}") for i in range(16)]
        waiting = [stand.ask(60, stream=True, prompt=f"Saga {i}") for i in range(16)]
        load = Load(begun, waiting, unary)
        # or it is over already
        await eventually(lambda load=load: stand.instance.active_requests >= 8 or all(map(is_over, load.begun)))
        await asyncio.sleep(0.1)
        stand.victim.freeze()
        await all_read(stand, load)
        long = [answer for answer in begun if answer.instance == stand.victim.label]
        enough_left = [answer for answer in long if not is_over(answer) and len(answer.events) < STREAM_TOKENS - 200]
        streaming = sum(answer.instance == stand.victim.label and not is_over(answer) for answer in load.all())
        # the rest of what runs there has not begun to be answered, and so is to be tried elsewhere
        unanswered = stand.instance.active_requests - streaming
        if 0 < len(long) == len(enough_left) < len(begun) and unanswered > 0:
            return load
        told = f"{len(enough_left)} of {len(long)} long streams had enough left, {unanswered} requests were unanswered"
        stand.victim.thaw()
        await load.done()
        await eventually(lambda: stand.instance.is_usable, 30.0)
    raise AssertionError(f"the load missed the engine that is to fail: {told}")


def is_over(answer: RawAnswer) -> bool:
    assert answer.task is not None
    return answer.task.done()


async def all_read(stand: Stand, load: Load) -> None:
    """Until nothing has come from the stopped engine for six looks in a row."""
    before, same = -1, 0
    while same < 6:
        await asyncio.sleep(0.05)
        now = sum(len(answer.body) for answer in load.all() if answer.instance == stand.victim.label)
        before, same = now, same + 1 if now == before else 0


def check_unary(answers: list[RawAnswer], tokens: int) -> None:
    assert [answer.status for answer in answers] == [200] * len(answers), [answer.body[:300] for answer in answers if answer.status != 200]
    assert {answer.json["usage"]["completion_tokens"] for answer in answers} == {tokens}
    assert {answer.json["choices"][0]["finish_reason"] for answer in answers} == {"length"}


def check_streams(stand: Stand, answers: list[RawAnswer], tokens: int) -> tuple[int, int]:
    """Whole, or broken with an error that says so; only what had begun on the victim may break. (whole, broken)"""
    broken = 0
    for answer in answers:
        assert (answer.status, answer.complete) == (200, True)
        last = answer.events[-1]
        if last == "[DONE]":
            pieces = [json.loads(event)["choices"][0] for event in answer.events[:-1]]
            assert pieces[-1]["finish_reason"] == "length"
            assert len(pieces) <= tokens
            continue
        broken += 1
        assert answer.instance == stand.victim.label
        assert "[DONE]" not in answer.events
        assert json.loads(last)["error"]["code"] in ("instance_failed", "timeout")
        assert "choices" in json.loads(answer.events[0]), "a stream of which nothing had come was not tried elsewhere"
    return len(answers) - broken, broken


async def check_load(stand: Stand, load: Load) -> None:
    """What must be true after the victim went away under a load."""
    await load.done()
    check_unary(load.unary, 150)
    on_victim = sum(answer.instance == stand.victim.label for answer in load.begun)
    assert 0 < on_victim < 8
    whole, broken = check_streams(stand, load.begun, STREAM_TOKENS)
    assert broken == on_victim, f"{broken} streams broke, {on_victim} ran on the engine that failed"
    assert whole
    check_streams(stand, load.waiting, 60)
    tried = [stand.attempts(answer) for answer in (*load.unary, *load.waiting)]
    assert max(tried) == 2, "nothing was tried again: the load missed the victim"
    assert stand.manager.metrics.retried > 0
    assert sum(one.active_requests for one in stand.manager.get_instances()) == 0


async def test_an_engine_killed_under_load(stand: Stand) -> None:
    load = await put_load(stand)
    stand.victim.kill()
    assert await stand.used() == {stand.survivor.label}
    await check_load(stand, load)
    assert stand.instance.health_status == "unhealthy"
    assert "cannot connect" in stand.happened("instance_down")[-1]

    stand.victim.launch()
    await asyncio.to_thread(stand.victim.wait_ready)
    await eventually(lambda: stand.instance.is_usable)
    assert len(stand.happened("instance_recovered")) == 1
    assert stand.victim.label in await stand.used()


async def test_an_engine_that_hangs_and_goes_on(stand: Stand) -> None:
    load = await put_load(stand)
    await eventually(lambda: not stand.instance.is_usable, 30.0)
    assert await stand.used() == {stand.survivor.label}
    await check_load(stand, load)
    assert "not answered" in stand.happened("instance_down")[0]

    stand.victim.thaw()
    await eventually(lambda: stand.instance.is_usable, 30.0)
    assert stand.victim.label in await stand.used()
    await idle(stand.survivor, stand.victim)


async def test_an_engine_told_to_stop_under_load_and_another_model_in_its_place(stand: Stand, make_manager: MakeManager) -> None:
    """vLLM ends its running requests with status 200 and finish_reason "abort" then, which is no answer."""
    follower = await make_manager(instance_of(stand.victim))
    load = await put_load(stand)
    stand.victim.terminate()
    stand.victim.thaw()
    assert await stand.used() == {stand.survivor.label}
    await check_load(stand, load)
    await asyncio.to_thread(stand.victim.wait_gone)

    early = await make_manager(instance_of(stand.victim, warmup=True), wait=False, no_instance_timeout_s=300.0)
    asked = await early.submit_request(RequestMetadata(prompt="Once", max_tokens=3, model_name="other"))
    stand.victim.launch("other")
    await asyncio.to_thread(stand.victim.wait_ready)
    await check_configured_model(stand)
    await check_followed_model(follower)
    await check_start_before_the_engine(early, asked)


async def check_configured_model(stand: Stand) -> None:
    """An instance that is configured for a model gets no work while its server has another."""
    await eventually(lambda: stand.instance.health_status == "wrong_model")
    assert "other" in stand.happened("wrong_model")[0]
    assert await stand.used() == {stand.survivor.label}
    unknown = await post(stand.gateway.url, "/v1/completions", {"model": "other", "prompt": "x"}).done()
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")


async def check_followed_model(follower: ControlPlaneManager) -> None:
    """An instance whose model was asked from its server follows it."""
    instance = follower.get_instances()[0]
    await eventually(lambda: instance.is_usable and instance.model_name == "other")
    assert follower.events.counts["model_changed"] == 1
    done = await follower.result(await follower.submit_request(RequestMetadata(prompt="Once", max_tokens=3, model_name="other")))
    assert done.state == "completed"
    with pytest.raises(ModelNotFound, match="Models served here: other"):
        await follower.submit_request(RequestMetadata(prompt="Once", model_name=MODEL))


async def check_start_before_the_engine(early: ControlPlaneManager, asked: str) -> None:
    """A control plane that was up first serves what has waited, once its engine is there and warm."""
    done = await early.result(asked)
    assert done.state == "completed", done.error
    names = [event.name for event in reversed(early.events.recent(1000))]
    assert names.index("warmup_done") < names.index("instance_recovered")
    assert names.count("warmup_done") == 1

"""An engine inside the simulator: the model of sim-engine without its server, driven by virtual time.

It answers the control plane's probes, scrapes and requests by direct calls. Runs of steps in which the batch does not change are
advanced at once; tokens are told some at a time, as the engine over HTTP does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Final

import msgspec

from control_plane.engines.model import EngineModel, ModelSequence
from control_plane.engines.state import State
from control_plane.errors import EngineError, InstanceFailed
from control_plane.protocols import Call, EngineOutcome, Headers, Sink, WireRequest
from control_plane.roofline import EngineProfile
from control_plane.simulator.loop import VirtualLoop, Wake
from control_plane.simulator.workload import TraceRequest
from control_plane.types import ExecutionInstance, Leg, RequestMetadata, Usage

#: longest run of steps that is planned at once
MAX_STEPS: Final = 100_000
#: tokens of a stream are told so many at a time after the first (``openai_compatible.TOKENS_TOLD``)
TOKENS_TOLD: Final = 32
HEADERS: Final[Headers] = ((b"content-type", b"text/event-stream"),)
#: a version that tells what it is
VERSION: Final = "0.32.0-model"
_POSTS: Final = ("/v1/chat/completions", "/v1/completions")
_ANSWER: Final = b'{"choices":[{"index":0,"text":"","finish_reason":"length"}]}'


class Served(ModelSequence):
    """One request in an engine, and the Call that its sink got."""

    __slots__ = ("arriving", "block_ids", "engine", "sink", "streamed", "told", "told_s")

    def __init__(
        self, engine: VirtualEngine, sink: Sink, trace: TraceRequest, block_ids: tuple[int, ...], *, streamed: bool, priority: int
    ) -> None:
        super().__init__(max(1, trace.prompt_tokens), max(1, trace.output_tokens), priority=priority)
        self.engine = engine
        self.sink = sink
        self.block_ids = block_ids
        self.streamed = streamed
        #: output tokens that the sink knows of, and when it was told last
        self.told = 0
        self.told_s = 0.0
        #: it is on its way to the engine
        self.arriving: Wake | None = None

    def hashes(self, blocks: int) -> Sequence[int]:
        """A hash stands for as many engine blocks as lie in one of the trace: nothing finer is known of what is shared."""
        return self.block_ids[:blocks]

    # the Call

    def pause(self) -> None:
        """Clients in virtual time are never slow."""

    def resume(self) -> None:
        """See :meth:`pause`."""

    def cancel(self) -> None:
        self.engine.drop(self)


def engine_block_ids(ids: tuple[int, ...], trace_tokens: int, engine_tokens: int) -> tuple[int, ...]:
    """Ids of an engine's blocks of ``engine_tokens`` tokens where those of the trace are of ``trace_tokens``: each that of the block in
    which it ends, since equal ids mean that all before is equal, too, with its own number, since several may end in one."""
    count = len(ids) * trace_tokens // engine_tokens
    return tuple([ids[((number + 1) * engine_tokens - 1) // trace_tokens] << 24 | number for number in range(count)])


class VirtualEngine:
    """Implements :class:`~control_plane.protocols.Engine`.

    Args:
        number: its place in the fleet.
        trace_of: the workload's request of an id; None for those that are not of the workload (warm-ups).
        on_start: hears of every request sent here, before anything is done with it.
        block_tokens: tokens of one block of the workload.
        delay_s: seconds from sending a request until the engine's scheduler sees it, and back: network and the server's own work,
            all charged on the way in. What the profile's server takes for itself comes to it.
        jitter: sigma of the lognormal noise on step times, drawn from ``rng``.
    """

    def __init__(
        self,
        instance: ExecutionInstance,
        profile: EngineProfile,
        loop: VirtualLoop,
        trace_of: Callable[[str], TraceRequest | None],
        *,
        block_tokens: int,
        number: int = 0,
        on_start: Callable[[str, VirtualEngine], None] | None = None,
        scheduling: str = "fcfs",
        caching: bool = True,
        delay_s: float = 0.0,
        jitter: float = 0.0,
        rng: Random | None = None,
    ) -> None:
        self.instance = instance
        self.profile = profile
        #: of a trace's block; 0: it is a whole number of the engine's, and is hashed as a whole
        self._block_tokens = block_tokens if block_tokens % profile.block_size_tokens else 0
        self._fresh_model = partial(
            EngineModel,
            profile,
            scheduling=scheduling,
            caching=caching,
            hash_blocks=1 if self._block_tokens else block_tokens // profile.block_size_tokens,
            rng=rng,
            jitter=jitter,
        )
        self.model = self._fresh_model()
        self.context = min(profile.max_model_len_tokens, self.model.blocks.total * profile.block_size_tokens)
        #: how often it was asked for anything but work
        self.probes = 0
        self.number = number
        self._loop = loop
        self._trace_of = trace_of
        self._on_start = on_start
        self._delay_s = delay_s
        #: when its server is through with the requests before
        self._front_free_s = 0.0
        self._wake: Wake | None = None
        self._wake_s = 0.0
        self._steps_untold = 0
        self._served: dict[Served, None] = {}
        self._down = False
        self._started_at = 1.0

    # ---- Engine

    def start(self, leg: Leg, wire: WireRequest, sink: Sink, request: RequestMetadata) -> Call:
        if self._on_start is not None:
            self._on_start(request.request_id, self)
        trace = self._trace_of(request.request_id) or TraceRequest(0.0, request.input_tokens or 8, request.max_tokens or 1)
        priority = int(request.priority) if self.model.by_priority else 0
        block_ids = trace.block_ids
        if self._block_tokens:
            block_ids = engine_block_ids(block_ids, self._block_tokens, self.profile.block_size_tokens)
        served = Served(self, sink, trace, block_ids, streamed=wire.stream, priority=priority)
        if self._down:
            sink.failed(InstanceFailed("the engine is down", instance_id=self.instance.instance_id, connected=False, reached=False))
            return served
        if served.prompt_tokens + served.output_tokens > self.context:
            sink.failed(self._too_long(served))
            return served
        self._served[served] = None
        profile, now_s = self.profile, self._loop.time()
        begin_s = max(now_s, self._front_free_s)
        tokens_s = profile.prompt_token_s * served.prompt_tokens
        # a long prompt holds up those behind it: nobody overtakes
        self._front_free_s = begin_s + profile.request_serial_s + tokens_s
        arrive_s = begin_s + self._delay_s + profile.request_s + tokens_s
        if arrive_s > now_s:
            served.arriving = self._loop.wake_at(arrive_s, lambda: self._arrive(served))
        else:
            self._arrive(served)
        return served

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        self.probes += 1
        if self._down:
            raise InstanceFailed("the engine is down", instance_id=self.instance.instance_id, connected=False, reached=False)
        if path == "/health":
            return 200, b""
        if path == "/metrics":
            return 200, self._page()
        if path == "/version":
            return 200, msgspec.json.encode({"version": VERSION})
        if path == "/v1/models":
            card = {"id": self.instance.model_name, "max_model_len": self.context, "simulated": True}
            return 200, msgspec.json.encode({"object": "list", "data": [card]})
        return (405, b"") if path in _POSTS else (404, b"")

    async def close(self) -> None:
        """Nothing is open."""

    @property
    def busy(self) -> bool:
        """Something is under way here, or on its way here."""
        return bool(self._served)

    # ---- faults

    def crash(self) -> None:
        """Be gone: everything under way fails, its cache is lost."""
        self._down = True
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        lost, self._served = list(self._served), {}
        self.model = self._fresh_model()
        for served in lost:
            if served.arriving is not None:
                served.arriving.cancel()
            error = InstanceFailed("the engine died", instance_id=self.instance.instance_id, sent=bool(served.told))
            served.sink.failed(error)

    def recover(self) -> None:
        """Be back, empty."""
        self._down = False
        self._started_at = 1.0 + self._loop.time()

    # ---- the engine in time

    def _arrive(self, served: Served) -> None:
        served.arriving = None
        now_s = self._loop.time()
        self.model.add(served, now_s)
        self._plan(now_s)

    def drop(self, served: Served) -> None:
        """Its caller left."""
        if self._served.pop(served, 0) == 0:
            return
        if served.arriving is not None:
            served.arriving.cancel()
        elif served.state is not State.NEW:
            now_s = self._loop.time()
            self.model.abort(served, now_s)
            self._plan(now_s)

    def _plan(self, now_s: float) -> None:
        """See to it that we wake at the end of the present run, or of the next one."""
        run = self.model.run or self.model.plan(now_s, MAX_STEPS)
        if run is None:
            return
        if self._wake is not None:
            if run.end_s == self._wake_s:
                return
            self._wake.cancel()
        self._wake_s = run.end_s
        self._wake = self._loop.wake_at(run.end_s, self._step)

    def _step(self) -> None:
        """A run has ended: the engine goes on at once, as a real one does, and what came of it is told meanwhile."""
        self._wake = None
        done = self.model.complete()
        end_s = done.last_s
        self._plan(end_s)
        for served in done.started:
            self._tell_first(served, end_s)  # type: ignore[arg-type]
        for served in done.finished:
            self._tell_end(served, end_s)  # type: ignore[arg-type]
        self._steps_untold += done.steps
        if self._steps_untold >= TOKENS_TOLD:
            self._tell_progress(end_s)

    def _tell_progress(self, now_s: float) -> None:
        self._steps_untold = 0
        generated = self.model.generated
        for sequence in list(self.model.decoding):
            served: Served = sequence  # type: ignore[assignment]
            if served.streamed and (new := generated(served) - served.told) > 0:
                self._tell(served, new, now_s)

    def _tell_first(self, served: Served, now_s: float) -> None:
        if served.told or not served.streamed or served not in self._served:
            return  # thrown out and begun again: its first token was told before
        served.sink.started(200, HEADERS, served)
        self._tell(served, 1, now_s)

    def _tell(self, served: Served, new: int, now_s: float) -> None:
        first_s = served.told_s or now_s
        served.told += new
        served.told_s = now_s
        served.sink.tokens(new, first_s, now_s)

    def _tell_end(self, served: Served, now_s: float) -> None:
        if self._served.pop(served, 0) == 0:
            return
        if not served.streamed:
            served.sink.started(200, HEADERS, served)
            served.sink.chunk(_ANSWER)
        if (new := served.output_tokens - served.told) > 0:
            self._tell(served, new, now_s)
        usage = Usage(served.prompt_tokens, served.output_tokens, served.cached_tokens, exact=True)
        served.sink.finished(EngineOutcome(usage))

    # ---- what it tells of itself

    def _page(self) -> bytes:
        model = self.model
        counters, blocks = model.counters, model.blocks
        return (
            f"process_start_time_seconds {self._started_at}\n"
            f"vllm:num_requests_running {model.running}\n"
            f"vllm:num_requests_waiting {model.waiting}\n"
            f"vllm:kv_cache_usage_perc {model.kv_usage}\n"
            f"vllm:prefix_cache_queries_total {counters.prefix_queries}\n"
            f"vllm:prefix_cache_hits_total {counters.prefix_hits}\n"
            f"vllm:num_preemptions_total {counters.preemptions}\n"
            f"vllm:prompt_tokens_total {counters.prompt_tokens}\n"
            f"vllm:generation_tokens_total {counters.generation_tokens}\n"
            f'vllm:cache_config_info{{block_size="{self.profile.block_size_tokens}",enable_prefix_caching="{blocks.caching}",'
            f'num_gpu_blocks="{blocks.total}"}} 1.0\n'
        ).encode()

    def _too_long(self, served: Served) -> EngineError:
        asked = served.prompt_tokens + served.output_tokens
        message = f"This model's maximum context length is {self.context} tokens. However, you requested {asked} tokens."
        body = msgspec.json.encode({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
        return EngineError(400, body, instance_id=self.instance.instance_id)

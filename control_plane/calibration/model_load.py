"""A modelled server in virtual time behind the same face as a real one: whatever measures or replays can be run on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import msgspec
import xxhash

from control_plane.calibration.fitting import ServerTime
from control_plane.calibration.streams import Prompt, Stream
from control_plane.engines.model import EngineModel, ModelSequence
from control_plane.errors import EngineError
from control_plane.roofline import EngineProfile
from control_plane.simulator.loop import VirtualLoop, Wake

__all__ = ["ModelLoad"]

_POSTS: Final = ("/v1/chat/completions", "/v1/completions")
#: bytes of a token of a text: what English takes with the vocabularies of today
_BYTES_PER_TOKEN: Final = 4


class _Served(ModelSequence):
    """A stream in the engine; its blocks are known by what is in them and before them."""

    __slots__ = ("_chain", "_size", "ids", "stream")

    def __init__(self, stream: Stream, ids: Sequence[int], output_tokens: int, size: int, priority: int) -> None:
        super().__init__(len(ids), output_tokens, priority=priority)
        self.stream = stream
        self.ids = ids
        self._size = size
        self._chain: list[int] = []

    def hashes(self, blocks: int) -> Sequence[int]:
        size, chain = self._size, self._chain
        # what it generates is its own: only the prompt's blocks are known
        while len(chain) < min(blocks, len(self.ids) // size):
            at = len(chain) * size
            before = chain[-1] if chain else 0
            chain.append(xxhash.xxh3_64_intdigest(msgspec.msgpack.encode((before, self.ids[at : at + size]))))
        return chain[:blocks]


class ModelLoad:
    """Implements :class:`~control_plane.calibration.streams.Load` on a :class:`VirtualLoop`.

    Args:
        server: what a request costs beside the engine's steps.
        jitter: sigma of the lognormal noise on step times, drawn from ``rng``.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        profile: EngineProfile,
        *,
        most: int,
        server: ServerTime | None = None,
        scheduling: str = "fcfs",
        caching: bool = True,
        jitter: float = 0.0,
        rng: Random | None = None,
    ) -> None:
        self.url = "http://model"
        self.model = profile.name
        self.most = most
        self.active = 0
        self.requests = 0
        self.prompt_tokens = 0
        self.now_s: Callable[[], float] = loop.time
        self.engine = EngineModel(profile, scheduling=scheduling, caching=caching, jitter=jitter, rng=rng)
        self.profile = profile
        self._server = server or ServerTime()
        self._loop = loop
        #: when the server is through with the requests before
        self._free_s = 0.0
        self._wake: Wake | None = None
        self._wake_s = 0.0

    # ---- Load

    def start(self, prompt: Prompt, output_tokens: int, *, priority: int = 0) -> Stream:
        if self.active >= self.most:
            raise RuntimeError(f"{self.most} requests are under way already")
        text = isinstance(prompt, str)
        ids: Sequence[int] = list(prompt.encode()[::_BYTES_PER_TOKEN]) if isinstance(prompt, str) else prompt
        self.active += 1
        self.requests += 1
        stream = Stream(len(ids), self.now_s, self._over)
        if len(ids) + output_tokens > self.profile.max_model_len_tokens:
            stream.error = EngineError(400, b"longer than the longest context")
            stream.end_now()
            return stream
        served = _Served(stream, ids, output_tokens, self.profile.block_size_tokens, priority)
        cost = self._server
        begin_s = max(self.now_s(), self._free_s)
        tokens_s = len(ids) * (cost.prompt_token_s + (cost.text_token_s if text else 0.0))
        # a long prompt holds up those behind it: nobody overtakes
        self._free_s = begin_s + cost.serial_s + tokens_s
        arriving = self._loop.wake_at(begin_s + cost.request_s + tokens_s, lambda: self._arrive(served))

        def drop() -> None:
            arriving.cancel()
            self.engine.abort(served, self.now_s())
            self._plan()

        stream.can_be_dropped(drop)
        return stream

    async def get(self, path: str) -> tuple[int, bytes]:
        if path == "/v1/models":
            card = {"id": self.model, "max_model_len": self.profile.max_model_len_tokens, "simulated": True}
            return 200, msgspec.json.encode({"object": "list", "data": [card]})
        if path == "/metrics":
            return 200, self._page()
        return (405, b"") if path in _POSTS else (404, b"")

    async def post(self, path: str, body: object) -> tuple[int, bytes]:
        return 404, b""

    # ---- the engine in time

    def _arrive(self, served: _Served) -> None:
        self.engine.add(served, self.now_s())
        self._plan()

    def _plan(self) -> None:
        """Every step by itself: each token's time is wanted. A run is never cut, so its end is known when it begins."""
        run = self.engine.run or self.engine.plan(self.now_s())
        if run is not None and self._wake is None:
            self._wake = self._loop.wake_at(run.end_s, self._step)

    def _step(self) -> None:
        self._wake = None
        decoding: list[ModelSequence] = list(self.engine.decoding)
        done = self.engine.complete()
        self._plan()
        finished = set(map(id, done.finished))
        now_s = self.now_s()
        for place, sequence in enumerate(decoding + done.started):
            assert isinstance(sequence, _Served)
            told = self._tell(sequence, id(sequence) in finished)
            if self._server.chunk_s and place:
                self._loop.wake_at(now_s + place * self._server.chunk_s, told)
            else:
                told()

    def _tell(self, served: _Served, finished: bool) -> Callable[[], None]:
        def tell() -> None:
            stream = served.stream
            if stream.ended_s:
                return
            stream.came(1)
            if finished:
                stream.output_tokens, stream.cached_tokens = served.output_tokens, served.cached_tokens
                stream.end_now()

        return tell

    def _over(self, stream: Stream) -> None:
        self.active -= 1
        self.prompt_tokens += stream.prompt_tokens

    def _page(self) -> bytes:
        engine = self.engine
        counters, blocks = engine.counters, engine.blocks
        return (
            f"vllm:num_requests_running {engine.running}\n"
            f"vllm:num_requests_waiting {engine.waiting}\n"
            f"vllm:kv_cache_usage_perc {engine.kv_usage}\n"
            f"vllm:prefix_cache_queries_total {counters.prefix_queries}\n"
            f"vllm:prefix_cache_hits_total {counters.prefix_hits}\n"
            f"vllm:num_preemptions_total {counters.preemptions}\n"
            f"vllm:prompt_tokens_total {counters.prompt_tokens + counters.prefix_hits}\n"
            f"vllm:generation_tokens_total {counters.generation_tokens}\n"
            f'vllm:cache_config_info{{block_size="{self.profile.block_size_tokens}",enable_prefix_caching="{blocks.caching}",'
            f'num_gpu_blocks="{blocks.total}"}} 1.0\n'
        ).encode()

"""The simulated engine as a server: one model, one pump, vLLM's paths."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from email.utils import format_datetime
from random import Random
from typing import Any, Final

import msgspec

from control_plane.clock import Clock, SystemClock
from control_plane.engines.model import EngineModel
from control_plane.errors import ConfigurationError
from control_plane.roofline import EngineProfile
from control_plane.roofline import profile as named_profile
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.errors import ApiError, Moved, PlainError, invalid, refused_by_engine, too_long, unknown_model
from control_plane.sim_engine.fields import Body
from control_plane.sim_engine.kv_events import KvEventsConfig, KvPublisher
from control_plane.sim_engine.metrics import DIALECTS, EngineMetrics, write_page
from control_plane.sim_engine.params import Options, check_sequences, sampling
from control_plane.sim_engine.prompts import Prompts
from control_plane.sim_engine.ranks import Balancer, Rank
from control_plane.sim_engine.replies import Reply
from control_plane.sim_engine.routes import KINDS, find_route
from control_plane.sim_engine.tokens import Tokenizer
from control_plane.sim_engine.words import Sampling, Speaker
from control_plane.transport import Exchange, HttpServer, ServerLimits

VLLM_VERSION: Final = "0.32.0"
#: an idle connection is closed after this long, as by vLLM's uvicorn
KEEP_ALIVE_S: Final = 5.0
#: paths that vLLM's own request counter leaves out
_UNCOUNTED: Final = frozenset({"/health", "/metrics", "/ping", "/version", "/load"})
#: for the last bytes to leave
_FLUSH_S: Final = 0.1
SCHEDULING: Final = ("fcfs", "priority")
Header = tuple[bytes, bytes]


class SimEngine:
    """An engine of one profile that answers as vLLM does and takes the time that the profile says, divided by ``speed``.

    Args:
        profile: a profile, or the name of one (``GPU[xTP]-MODEL``).
        model_name: the name it serves; the profile's model by default.
        speed: model seconds per real second.
        seed: of its ids and of the jitter. Texts do not depend on it: all engines say the same.
        kind: ``generate``, or ``embedding`` (embeddings, rerank, score, pooling; no generation).
        scheduling_policy: ``fcfs`` or ``priority``.
        max_model_len: longest context in tokens, if less than the profile's.
        max_num_seqs, max_num_batched_tokens, block_size, num_gpu_blocks_override: as vLLM's flags of these names; the profile's by
            default.
        prefix_caching: keep prefix blocks.
        responses_store: keep answers of ``/v1/responses`` (``VLLM_ENABLE_RESPONSES_API_STORE=1`` in vLLM; off there and here).
        jitter: sigma of the lognormal noise on step times.
        data_parallel_size: ranks behind this server, an engine each; ``X-data-parallel-rank`` names one.
        metrics_dialect: whose names ``/metrics`` uses: ``vllm``, ``vllm-0.8`` (an older one's) or ``sglang``.
        kv_events_config: as vLLM's flag: JSON, or a mapping. Each rank's events are published from :meth:`start` on.

    Faults for tests: :meth:`hang` and :meth:`resume`, :meth:`fail_next`, :attr:`cut_streams_after`, :meth:`abort_all`, :meth:`kill`.
    """

    def __init__(
        self,
        profile: str | EngineProfile = "h100-llama3-8b",
        model_name: str | None = None,
        *,
        speed: float = 1.0,
        seed: int = 0,
        kind: str = "generate",
        scheduling_policy: str = "fcfs",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        num_gpu_blocks_override: int | None = None,
        prefix_caching: bool = True,
        responses_store: bool = False,
        jitter: float = 0.0,
        data_parallel_size: int = 1,
        metrics_dialect: str = "vllm",
        kv_events_config: str | Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not speed > 0:
            raise ConfigurationError(f"speed {speed} is not above 0", param="speed")
        if kind not in KINDS:
            raise ConfigurationError(f"kind {kind!r} is not one of {', '.join(KINDS)}", param="kind")
        if scheduling_policy not in SCHEDULING:
            raise ConfigurationError(
                f"scheduling_policy {scheduling_policy!r} is not one of {', '.join(SCHEDULING)}", param="scheduling_policy"
            )
        if max_model_len is not None and max_model_len < 1:
            raise ConfigurationError(f"max_model_len {max_model_len} is not 1 or more", param="max_model_len")
        if data_parallel_size < 1:
            raise ConfigurationError(f"data_parallel_size {data_parallel_size} is not 1 or more", param="data_parallel_size")
        if metrics_dialect not in DIALECTS:
            raise ConfigurationError(f"metrics_dialect {metrics_dialect!r} is not one of {', '.join(DIALECTS)}", param="metrics_dialect")
        found = named_profile(profile) if isinstance(profile, str) else profile
        overrides = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size_tokens": block_size,
            "kv_block_count_override": num_gpu_blocks_override,
            "max_model_len_tokens": None if max_model_len is None else min(max_model_len, found.max_model_len_tokens),
        }
        found = replace(found, **{name: value for name, value in overrides.items() if value is not None})  # type: ignore[arg-type]
        if found.max_num_batched_tokens < found.max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens {found.max_num_batched_tokens} is less than max_num_seqs {found.max_num_seqs}",
                param="max_num_batched_tokens",
            )
        self.profile = found
        self.model_name = model_name or found.model.name
        self.kind = kind
        self.speed = speed
        self.rng = Random(seed)
        self.clock = clock or SystemClock()
        self.fingerprint = f"vllm-{VLLM_VERSION}-simulated"
        #: longest prompt and answer together, in tokens
        self.context = min(found.max_model_len_tokens, found.kv_block_count * found.block_size_tokens)
        self.responses_store = responses_store
        #: stored answers of /v1/responses by id, oldest first
        self.stored: dict[str, Any] = {}
        self.tokenizer = Tokenizer()
        self.json_pieces = self.tokenizer.json_pieces
        self.speaker = Speaker(self.tokenizer)
        self.prompts = Prompts(self.tokenizer, self.model_name, self.context)
        #: drop the connection of every stream after so many tokens (0: never)
        self.cut_streams_after = 0
        self.metrics_dialect = metrics_dialect
        started_unix_s = self.clock.utc(self.clock.now_s()).timestamp()
        caching = prefix_caching and kind == "generate"
        models = [
            EngineModel(found, scheduling=scheduling_policy, caching=caching, rng=self.rng, jitter=jitter)
            for _ in range(data_parallel_size)
        ]
        #: data-parallel ranks, in order; one where there is no such thing
        self.ranks = [Rank(model, EngineMetrics(model, self.model_name, started_unix_s, at)) for at, model in enumerate(models)]
        self._balancer = Balancer(self.ranks)
        self.kv_events_config = KvEventsConfig.read(kv_events_config)
        self._server: HttpServer | None = None
        self._replies: set[Reply] = set()
        self._hanging: list[Exchange] | None = None
        self._failures: list[int] = []
        self._date: tuple[int, bytes] = (-1, b"")

    # ------------------------------------------------------------------ life

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen. Port 0: any free one, see :attr:`port`."""
        loop = asyncio.get_running_loop()
        for rank in self.ranks:
            rank.start(loop, self.speed)
        self._publish(loop)
        self._server = HttpServer(self._handle, limits=ServerLimits(idle_timeout_s=KEEP_ALIVE_S))
        await self._server.start(host, port)

    def _publish(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self.kv_events_config.is_on:
            return
        for at, rank in enumerate(self.ranks):
            publisher = KvPublisher(self.kv_events_config, at, self.profile.block_size_tokens, self.unix_now_s)
            publisher.start(loop)
            rank.publish(publisher)

    @property
    def port(self) -> int:
        return self._running().port

    @property
    def url(self) -> str:
        return self._running().url

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop listening. Answers under way have ``grace_s`` seconds to end; 0: they end now, with the reason ``abort``, as in vLLM."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._hanging is not None:
            self.abort_all()
        elif not grace_s:
            for reply in list(self._replies):
                reply.cut_short()
        await server.stop(max(grace_s, _FLUSH_S))
        self._close_ranks()

    async def kill(self) -> None:
        """Be gone at once, as after a crash: every connection dropped, nobody listening."""
        server, self._server = self._server, None
        if server is not None:
            self.abort_all()
            self._close_ranks()
            await server.stop(0.0)

    def _close_ranks(self) -> None:
        for rank in self.ranks:
            rank.close()

    def abort_all(self) -> None:
        """Drop the connections of all requests under way, without an answer."""
        for exchange in [reply.exchange for reply in self._replies] + (self._hanging or []):
            exchange.abort()
        for reply in list(self._replies):
            reply.leave()
        if self._hanging is not None:
            self._hanging = []

    def hang(self) -> None:
        """Accept connections and read requests, but do and answer nothing, as a stopped process does."""
        if self._hanging is None:
            self._hanging = []
            for rank in self.ranks:
                rank.pump.halt()

    def resume(self) -> None:
        """End :meth:`hang`: everything goes on where it stopped."""
        held, self._hanging = self._hanging or [], None
        for rank in self.ranks:
            rank.pump.proceed()
        for exchange in held:
            if not exchange.finished:
                self._handle(exchange)

    def fail_next(self, count: int, status: int = 500) -> None:
        """Answer the next ``count`` POST requests with that status."""
        self._failures += [status] * count

    def _running(self) -> HttpServer:
        if self._server is None:
            raise RuntimeError("the engine is not running")
        return self._server

    @property
    def model(self) -> EngineModel:
        """The first rank's: the only one's where there are no others."""
        return self.ranks[0].model

    @property
    def kv_events(self) -> KvPublisher | None:
        """Of the first rank: publishes its KV events, while the engine runs."""
        return self.ranks[0].publisher

    # ------------------------------------------------------------------ requests

    def _handle(self, exchange: Exchange) -> None:
        if self._hanging is not None:
            self._hanging.append(exchange)
            return
        label = "none"
        try:
            route = find_route(self.kind, exchange.method, exchange.path)
            label = route.label
            if self._failures and exchange.method == "POST":
                raise ApiError(self._failures.pop(0), "simulated failure")
            route.run(self, exchange)
            status = 200
        except ApiError as refused:
            status = refused.status
            body = refused.anthropic() if exchange.path.startswith("/v1/messages") else refused.body()
            exchange.respond(status, self.headers(b"application/json"), body)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as broken:
            # a body whose inner parts have other types than they should; pydantic would have said which
            status = 400
            error = ApiError(400, f"1 validation error:\n  {broken!r}", kind="Bad Request", param="body", parsing=True)
            if exchange.started:
                exchange.abort()
            else:
                exchange.respond(status, self.headers(b"application/json"), error.body())
        except Moved as moved:
            status = moved.status
            host = exchange.header(b"host") or b""
            exchange.respond(status, [*self.headers(None), (b"location", b"http://%b%b" % (host, moved.path.encode()))], b"")
        except PlainError as plain:
            status = plain.status
            exchange.respond(status, [*self.headers(b"application/json"), *plain.headers], plain.body())
        if exchange.path not in _UNCOUNTED:
            self.ranks[0].metrics.http(label, exchange.method, status)

    def began(self, reply: Reply) -> None:
        self._replies.add(reply)

    def ended(self, reply: Reply) -> None:
        self._replies.discard(reply)

    def rank_for(self, exchange: Exchange) -> Rank:
        """Which rank a request runs on. Raises ApiError for one that is not there."""
        return self._balancer.choose(exchange.header(b"x-data-parallel-rank"))

    def metrics_page(self) -> bytes:
        return write_page([rank.metrics for rank in self.ranks], self.metrics_dialect)

    @property
    def open_requests(self) -> int:
        """Requests being worked on."""
        return len(self._replies)

    # ------------------------------------------------------------------ what answers are made of

    def unix_now_s(self) -> float:
        return self.clock.utc(self.clock.now_s()).timestamp()

    def unix_s(self) -> int:
        return int(self.unix_now_s())

    def hex_id(self) -> str:
        return f"{self.rng.getrandbits(64):016x}"

    def request_id(self, exchange: Exchange, body: Body) -> str:
        """The caller's own id where it gave one, in a header or in the body."""
        header = exchange.header(b"x-request-id")
        return header.decode("latin-1") if header else body.get("request_id") or self.hex_id()

    def headers(self, content_type: bytes | None) -> list[Header]:
        now_s = self.clock.now_s()
        if int(now_s) != self._date[0]:
            self._date = (int(now_s), format_datetime(self.clock.utc(now_s), usegmt=True).encode())
        headers = [(b"date", self._date[1]), (b"server", b"sim-engine")]
        if content_type is not None:
            headers.append((b"content-type", content_type))
        headers += ((b"vary", b"Origin"), (b"x-simulated", b"1"))
        return headers

    def stream_headers(self) -> list[Header]:
        return self.headers(b"text/event-stream; charset=utf-8")

    def load_headers(self, wanted: bytes) -> list[Header]:
        """The load report that a caller asked for (ORCA)."""
        waiting = float(sum(rank.model.waiting for rank in self.ranks))
        usage = sum(rank.model.kv_usage for rank in self.ranks) / len(self.ranks)
        if wanted.strip().lower() == b"json":
            report = f'JSON {{"named_metrics": {{"num_requests_waiting": {waiting}, "kv_cache_usage_perc": {usage}}}}}'
        elif wanted.strip().lower() != b"text":
            return []
        else:
            report = f"TEXT named_metrics.num_requests_waiting={waiting}, named_metrics.kv_cache_usage_perc={usage}"
        return [(b"endpoint-load-metrics", report.encode())]

    def respond_json(self, exchange: Exchange, body: object, extra: Sequence[Header] = ()) -> None:
        exchange.respond(200, [*self.headers(b"application/json"), *extra], msgspec.json.encode(body))

    def refuse_in_stream(self, exchange: Exchange, refused: ApiError) -> None:
        """What vLLM's engine refuses once the stream has begun: status 200, and the error is an event."""
        exchange.start(200, self.stream_headers())
        exchange.end(refused.event() + b"data: [DONE]\n\n")

    def check_model(self, body: Body) -> None:
        """Raises ApiError when another model than the one served is asked for. None is fine, as in vLLM."""
        model = body.get("model")
        if model and model != self.model_name:
            raise unknown_model(model, self.model_name if self.kind == "generate" else None)

    def truncate(self, prompt: list[int], body: Body) -> list[int]:
        """The last ``truncate_prompt_tokens`` tokens; -1: as many as leave room for an answer. Raises ApiError."""
        keep = body.get("truncate_prompt_tokens")
        if keep is not None:
            if keep > self.context:
                message = f"truncate_prompt_tokens={keep} cannot be greater than max_model_len = {self.context}."
                raise invalid(f"{message} Please request a smaller truncation size.", "truncate_prompt_tokens", keep)
            prompt = prompt[max(0, len(prompt) - (self.context - 1 if keep < 0 else keep)) :]
        if not prompt:
            raise refused_by_engine("The decoder prompt cannot be empty")
        return prompt

    def sampling(self, body: Body, prompt: Sequence[int], max_tokens: int | None, forced: str | None) -> Sampling:
        """Raises ApiError."""
        room = self.context - len(prompt)
        if room < 0:
            raise too_long(self.context)
        return sampling(body, max_tokens=max_tokens, room=room, tokenizer=self.tokenizer, forced=forced)

    def choices(self, reply: Reply, prompts: Sequence[Sequence[int]], wanted: Sampling, options: Options) -> list[Choice]:
        """The sequences of a request: ``n`` for each prompt. Raises ApiError when they are too many."""
        check_sequences(options.n * len(prompts))
        made: list[Choice] = []
        for prompt in prompts:
            for index in range(options.n):
                choice = Choice(
                    reply,
                    len(made),
                    prompt,
                    self.speaker.generate(prompt, wanted, index),
                    block_tokens=self.profile.block_size_tokens,
                    salt=options.salt or "",
                    priority=options.priority,
                    limit=wanted.max_tokens,
                )
                made.append(choice)
        return made

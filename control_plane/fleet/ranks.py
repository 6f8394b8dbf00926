"""Data-parallel ranks as targets of their own: several instances behind one address, each with its own batch and cache.

vLLM serves all ranks of a server at one address and takes ``X-data-parallel-rank`` to say which one a request is for. A rank is an
:class:`~control_plane.types.ExecutionInstance` like any other, made here from the registered one; what its owner sets on that, and how
the address is, holds for every rank.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from control_plane.fleet.record import Record
from control_plane.fleet.settings import HealthSettings
from control_plane.fleet.status import StatusBook
from control_plane.live_state import InFlight
from control_plane.types import EngineStats, ExecutionInstance

#: vLLM takes the header from this version on; before, it balances by itself whatever it is told
FIRST_VERSION: Final = (0, 11)
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)")
#: what holds for the address, its process or its owner, and so for every rank
_SHARED: Final = (
    "host",
    "port",
    "url",
    "api_key",
    "model_name",
    "served_models",
    "supported_request_types",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel_size",
    "instance_type",
    "gpu_memory_gb",
    "gpu_utilization",
    "kv_connector",
    "prefilling_config",
    "decoding_config",
    "metadata",
    "price_per_gpu_hour_usd",
    "zone",
    "machine_id",
    "profile",
    "priority_scheduling",
    "kv_events_endpoint",
    "kv_events_replay_endpoint",
)


def takes_header(version: str | None) -> bool:
    """Whether a server of that version sends a request to the rank that it names."""
    told = _VERSION.match(version or "")
    return told is not None and (int(told.group(1)), int(told.group(2))) >= FIRST_VERSION


def rank_id(server_id: str, number: int) -> str:
    return f"{server_id}@{number}"


def make_rank(server: ExecutionInstance, number: int) -> ExecutionInstance:
    """A target for one rank of ``server``; :func:`follow` gives it what is shared."""
    rank = copy.copy(server)
    rank.instance_id = rank_id(server.instance_id, number)
    rank.server, rank.data_parallel_rank, rank.ranks = server, number, ()
    rank.data_parallel_size = 1
    rank.engine, rank.in_flight = EngineStats(prefix_caching=server.engine.prefix_caching), InFlight()
    rank.ahead_requests, rank.ahead_ms, rank.began_s, rank.held_back = 0, 0.0, -math.inf, False
    rank.active_requests = rank.prefilling_active_requests = rank.decoding_active_requests = 0
    rank.current_load = rank.outstanding_ms = rank.others_requests = rank.saturation = 0.0
    rank.avg_latency_ms = rank.throughput_tokens_per_sec = 0.0
    rank.learned_concurrency = None
    return rank


def follow(server: ExecutionInstance) -> None:
    """Give every rank what holds for its server."""
    if not server.ranks:
        return
    for rank in server.ranks:
        for name in _SHARED:
            setattr(rank, name, getattr(server, name))
        rank.gpu_count = max(1, server.world_size // len(server.ranks))
    follow_state(server)


def follow_state(server: ExecutionInstance) -> None:
    """What may change at any time: its health, its owner's wish, and its cap. The cap is the address's, so it is shared out."""
    cap, count = server.max_concurrent_requests, len(server.ranks)
    for at, rank in enumerate(server.ranks):
        rank.health_status = server.health_status
        rank.is_available = server.is_available
        rank.max_concurrent_requests = None if cap is None else cap // count + (at < cap % count)


class RankBook:
    """The ranks of all servers that tell theirs, by their own ids.

    Args:
        servers: what is registered, by id: no rank takes an id from there.
        changed: called when there are other targets.
        left: called with the record of a rank that is no more.
    """

    def __init__(
        self,
        settings: HealthSettings,
        status: StatusBook,
        servers: Mapping[str, Record],
        changed: Callable[[], None],
        left: Callable[[Record], None],
    ) -> None:
        self.records: dict[str, Record] = {}
        self._settings = settings
        self._status = status
        self._servers = servers
        self._changed = changed
        self._left = left

    def told(self, record: Record) -> None:
        """A server told which ranks it has: each is a target of its own, where it sends a request to the one that is named."""
        instance = record.instance
        version = instance.engine.version
        # a version that could not be asked for once is no reason to forget what its ranks hold
        sends = takes_header(version) or (version is None and bool(record.ranks))
        wanted = record.server_ranks if sends and len(record.server_ranks) > 1 else ()
        known = {rank.instance.data_parallel_rank: rank for rank in record.ranks}
        if tuple(known) == wanted:
            follow(instance)
            return
        if any(rank_id(instance.instance_id, number) in self._servers for number in wanted):
            return
        self.unregister(record)
        gone = [rank for number, rank in known.items() if number not in wanted]
        record.ranks = [known.get(number) or Record(make_rank(instance, number), self._settings) for number in wanted]
        instance.ranks = tuple(rank.instance for rank in record.ranks)
        self.register(record)
        for rank in gone:
            self._status.forget(rank.instance)
            self._left(rank)
        instance.learned_concurrency = None
        count = len(wanted)
        said = f"has {count} data-parallel ranks, each a target of its own" if count else "does not tell its ranks apart any more"
        self._status.say(record, "data_parallel_ranks", said, ranks=count)
        self._changed()
        self._status.changed(instance)

    def register(self, server: Record) -> None:
        for rank in server.ranks:
            self.records[rank.instance.instance_id] = rank

    def unregister(self, server: Record) -> None:
        for rank in server.ranks:
            del self.records[rank.instance.instance_id]

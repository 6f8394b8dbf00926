"""Data-parallel ranks behind one server: an engine each, with its own batch, KV cache and figures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from control_plane.engines.model import EngineModel
from control_plane.sim_engine.errors import refused_by_engine
from control_plane.sim_engine.pump import Pump

if TYPE_CHECKING:
    from control_plane.sim_engine.kv_events import KvPublisher
    from control_plane.sim_engine.metrics import EngineMetrics


class Rank:
    """One of them. ``pump`` runs it once the server was started; ``publisher`` tells its KV events, where any are asked for."""

    __slots__ = ("_pump", "metrics", "model", "publisher")

    def __init__(self, model: EngineModel, metrics: EngineMetrics) -> None:
        self.model = model
        self.metrics = metrics
        self.publisher: KvPublisher | None = None
        self._pump: Pump | None = None

    def start(self, loop: asyncio.AbstractEventLoop, speed: float) -> None:
        self._pump = Pump(self.model, self.metrics, loop, speed)

    def publish(self, publisher: KvPublisher) -> None:
        """What comes into its cache and leaves it is told there from now on."""
        self.publisher = self.pump.kv_events = self.model.blocks.listener = publisher

    def close(self) -> None:
        self.pump.close()
        if self.publisher is not None:
            self.publisher.close()

    @property
    def pump(self) -> Pump:
        if self._pump is None:
            raise RuntimeError("the engine was not started")
        return self._pump

    @property
    def load(self) -> int:
        return self.model.running + self.model.waiting


class Balancer:
    """Chooses a rank: the one that the caller names, else, as vLLM's own does, the one with the fewest requests; equal ones take turns."""

    __slots__ = ("_ranks", "_turn")

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        self._turn = 0

    def choose(self, header: bytes | None) -> Rank:
        """``header``: of ``X-data-parallel-rank``; what is no number is no wish, as in vLLM. Raises ApiError for one out of range."""
        ranks = self._ranks
        if header is not None and (text := header.strip()).removeprefix(b"-").isdigit():
            number = int(text)
            if not 0 <= number < len(ranks):
                raise refused_by_engine(f"data_parallel_rank {number} is out of range [0, {len(ranks)}).")
            return ranks[number]
        order = [*ranks[self._turn :], *ranks[: self._turn]]
        self._turn = (self._turn + 1) % len(ranks)
        return min(order, key=lambda rank: rank.load)

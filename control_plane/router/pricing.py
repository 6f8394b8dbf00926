"""What a request costs on each candidate, in predicted milliseconds, by part: to itself, to those that run there, and to the cache.

    waiting   the steps of the prompts ahead of it there, and where the KV cache is full the time until enough of it is free
    prefill   the steps that compute its tokens that are not cached there
    decode    its expected answer at the batch that it makes
    delay     to those in flight there: its prefill stalls each of them, and each of their further steps gets longer; to those who
              come while it waits; and to as many as an instance has on average, who come later: time spent computing is gone for all
    eviction  prefill of what its blocks push out of the cache, as far as that is expected to be asked for again

The sum is what the fleet's requests lose together by this placement. ``delay`` generalises LMetric's (uncached tokens) x (batch + 1),
``eviction`` is Preble's, ``waiting`` Mooncake's queue time; each has a unit here, so there is no weight to tune.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from control_plane.live_state import LiveState
from control_plane.protocols import FleetView
from control_plane.router.placement import Placement, recorded, recorded_order, sample_note
from control_plane.types import Candidate, ExecutionInstance, RequestMetadata

#: who come while it waits, and wait behind it
FOLLOWERS: Final = 5.0
#: other control planes' requests for each of ours, at most, as far as what they do is guessed from what we do
MOST_OTHERS: Final = 4.0
PARTS: Final = ("waiting", "prefill", "decode", "delay", "eviction")


class Prices:
    """Of ``seen``, in this order; all milliseconds but ``cached_tokens``."""

    __slots__ = ("cached_tokens", "decode", "delay", "eviction", "prefill", "seen", "step", "waiting")

    def __init__(self, seen: Sequence[ExecutionInstance], cached_tokens: list[int]) -> None:
        self.seen = seen
        self.cached_tokens = cached_tokens
        self.waiting: list[float] = []
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.delay: list[float] = []
        self.eviction: list[float] = []
        #: one decode step with the request in the batch
        self.step: list[float] = []

    def totals(self) -> list[float]:
        waiting, prefill, decode, delay, eviction = self.waiting, self.prefill, self.decode, self.delay, self.eviction
        return [waiting[at] + prefill[at] + decode[at] + delay[at] + eviction[at] for at in range(len(waiting))]

    def first_tokens(self) -> list[float]:
        """Predicted milliseconds to the first token."""
        waiting, prefill = self.waiting, self.prefill
        return [waiting[at] + prefill[at] for at in range(len(waiting))]

    def parts_of(self, at: int) -> dict[str, float]:
        """By the names in PARTS, with the tokens believed cached."""
        return {
            "waiting": self.waiting[at],
            "prefill": self.prefill[at],
            "decode": self.decode[at],
            "delay": self.delay[at],
            "eviction": self.eviction[at],
            "cached_tokens": float(self.cached_tokens[at]),
        }


class PricedPlacement(Placement):
    """One whose candidates come with the parts of their price; written out when somebody looks at them."""

    __slots__ = ("_at", "_prices", "_rule", "_scores_ms", "_there_are")

    def __init__(self, prices: Prices, scores_ms: list[float], at: int, there_are: int, rule: str) -> None:
        """``at``: which was chosen, of ``there_are`` candidates; ``rule``: the reason's beginning."""
        super().__init__(prices.seen[at], scores_ms[at], service_ms=prices.prefill[at] + prices.decode[at])
        self._prices = prices
        self._scores_ms = scores_ms
        self._at = at
        self._there_are = there_are
        self._rule = rule

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return recorded(self._prices.seen, self._scores_ms, self._at)

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        prices = self._prices
        order = recorded_order(self._scores_ms, self._at)
        return {prices.seen[at].instance_id: prices.parts_of(at) for at in order}

    @property
    def reason(self) -> str:
        prices, at = self._prices, self._at
        cached = prices.cached_tokens[at]
        held = f", {cached} tokens cached there" if cached else ""
        most = max(prices.cached_tokens)
        passed = f" (another holds {most}, and would cost more)" if most > cached else ""
        note = sample_note(len(prices.seen), self._there_are)
        return f"{self._rule}, {self.predicted_ms:.0f} ms{held}{passed}, of {len(prices.seen)}{note}"


def priced(request: RequestMetadata, seen: Sequence[ExecutionInstance], view: FleetView) -> Prices:
    """The price of ``request`` on each of ``seen``. Pure."""
    predictor, prefixes = view.predictor, view.prefixes
    inputs = predictor.input_tokens(request)
    outputs = predictor.output_tokens(request)
    found = Prices(seen, prefixes.cached_tokens_of(request, seen))
    batches = batches_of(seen)
    usual = sum(batches) / len(batches)
    told = predictor.newcomers_ms(seen, found.cached_tokens, inputs)
    for at, instance in enumerate(seen):
        live: LiveState = instance
        # the engine computes at least the last token anew
        uncached = max(1, inputs - found.cached_tokens[at])
        ahead_ms, prefill_ms, stall_ms, tpot_ms, marginal_ms = told[at]
        batch = batches[at]
        # the predictor has ours in the batch, and those of others that the scrape knew
        told_of: float = live.active_requests + live.others_requests
        tpot_ms += (batch - told_of) * marginal_ms
        awaited_ms: float = live.awaited_ms
        waiting_ms = ahead_ms + awaited_ms + _for_room_ms(instance, batch, uncached + outputs)
        found.waiting.append(waiting_ms)
        found.prefill.append(prefill_ms)
        found.decode.append(outputs * tpot_ms)
        found.step.append(tpot_ms)
        found.delay.append((batch + usual) * stall_ms + batch * outputs * marginal_ms + FOLLOWERS * waiting_ms)
        lost = prefixes.lost_tokens(instance, uncached + outputs)
        # computed again it will stall as many as are there now
        found.eviction.append((1.0 + batch + usual) * lost * stall_ms / uncached if lost else 0.0)
    return found


def batches_of(seen: Sequence[ExecutionInstance]) -> list[float]:
    """Requests on each of them: ours, first hand, and other control planes'.

    Theirs are known from scrapes, seconds late. Meanwhile they see what we see and decide as we do, so since the scrape they are taken to
    have added and ended as we have, in proportion to their share of the whole: two that find the same instance idle fill it together, not
    twice.
    """
    ours = theirs = 0.0
    for instance in seen:
        live: LiveState = instance
        ours += live.active_requests
        theirs += live.others_requests
    if theirs <= 0.0:
        return [float(instance.active_requests) for instance in seen]
    share = min(MOST_OTHERS, theirs / max(1.0, ours))
    found: list[float] = []
    for instance in seen:
        there: LiveState = instance
        active: float = there.active_requests
        others: float = there.others_requests
        ours_then = float(instance.engine.ours)
        found.append(active + max(0.0, others + share * (active - ours_then)))
    return found


def _for_room_ms(instance: ExecutionInstance, in_flight: float, wanted_tokens: int) -> float:
    """Until the KV cache has room for ``wanted_tokens`` more, of which the engine did not know at its last scrape: those in flight end
    at even distances over the mean latency seen there, and each gives back its share of what is used. 0.0 where nothing is told."""
    stats = instance.engine
    blocks, size = stats.kv_block_count, stats.kv_block_size_tokens
    if not blocks or not size or in_flight < 1.0:
        return 0.0
    capacity = float(blocks * size)
    used = stats.kv_cache_usage * capacity
    over = used + wanted_tokens - capacity
    if over <= 0.0:
        return 0.0
    latency_ms: float = instance.avg_latency_ms
    return min(1.0, over / max(used, 1.0)) * latency_ms

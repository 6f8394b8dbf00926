"""A fleet whose prices can be worked out by hand: round speeds, told caches, told work in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from control_plane.protocols import Queued
from control_plane.types import ExecutionInstance, RequestMetadata
from control_plane.view import NoPrefixes, StaticView

#: of :class:`RoundNumbers`
FIXED_MS = 10.0
OUTPUT_TOKENS = 100


class RoundNumbers:
    """Prefill 10 ms + 1 ms a token, decode steps of 20 ms + 1 ms for each request in the batch, answers of 100 tokens. Whoever comes waits
    for what is queued; a prompt stalls the others for 1 ms a token."""

    def __init__(self) -> None:
        self.in_queue: dict[str, Queued] = {}

    def input_tokens(self, request: RequestMetadata) -> int:
        return request.input_tokens or 0

    def output_tokens(self, request: RequestMetadata) -> int:
        return OUTPUT_TOKENS

    def prefill_ms(self, instance: ExecutionInstance, tokens: int) -> float:
        return FIXED_MS + tokens

    def tpot_ms(self, instance: ExecutionInstance) -> float:
        return 20.0 + instance.active_requests + 1

    def wait_ms(self, instance: ExecutionInstance) -> float:
        return self.queued(instance).prompt_tokens

    def queued(self, instance: ExecutionInstance) -> Queued:
        return self.in_queue.get(instance.instance_id) or Queued(0.0, 0.0, 0.0)

    def newcomers_ms(
        self, instances: Sequence[ExecutionInstance], cached_tokens: Sequence[int], prompt_tokens: int
    ) -> list[tuple[float, float, float, float, float]]:
        uncached = [prompt_tokens - cached for cached in cached_tokens]
        return [
            (self.wait_ms(one), self.prefill_ms(one, tokens), float(tokens), self.tpot_ms(one), 1.0)
            for one, tokens in zip(instances, uncached, strict=True)
        ]

    def service_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        return self.prefill_ms(instance, self.input_tokens(request)) + OUTPUT_TOKENS * self.tpot_ms(instance)

    def cost_usd(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        return 0.0


class ToldPrefixes(NoPrefixes):
    """Holds what it is told, for every request alike."""

    def __init__(self, cached: Mapping[str, int] | None = None, lost_share: Mapping[str, float] | None = None) -> None:
        self.cached = dict(cached or {})
        self.lost_share = dict(lost_share or {})

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        return self.cached.get(instance.instance_id, 0)

    def cached_tokens_of(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
        return [self.cached_tokens(request, instance) for instance in instances]

    def lost_tokens(self, instance: ExecutionInstance, tokens: int) -> float:
        return self.lost_share.get(instance.instance_id, 0.0) * tokens


class World:
    """Instances ``a``, ``b``, ... with their requests in flight, and the view over them."""

    def __init__(self, *in_flight: int, cached: Mapping[str, int] | None = None, lost_share: Mapping[str, float] | None = None) -> None:
        self.instances = [ExecutionInstance(chr(97 + k), model_name="m", active_requests=n) for k, n in enumerate(in_flight)]
        self.prefixes = ToldPrefixes(cached, lost_share)
        self.predictor = RoundNumbers()
        self.view = StaticView(self.instances, predictor=self.predictor, prefixes=self.prefixes)

    def queued(self, instance_id: str, tokens: int) -> None:
        """A request is there that has shown no token yet, with so many to prefill."""
        self._add(instance_id, Queued(1.0, tokens, tokens))

    def decoding(self, instance_id: str, context_tokens: int) -> None:
        self._add(instance_id, Queued(0.0, 0.0, context_tokens))

    def _add(self, name: str, more: Queued) -> None:
        had = self.predictor.in_queue.get(name) or Queued(0.0, 0.0, 0.0)
        self.predictor.in_queue[name] = Queued(
            had.prompts + more.prompts, had.prompt_tokens + more.prompt_tokens, had.context_tokens + more.context_tokens
        )


def asking(tokens: int, **fields: object) -> RequestMetadata:
    return RequestMetadata(request_id="r", model_name="m", input_tokens=tokens, **fields)  # type: ignore[arg-type]

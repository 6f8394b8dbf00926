"""What is said of a request before it is sent."""

from __future__ import annotations


class Forecast:
    """What is expected of a request on one instance. ``ttft_ms`` counts from sending it there and is the sum of the way there, ``wait_ms``
    and ``prefill_ms``, times ``correction``; ``service_ms`` is what remains of it all without waiting."""

    __slots__ = ("cached_tokens", "correction", "delay_ms", "output_tokens", "prefill_ms", "service_ms", "tpot_ms", "ttft_ms", "wait_ms")

    def __init__(
        self,
        cached_tokens: int,
        delay_ms: float,
        wait_ms: float,
        prefill_ms: float,
        correction: float,
        tpot_ms: float,
        output_tokens: float,
    ) -> None:
        self.cached_tokens = cached_tokens
        self.delay_ms = delay_ms
        self.wait_ms = wait_ms
        self.prefill_ms = prefill_ms
        self.correction = correction
        self.ttft_ms = (delay_ms + wait_ms + prefill_ms) * correction
        self.tpot_ms = tpot_ms
        self.output_tokens = output_tokens
        self.service_ms = prefill_ms + output_tokens * tpot_ms

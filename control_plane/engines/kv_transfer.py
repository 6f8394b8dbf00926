"""KV that one modelled engine hands to another: how long its blocks take on the way, and who holds them until they are there.

As vLLM's NIXL connector does it: the engine that computed a prompt keeps its blocks after its answer, the other one pulls them into
blocks of its own, whole blocks only, while it goes on with others, and the first one frees its blocks when they have been fetched::

    first = ModelSequence(prompt_tokens, 1, block_hashes=hashes, keep_kv=True)     # a prefill leg: one token
    ...                                                                            # it has finished on `one`
    handoff = one.hand_over(first, link)
    two.add(ModelSequence(prompt_tokens, output_tokens, block_hashes=hashes, remote=handoff), now_s)
"""

from __future__ import annotations

from collections.abc import Callable


class KvLink:
    """The way between two engines; it carries one transfer after the other.

    Args:
        bandwidth_gb_s: 10^9 bytes a second in one direction, of all ranks together (a 400 Gbit/s NIC a GPU: 50 each).
        latency_s: from the request for blocks until they begin to come, and until the notice that they are there.
    """

    __slots__ = ("bandwidth_gb_s", "free_s", "latency_s")

    def __init__(self, bandwidth_gb_s: float, latency_s: float = 0.0) -> None:
        if not bandwidth_gb_s > 0.0 or not latency_s >= 0.0:
            raise ValueError(f"a link has a bandwidth above 0 and a latency of 0 or more: {bandwidth_gb_s}, {latency_s}")
        self.bandwidth_gb_s = bandwidth_gb_s
        self.latency_s = latency_s
        #: when the last byte so far has left
        self.free_s = 0.0

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds that so many bytes take on an idle link."""
        return self.latency_s + size_bytes / (self.bandwidth_gb_s * 1e9)

    def send(self, now_s: float, size_bytes: float) -> float:
        """Begin a transfer. Returns when all of it is there."""
        begin_s = max(now_s, self.free_s)
        self.free_s = begin_s + size_bytes / (self.bandwidth_gb_s * 1e9)
        return self.free_s + self.latency_s


class KvHandoff:
    """The KV of the first ``tokens`` tokens of a sequence, on another engine, until it is released.

    Args:
        tokens: whole blocks are fetched of them.
        link: the way to it.
        release: told once, with the time, when it is no longer needed (the other engine frees its blocks).
    """

    __slots__ = ("_release", "link", "tokens")

    def __init__(self, tokens: int, link: KvLink, release: Callable[[float], None] | None = None) -> None:
        self.tokens = tokens
        self.link = link
        self._release = release

    def release(self, now_s: float) -> None:
        """It was fetched, or will never be."""
        told, self._release = self._release, None
        if told is not None:
            told(now_s)

"""What the engine model works on and tells: a sequence and where it stands, a run of steps, what a run brought, totals."""

from __future__ import annotations

from collections.abc import Sequence

from mypy_extensions import mypyc_attr

from control_plane.engines.kv_transfer import KvHandoff
from control_plane.engines.state import State


@mypyc_attr(allow_interpreted_subclasses=True)
class ModelSequence:
    """One sequence to run. Subclass it to carry what belongs to it (a stream, a request).

    ``output_tokens`` is how many it will generate (the caller knows its text; 0: a pooling request, done when its prompt is
    computed). ``block_hashes``: one hash for each full block of its tokens, prompt first, as far as they are known; two sequences
    share a block when they give the same hash. Empty: nothing of it is cached. ``priority``: lower first, as in vLLM. ``remote``: the
    KV of its first tokens is on another engine and is fetched. ``keep_kv``: its blocks stay when it finishes, to be handed over.
    """

    __slots__ = (
        "arrival_s",
        "block_hashes",
        "cached_tokens",
        "computed",
        "fetched_tokens",
        "finish_step",
        "finished_s",
        "first_token_s",
        "generated",
        "held",
        "joined_step",
        "keep_kv",
        "order",
        "output_tokens",
        "preemptions",
        "priority",
        "prompt_tokens",
        "remote",
        "scheduled_s",
        "state",
    )

    def __init__(
        self,
        prompt_tokens: int,
        output_tokens: int,
        *,
        block_hashes: Sequence[int] = (),
        priority: int = 0,
        remote: KvHandoff | None = None,
        keep_kv: bool = False,
    ) -> None:
        if prompt_tokens < 1 or output_tokens < 0:
            raise ValueError(
                f"a sequence has at least one prompt token and no fewer than 0 output tokens: {prompt_tokens}, {output_tokens}"
            )
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.block_hashes = block_hashes
        self.priority = priority
        self.remote = remote
        self.keep_kv = keep_kv
        self.state: State = State.NEW
        #: place in the order of arrival
        self.order = 0
        #: tokens whose KV is in the cache; up to date between runs while prefilling, as of ``joined_step`` while decoding
        self.computed = 0
        #: output tokens so far, likewise
        self.generated = 0
        self.joined_step = 0
        self.finish_step = 0
        #: hashes of the cached blocks it uses, from its first block on
        self.held: list[int] = []
        #: prompt tokens found in the prefix cache, or fetched from another engine, at first admission
        self.cached_tokens = 0
        #: of these, how many were fetched
        self.fetched_tokens = 0
        self.preemptions = 0
        self.arrival_s = 0.0
        self.scheduled_s = 0.0
        self.first_token_s = 0.0
        self.finished_s = 0.0

    def hashes(self, blocks: int) -> Sequence[int]:
        """Hashes of the first ``blocks`` full blocks, fewer where they are not known. For overriding: compute them late."""
        return self.block_hashes[:blocks]

    @property
    def tokens(self) -> int:
        """Tokens to be computed before the next one can be sampled (a resumed sequence computes its output again)."""
        return self.prompt_tokens + self.generated


class Run:
    """``steps`` steps with one batch, from ``start_s`` to ``end_s``; their durations grow evenly from ``first_s`` to ``last_s``."""

    __slots__ = ("chunks", "end_s", "first_s", "last_s", "prefill_tokens", "start_s", "steps")

    def __init__(self, start_s: float, steps: int, first_s: float, last_s: float, chunks: list[tuple[ModelSequence, int]]) -> None:
        self.start_s = start_s
        self.steps = steps
        self.first_s = first_s
        self.last_s = last_s
        #: prompt parts computed in this run (then it has one step): the sequence and how many tokens of it
        self.chunks = chunks
        self.prefill_tokens = 0
        for _, tokens in chunks:
            self.prefill_tokens += tokens
        self.end_s = start_s + self.elapsed_s(steps)

    def elapsed_s(self, steps: int) -> float:
        """Duration of the first ``steps`` of them."""
        if self.steps == 1 or steps == 1:
            return steps * self.first_s
        growth = (self.last_s - self.first_s) / (self.steps - 1)
        return steps * self.first_s + growth * steps * (steps - 1) / 2

    def cut(self, now_s: float) -> None:
        """End with the step in progress at ``now_s``."""
        low, high = 1, self.steps
        while low < high:
            middle = (low + high) // 2
            if self.start_s + self.elapsed_s(middle) >= now_s:
                high = middle
            else:
                low = middle + 1
        if low < self.steps:
            end_s = self.start_s + self.elapsed_s(low)
            self.last_s = self.first_s + (self.last_s - self.first_s) * (low - 1) / (self.steps - 1)
            self.steps = low
            self.end_s = end_s


class Done:
    """What a run brought. Every sequence that was decoding got ``steps`` tokens, the first at ``first_s``, the last at ``last_s``."""

    __slots__ = ("decoded", "finished", "first_s", "last_s", "started", "steps")

    def __init__(
        self, steps: int, first_s: float, last_s: float, decoded: int, started: list[ModelSequence], finished: list[ModelSequence]
    ) -> None:
        self.steps = steps
        self.first_s = first_s
        self.last_s = last_s
        #: decoding sequences in this run
        self.decoded = decoded
        #: their prompt was completed and gave one token (none for a pooling request), at ``last_s``
        self.started = started
        self.finished = finished


class Counters:
    """Totals since the start, in the meanings of vLLM's metrics of the same names."""

    __slots__ = ("fetched_tokens", "generation_tokens", "preemptions", "prefix_hits", "prefix_queries", "prompt_tokens", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        #: tokens whose KV came from other engines
        self.fetched_tokens = 0

"""A vLLM engine in time: which sequence runs in which step, how long a step takes, what the KV cache holds. No sockets, no clock.

It follows vLLM 0.32's scheduler (v1/core/sched/scheduler.py): running sequences first, one token each; then, within the token
budget, the rest of a prompt that was begun, then waiting prompts in order (first come first served, or by priority), whole prompts
cut into chunks where the budget ends; a prompt is admitted only when the KV cache has room for all of it; cached prefix blocks are
not computed again, except that the last token always is; when a running sequence finds no block, the last admitted (or the least
urgent) is thrown out, loses its KV and waits at the head of the queue.

Decoding sequences are accounted for together, so a run of a thousand steps in which the batch does not change costs as much as one:
what differs between them (context, block boundaries, last step) follows from the step at which each joined. A server plans runs of
one step; a simulator plans long ones and lets :meth:`EngineModel.add` and :meth:`~EngineModel.abort` cut them short::

    run = model.plan(now_s, max_steps=10_000)     # None: idle
    ...                                           # at run.end_s (it moves forward when a sequence arrives meanwhile):
    done = model.complete()                       # who got a first token, who finished; the rest got done.steps tokens each

Left out: speculative decoding, LoRA, multi-modal encoders, KV transfer, hybrid attention, data parallel ranks, asynchronous
scheduling's one step of lag.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, ValuesView
from random import Random

from control_plane.engines.kv_blocks import KvBlocks
from control_plane.engines.sequence import Counters, Done, ModelSequence, Run, State
from control_plane.roofline import EngineProfile, step_s

__all__ = ["Counters", "Done", "EngineModel", "ModelSequence", "Run", "State", "StepTime"]

#: ``step_s`` of roofline.py, or one that was fitted to a real engine
StepTime = Callable[..., float]


class EngineModel:
    """One engine. All times are the caller's seconds; nothing happens but in the calls below.

    Args:
        profile: sizes and speeds.
        scheduling: ``"fcfs"`` or ``"priority"`` (vLLM's ``--scheduling-policy``).
        caching: keep prefix blocks.
        block_count: KV blocks, where they are known better than the profile reckons.
        rng, jitter: each run's duration is multiplied by a lognormal factor of that sigma, drawn from ``rng``, less for long runs.
        step_time: seconds of one step (see :func:`control_plane.roofline.step_s`).
    """

    def __init__(
        self,
        profile: EngineProfile,
        *,
        scheduling: str = "fcfs",
        caching: bool = True,
        block_count: int | None = None,
        rng: Random | None = None,
        jitter: float = 0.0,
        step_time: StepTime = step_s,
    ) -> None:
        if scheduling not in ("fcfs", "priority"):
            raise ValueError(f"scheduling {scheduling!r} is not one of fcfs, priority")
        if jitter and rng is None:
            raise ValueError("jitter needs an rng")
        if profile.max_num_batched_tokens < profile.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs: each running sequence gets one token a step")
        self.profile = profile
        self.by_priority = scheduling == "priority"
        self.blocks = KvBlocks(profile.kv_block_count if block_count is None else block_count, caching=caching)
        self.counters = Counters()
        self.run: Run | None = None
        self._rng = rng
        self._jitter = jitter
        self._step_time = step_time
        self._block_tokens = profile.block_size_tokens
        self._waiting: deque[ModelSequence] = deque()
        self._waiting_heap: list[tuple[int, int, ModelSequence]] = []
        self._waiting_count = 0
        #: admitted, in order of admission
        self._running: dict[int, ModelSequence] = {}
        self._prefilling: dict[int, ModelSequence] = {}
        self._decoding: dict[int, ModelSequence] = {}
        self._ends: list[tuple[int, int, ModelSequence]] = []
        self._leaving: list[ModelSequence] = []
        #: sequences that need a new block when step number % block size is the index
        self._boundary = [0] * profile.block_size_tokens
        self._context_tokens = 0
        self._step = 0
        self._arrivals = 0

    # ------------------------------------------------------------------ what can be asked

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return self._waiting_count

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting_count

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1 (cached but unused blocks count as free)."""
        return 1.0 - self.blocks.free / self.blocks.total

    @property
    def decoding(self) -> ValuesView[ModelSequence]:
        """The sequences that get a token in every step of the present run."""
        return self._decoding.values()

    def generated(self, sequence: ModelSequence) -> int:
        """Output tokens of a sequence as of the last completed run."""
        if sequence.state is State.DECODE:
            return sequence.generated + self._step - sequence.joined_step
        return sequence.generated

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """True when the KV cache could ever hold such a sequence."""
        return self._block_count(prompt_tokens + max(0, output_tokens - 1)) <= self.blocks.total

    # ------------------------------------------------------------------ what can be done

    def add(self, sequence: ModelSequence, now_s: float) -> None:
        """A sequence arrives and waits. A long run is cut at the step in progress when the newcomer might join.

        Raises ValueError when it could never fit, or was added before.
        """
        if sequence.state is not State.NEW:
            raise ValueError(f"the sequence is {sequence.state.value}, not new")
        if not self.fits(sequence.prompt_tokens, sequence.output_tokens):
            raise ValueError(f"{sequence.prompt_tokens} + {sequence.output_tokens} tokens do not fit in {self.blocks.total} KV blocks")
        sequence.arrival_s = now_s
        sequence.order = self._arrivals
        self._arrivals += 1
        if self.run is not None and len(self._running) < self.profile.max_num_seqs and (self.by_priority or not self._waiting_count):
            self.run.cut(now_s)
        self._wait(sequence)

    def abort(self, sequence: ModelSequence, now_s: float) -> bool:
        """The client left. A waiting sequence goes at once, a running one at the end of the step in progress. False: it was not
        here, or is leaving already."""
        if sequence.state is State.WAITING:
            self._unwait(sequence)
            sequence.state = State.ABORTED
            return True
        if sequence.state not in (State.PREFILL, State.DECODE) or sequence in self._leaving:
            return False
        if self.run is None:
            self._drop(sequence, State.ABORTED)
        else:
            self._leaving.append(sequence)
            self.run.cut(now_s)
        return True

    def plan(self, now_s: float, max_steps: int = 1) -> Run | None:
        """Begin the next run at ``now_s``; None when there is nothing to do. Raises RuntimeError while a run is under way."""
        if self.run is not None:
            raise RuntimeError("complete() the present run first")
        preempted = self._make_room()
        decoding = len(self._decoding)
        if decoding:
            self.blocks.allocate(self._boundary[self._step % self._block_tokens])
        context_tokens = self._context_tokens
        chunks, prefix_tokens = self._schedule_prompts(now_s, self.profile.max_num_batched_tokens - decoding, admit=not preempted)
        if not decoding and not chunks:
            return None
        steps = 1 if chunks or max_steps == 1 else self._steps_without_change(max_steps)
        prefill_tokens = sum(tokens for _, tokens in chunks)
        factor = 1.0 if not self._jitter or self._rng is None else math.exp(self._rng.gauss(0.0, self._jitter / math.sqrt(steps)))
        first_s = factor * self._step_time(
            self.profile,
            prefill_tokens=prefill_tokens,
            prefill_context_tokens=prefix_tokens,
            decode_sequences=decoding,
            decode_context_tokens=context_tokens,
            prefill_sequences=len(chunks) or 1,
        )
        last_s = first_s
        if steps > 1:
            last_s = factor * self._step_time(
                self.profile,
                prefill_tokens=0,
                prefill_context_tokens=0,
                decode_sequences=decoding,
                decode_context_tokens=context_tokens + decoding * (steps - 1),
            )
        self.run = Run(now_s, steps, first_s, last_s, chunks)
        return self.run

    def complete(self) -> Done:
        """The present run has ended, at its ``end_s``. Raises RuntimeError when there is none."""
        run = self.run
        if run is None:
            raise RuntimeError("no run is under way")
        self.run = None
        decoded = len(self._decoding)
        if decoded and run.steps > 1:
            self.blocks.allocate(self._blocks_needed(self._step + 1, run.steps - 1))
        self._step += run.steps
        self._context_tokens += decoded * run.steps
        self.counters.steps += run.steps
        self.counters.generation_tokens += decoded * run.steps
        for sequence in self._leaving:
            self._drop(sequence, State.ABORTED)
        self._leaving.clear()
        finished = self._finish_due(run.end_s)
        started = self._finish_chunks(run, finished)
        return Done(run.steps, run.start_s + run.first_s, run.end_s, decoded, started, finished)

    # ------------------------------------------------------------------ the queue

    def _wait(self, sequence: ModelSequence, *, front: bool = False) -> None:
        sequence.state = State.WAITING
        self._waiting_count += 1
        if self.by_priority:
            heapq.heappush(self._waiting_heap, (sequence.priority, sequence.order, sequence))
        elif front:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def _unwait(self, sequence: ModelSequence) -> None:
        self._waiting_count -= 1
        if self.by_priority:
            self._waiting_heap.remove((sequence.priority, sequence.order, sequence))
            heapq.heapify(self._waiting_heap)
        else:
            self._waiting.remove(sequence)

    def _next_waiting(self) -> ModelSequence | None:
        if not self._waiting_count:
            return None
        return self._waiting_heap[0][2] if self.by_priority else self._waiting[0]

    def _take_waiting(self) -> None:
        self._waiting_count -= 1
        if self.by_priority:
            heapq.heappop(self._waiting_heap)
        else:
            self._waiting.popleft()

    # ------------------------------------------------------------------ prompts

    def _schedule_prompts(self, now_s: float, budget: int, *, admit: bool) -> tuple[list[tuple[ModelSequence, int]], int]:
        """Chunks for this step, and how many tokens stand before them in their sequences."""
        chunks: list[tuple[ModelSequence, int]] = []
        prefix_tokens = 0
        for sequence in list(self._prefilling.values()):
            tokens = min(sequence.tokens - sequence.computed, budget)
            if tokens <= 0:
                break
            self._grow(sequence, tokens)
            chunks.append((sequence, tokens))
            prefix_tokens += sequence.computed - tokens
            budget -= tokens
        while admit and budget > 0 and len(self._running) < self.profile.max_num_seqs:
            waiting = self._next_waiting()
            if waiting is None or not self._admit(waiting, now_s):
                break
            tokens = min(waiting.tokens - waiting.computed, budget)
            self._grow(waiting, tokens)
            chunks.append((waiting, tokens))
            prefix_tokens += waiting.computed - tokens
            budget -= tokens
        return chunks, prefix_tokens

    def _admit(self, sequence: ModelSequence, now_s: float) -> bool:
        """Take it from the queue with the prefix blocks that are cached, if the whole prompt has room."""
        known = sequence.hashes((sequence.tokens - 1) // self._block_tokens)
        hits = known[: self.blocks.match(known)]
        wanted = self._block_count(sequence.tokens) - len(hits) + self.blocks.evictable_among(hits)
        if wanted > self.blocks.free:
            return False
        self._take_waiting()
        self.blocks.acquire(hits)
        sequence.held = list(hits)
        sequence.computed = len(hits) * self._block_tokens
        if not sequence.preemptions:
            sequence.scheduled_s = now_s
            sequence.cached_tokens = sequence.computed
            self.counters.prefix_queries += sequence.tokens
            self.counters.prefix_hits += sequence.computed
        sequence.state = State.PREFILL
        self._running[sequence.order] = sequence
        self._prefilling[sequence.order] = sequence
        return True

    def _grow(self, sequence: ModelSequence, tokens: int) -> None:
        """Blocks for the next ``tokens`` of a prompt; its full blocks are cached from now on."""
        computed = sequence.computed + tokens
        self.blocks.allocate(self._block_count(computed) - self._block_count(sequence.computed))
        sequence.computed = computed
        self._publish(sequence)

    def _publish(self, sequence: ModelSequence) -> None:
        """Cache its full blocks, as far as their hashes are known."""
        full = sequence.computed // self._block_tokens
        held = sequence.held
        if self.blocks.caching and len(held) < full:
            for content in sequence.hashes(full)[len(held) :]:
                self.blocks.publish(content)
                held.append(content)

    def _finish_chunks(self, run: Run, finished: list[ModelSequence]) -> list[ModelSequence]:
        """Sequences whose prompt this run completed: they have their first token, and decode from the next step on."""
        started: list[ModelSequence] = []
        for sequence, tokens in run.chunks:
            if sequence.state is not State.PREFILL:
                continue
            self.counters.prompt_tokens += tokens
            if sequence.computed < sequence.tokens:
                continue
            started.append(sequence)
            if sequence.output_tokens:
                sequence.generated += 1
                self.counters.generation_tokens += 1
                if sequence.generated == 1:
                    sequence.first_token_s = run.end_s
            if sequence.generated >= sequence.output_tokens:
                sequence.finished_s = run.end_s
                finished.append(sequence)
                self._drop(sequence, State.FINISHED)
            else:
                self._join(sequence)
        return started

    # ------------------------------------------------------------------ decoding

    def _join(self, sequence: ModelSequence) -> None:
        del self._prefilling[sequence.order]
        sequence.state = State.DECODE
        sequence.joined_step = self._step
        sequence.finish_step = self._step + sequence.output_tokens - sequence.generated
        self._decoding[sequence.order] = sequence
        self._context_tokens += sequence.computed
        self._boundary[(self._step - sequence.computed) % self._block_tokens] += 1
        heapq.heappush(self._ends, (sequence.finish_step, sequence.order, sequence))

    def _leave(self, sequence: ModelSequence) -> None:
        """Out of the decoding batch; its own counts are brought up to date."""
        del self._decoding[sequence.order]
        self._boundary[(sequence.joined_step - sequence.computed) % self._block_tokens] -= 1
        steps = self._step - sequence.joined_step
        sequence.computed += steps
        sequence.generated += steps
        self._context_tokens -= sequence.computed

    def _finish_due(self, now_s: float) -> list[ModelSequence]:
        finished = []
        while self._ends and self._ends[0][0] <= self._step:
            finish_step, _, sequence = heapq.heappop(self._ends)
            if sequence.state is State.DECODE and sequence.finish_step == finish_step:
                sequence.finished_s = now_s
                finished.append(sequence)
                self._drop(sequence, State.FINISHED)
        return finished

    def _drop(self, sequence: ModelSequence, state: State) -> None:
        """Out of the batch, its blocks free; what it computed stays cached as far as its hashes are known."""
        if sequence.state is State.DECODE:
            self._leave(sequence)
            self._publish(sequence)
        else:
            del self._prefilling[sequence.order]
        del self._running[sequence.order]
        self.blocks.release(sequence.held, self._block_count(sequence.computed) - len(sequence.held))
        sequence.held = []
        sequence.state = state

    def _make_room(self) -> bool:
        """Throw out sequences until every running one has blocks for its next tokens. True when any was. (One alone always has.)"""
        preempted = False
        while self._next_blocks() > self.blocks.free:
            self._preempt(self._victim())
            preempted = True
        return preempted

    def _next_blocks(self) -> int:
        """Blocks that the running sequences take in the next step."""
        needed = self._boundary[self._step % self._block_tokens] if self._decoding else 0
        budget = self.profile.max_num_batched_tokens - len(self._decoding)
        for sequence in self._prefilling.values():
            tokens = min(sequence.tokens - sequence.computed, budget)
            needed += self._block_count(sequence.computed + tokens) - self._block_count(sequence.computed)
            budget -= tokens
        return needed

    def _victim(self) -> ModelSequence:
        if self.by_priority:
            return max(self._running.values(), key=lambda sequence: (sequence.priority, sequence.order))
        return next(reversed(self._running.values()))

    def _preempt(self, sequence: ModelSequence) -> None:
        self._drop(sequence, State.WAITING)
        sequence.computed = 0
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._wait(sequence, front=True)

    # ------------------------------------------------------------------ many steps at once

    def _steps_without_change(self, most: int) -> int:
        """How many steps the batch can run as it is: until the first sequence ends, or the free blocks are used up."""
        while self._ends and (self._ends[0][2].state is not State.DECODE or self._ends[0][2].finish_step != self._ends[0][0]):
            heapq.heappop(self._ends)
        steps = min(most, self._ends[0][0] - self._step)
        free = self.blocks.free
        if self._blocks_needed(self._step + 1, steps - 1) <= free:
            return steps
        cycles, left = divmod(free, len(self._decoding))
        carried = 1 + cycles * self._block_tokens
        while carried < steps and (need := self._boundary[(self._step + carried) % self._block_tokens]) <= left:
            left -= need
            carried += 1
        return min(steps, carried)

    def _blocks_needed(self, first_step: int, steps: int) -> int:
        """New blocks that the decoding batch takes in ``steps`` steps."""
        cycles, rest = divmod(steps, self._block_tokens)
        size = self._block_tokens
        boundary = self._boundary
        return cycles * len(self._decoding) + sum(boundary[(first_step + i) % size] for i in range(rest))

    def _block_count(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

"""A vLLM engine in time: which sequence runs in which step, how long a step takes, what the KV cache holds. No sockets, no clock.

It follows vLLM 0.32's scheduler (v1/core/sched/scheduler.py): running sequences first, one token each; then, within the token
budget, the rest of a prompt that was begun, then waiting prompts in order (first come first served, or by priority), whole prompts
cut into chunks where the budget ends; a prompt is admitted only when the KV cache has room for all of it; cached prefix blocks are
not computed again, except that the last token always is; when a running sequence finds no block, the last admitted (or the least
urgent) is thrown out, loses its KV and waits at the head of the queue. A sequence whose first blocks are on another engine
(kv_transfer.py) gets blocks to fetch them into and waits aside, without a place in the batch, until they are there.

Decoding sequences are accounted for together, so a run of a thousand steps in which the batch does not change costs as much as one:
what differs between them (context, block boundaries, last step) follows from the step at which each joined. A server plans runs of
one step; a simulator plans long ones and lets :meth:`EngineModel.add` and :meth:`~EngineModel.abort` cut them short::

    run = model.plan(now_s, max_steps=10_000)     # None: idle, or all that is here waits for blocks: ask again at model.next_fetch_s
    ...                                           # at run.end_s (it moves forward when a sequence arrives meanwhile):
    done = model.complete()                       # who got a first token, who finished; the rest got done.steps tokens each

Left out: speculative decoding, LoRA, multi-modal encoders, hybrid attention, data parallel ranks, asynchronous scheduling's one step
of lag; and that by priority a running sequence that throws itself out keeps those admitted after it from that one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, ValuesView
from random import Random
from typing import Final

from control_plane.engines.decode_batch import DecodeBatch
from control_plane.engines.kv_transfer import KvHandoff, KvLink
from control_plane.engines.sequence import Counters, Done, ModelSequence, Run
from control_plane.engines.sequence_blocks import SequenceBlocks
from control_plane.engines.state import State
from control_plane.engines.waiting import Fetches, WaitingQueue
from control_plane.roofline import EngineProfile, step_s

__all__ = ["Counters", "Done", "EngineModel", "ModelSequence", "Run", "State", "StepTime"]

#: ``step_s`` of roofline.py, or one that was fitted to a real engine
StepTime = Callable[..., float]
# compiled code reads these at once, members of an enumeration by two look-ups
NEW: Final = State.NEW
WAITING: Final = State.WAITING
FETCHING: Final = State.FETCHING
FETCHED: Final = State.FETCHED
PREFILL: Final = State.PREFILL
DECODE: Final = State.DECODE
FINISHED: Final = State.FINISHED
ABORTED: Final = State.ABORTED


class EngineModel:
    """One engine. All times are the caller's seconds; nothing happens but in the calls below.

    Args:
        profile: sizes and speeds.
        scheduling: ``"fcfs"`` or ``"priority"`` (vLLM's ``--scheduling-policy``).
        caching: keep prefix blocks.
        block_count: KV blocks, where they are known better than the profile reckons.
        hash_blocks: how many blocks one of a sequence's ``hashes`` stands for. More than one is coarser and faster: they are hit,
            cached and evicted together, and a prefix hits only as many as are whole.
        rng, jitter: each run's duration is multiplied by a lognormal factor of that sigma, drawn from ``rng``, less for long runs.
        step_time: seconds of one step (see :func:`control_plane.roofline.step_s`).

    Attributes:
        on_room: called when blocks that were kept for another engine become free while nothing runs here and somebody waits:
            whoever drives this engine calls :meth:`plan`.
    """

    def __init__(
        self,
        profile: EngineProfile,
        *,
        scheduling: str = "fcfs",
        caching: bool = True,
        block_count: int | None = None,
        hash_blocks: int = 1,
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
        count = profile.kv_block_count if block_count is None else block_count
        self.blocks = SequenceBlocks(count, profile.block_size_tokens, caching=caching, group=hash_blocks)
        self.counters = Counters()
        self.run: Run | None = None
        self.on_room: Callable[[], None] | None = None
        self._rng = rng
        self._jitter = jitter
        self._step_time = step_time
        self._max_seqs: int = profile.max_num_seqs
        self._max_tokens: int = profile.max_num_batched_tokens
        self._token_bytes: float = profile.model.kv_bytes_per_token
        self._queue = WaitingQueue(self.by_priority)
        self._fetches = Fetches(self.by_priority)
        #: finished, and their blocks kept for other engines
        self._kept: dict[int, ModelSequence] = {}
        #: admitted, in order of admission
        self._running: dict[int, ModelSequence] = {}
        self._prefilling: dict[int, ModelSequence] = {}
        self._batch = DecodeBatch(profile.block_size_tokens)
        self._leaving: list[ModelSequence] = []
        self._arrivals = 0

    # ------------------------------------------------------------------ what can be asked

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait, those whose blocks are on the way among them (as vLLM counts)."""
        return self._queue.count + self._fetches.count

    @property
    def idle(self) -> bool:
        return not self._running and not self.waiting

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1 (cached but unused blocks count as free)."""
        return 1.0 - self.blocks.free / self.blocks.total

    @property
    def decoding(self) -> ValuesView[ModelSequence]:
        """The sequences that get a token in every step of the present run."""
        return self._batch.members.values()

    @property
    def next_fetch_s(self) -> float | None:
        """When the next blocks from another engine are here; None: none are on the way."""
        next_s = self._fetches.next_s
        return None if next_s == math.inf else next_s

    def generated(self, sequence: ModelSequence) -> int:
        """Output tokens of a sequence as of the last completed run."""
        if sequence.state is DECODE:
            return sequence.generated + self._batch.step - sequence.joined_step
        return sequence.generated

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """True when the KV cache could ever hold such a sequence."""
        return self.blocks.of(prompt_tokens + max(0, output_tokens - 1)) <= self.blocks.total

    # ------------------------------------------------------------------ what can be done

    def add(self, sequence: ModelSequence, now_s: float) -> None:
        """A sequence arrives and waits. A long run is cut at the step in progress when the newcomer might join.

        Raises ValueError when it could never fit, or was added before.
        """
        if sequence.state is not NEW:
            raise ValueError(f"the sequence is {sequence.state.value}, not new")
        if not self.fits(sequence.prompt_tokens, sequence.output_tokens):
            raise ValueError(f"{sequence.prompt_tokens} + {sequence.output_tokens} tokens do not fit in {self.blocks.total} KV blocks")
        sequence.arrival_s = now_s
        sequence.order = self._arrivals
        self._arrivals += 1
        run = self.run
        if run is not None and len(self._running) < self._max_seqs and (self.by_priority or not self._queue.count):
            run.cut(now_s)
        sequence.state = WAITING
        self._queue.push(sequence)

    def abort(self, sequence: ModelSequence, now_s: float) -> bool:
        """The client left. A waiting sequence goes at once, a running one at the end of the step in progress, one whose blocks are on
        the way when they are there. False: it was not here, or is leaving already."""
        state = sequence.state
        if state is WAITING:
            self._queue.remove(sequence)
            sequence.state = ABORTED
            self._release_remote(sequence, now_s)
            return True
        if state is FETCHING:
            sequence.state = ABORTED
            return True
        if state is FETCHED:
            self._fetches.remove(sequence)
            self.blocks.leave(sequence)
            sequence.state = ABORTED
            return True
        if (state is not PREFILL and state is not DECODE) or sequence in self._leaving:
            return False
        if self.run is None:
            self._drop(sequence, ABORTED)
        else:
            self._leaving.append(sequence)
            self.run.cut(now_s)
        return True

    def hand_over(self, sequence: ModelSequence, link: KvLink) -> KvHandoff:
        """The KV of a sequence that finished here and was told to keep it. Its blocks stay until the handoff is released.

        Raises ValueError when nothing was kept.
        """
        if sequence.order not in self._kept or self._kept[sequence.order] is not sequence:
            raise ValueError("this engine keeps no KV of that sequence")
        return KvHandoff(sequence.computed, link, lambda now_s: self.release_kept(sequence, now_s))

    def release_kept(self, sequence: ModelSequence, now_s: float) -> None:
        """Kept blocks are no longer needed: they were fetched, or nobody will. Nothing happens when none are kept of it."""
        if self._kept.get(sequence.order) is not sequence:
            return
        del self._kept[sequence.order]
        self.blocks.leave(sequence)
        if not self.waiting:
            return
        if self.run is not None:
            self.run.cut(now_s)
        elif self.on_room is not None:
            self.on_room()

    def plan(self, now_s: float, max_steps: int = 1) -> Run | None:
        """Begin the next run at ``now_s``; None when there is nothing to do (see :attr:`next_fetch_s`).

        Raises RuntimeError while a run is under way.
        """
        if self.run is not None:
            raise RuntimeError("complete() the present run first")
        if self._fetches.count:
            self._take_fetched(now_s)
        preempted = bool(self._running) and self._make_room()
        batch = self._batch
        decoding = len(batch.members)
        if decoding:
            self.blocks.allocate(batch.next_blocks())
        context_tokens = batch.context_tokens
        chunks: list[tuple[ModelSequence, int]] = []
        prefill_tokens, prefix_tokens = 0, 0
        if self._prefilling or self._queue.count or self._fetches.count:
            prefill_tokens, prefix_tokens = self._schedule_prompts(chunks, now_s, self._max_tokens - decoding, not preempted)
        if not decoding and not chunks:
            # whoever was alone and threw itself out made room for others (fetched blocks were in its way)
            return self.plan(now_s, max_steps) if preempted else None
        # after throwing one out nobody is admitted in this step, and perhaps somebody in the next
        steps = 1 if chunks or preempted or max_steps == 1 else batch.steps_without_change(max_steps, self.blocks.free)
        # prompts of one step are of all lengths: were they taken as even, the work of attention would come out too small by half
        pairs = sum([tokens * (sequence.computed - 0.5 * tokens) for sequence, tokens in chunks]) if len(chunks) > 1 else None
        factor = 1.0 if not self._jitter or self._rng is None else math.exp(self._rng.gauss(0.0, self._jitter / math.sqrt(steps)))
        first_s = factor * self._step_time(
            self.profile,
            prefill_tokens=prefill_tokens,
            prefill_context_tokens=prefix_tokens,
            decode_sequences=decoding,
            decode_context_tokens=context_tokens,
            prefill_sequences=len(chunks) or 1,
            prefill_pairs=pairs,
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
        run = Run(now_s, steps, first_s, last_s, chunks)
        if steps > 1 and self._fetches.next_s < run.end_s:
            run.cut(self._fetches.next_s)
        self.run = run
        return run

    def complete(self) -> Done:
        """The present run has ended, at its ``end_s``. Raises RuntimeError when there is none."""
        run = self.run
        if run is None:
            raise RuntimeError("no run is under way")
        self.run = None
        batch = self._batch
        decoded = len(batch.members)
        steps = run.steps
        if decoded and steps > 1:
            self.blocks.allocate(batch.blocks_needed(steps - 1))
        batch.advance(steps)
        counters = self.counters
        counters.steps += steps
        counters.generation_tokens += decoded * steps
        if self._leaving:
            for sequence in self._leaving:
                self._drop(sequence, ABORTED)
            self._leaving.clear()
        finished: list[ModelSequence] = []
        due = batch.take_due()
        while due is not None:
            due.finished_s = run.end_s
            finished.append(due)
            self._drop(due, FINISHED)
            due = batch.take_due()
        started: list[ModelSequence] = []
        if run.chunks:
            self._finish_chunks(run, started, finished)
        return Done(steps, run.start_s + run.first_s, run.end_s, decoded, started, finished)

    # ------------------------------------------------------------------ prompts

    def _schedule_prompts(self, chunks: list[tuple[ModelSequence, int]], now_s: float, budget: int, admit: bool) -> tuple[int, int]:
        """Fills in the chunks of this step. Returns how many tokens they are, and how many stand before them in their sequences."""
        whole, prefix_tokens = budget, 0
        if self._prefilling:
            for sequence in list(self._prefilling.values()):
                tokens = min(sequence.prompt_tokens + sequence.generated - sequence.computed, budget)
                if tokens <= 0:
                    break
                prefix_tokens += sequence.computed
                self.blocks.grow(sequence, tokens)
                chunks.append((sequence, tokens))
                budget -= tokens
        while admit and budget > 0 and len(self._running) < self._max_seqs:
            waiting = self._fetches.first()
            if waiting is not None:
                if not self._resume_fetched(waiting, now_s):
                    break
            else:
                waiting = self._queue.first()
                if waiting is None:
                    break
                if waiting.remote is not None and self._fetch(waiting, waiting.remote, now_s):
                    continue
                if waiting.remote is not None or not self._admit(waiting, now_s):
                    break
            tokens = min(waiting.prompt_tokens + waiting.generated - waiting.computed, budget)
            prefix_tokens += waiting.computed
            self.blocks.grow(waiting, tokens)
            chunks.append((waiting, tokens))
            budget -= tokens
        return whole - budget, prefix_tokens

    def _admit(self, sequence: ModelSequence, now_s: float) -> bool:
        """Take it from the queue with the prefix blocks that are cached, if the whole prompt has room."""
        blocks = self.blocks
        tokens = sequence.prompt_tokens + sequence.generated
        hits = blocks.hits(sequence, tokens)
        count = len(hits) * blocks.group
        if blocks.of(tokens) - count + blocks.evictable_among(hits) > blocks.free:
            return False
        self._queue.pop()
        blocks.acquire(hits)
        sequence.held = hits
        sequence.computed = count * blocks.size_tokens
        self._begin(sequence, now_s, sequence.computed)
        return True

    def _begin(self, sequence: ModelSequence, now_s: float, cached_tokens: int) -> None:
        """It has its place in the batch."""
        if not sequence.preemptions:
            sequence.scheduled_s = now_s
            sequence.cached_tokens = cached_tokens
            self.counters.prefix_queries += sequence.prompt_tokens + sequence.generated
            self.counters.prefix_hits += cached_tokens - sequence.fetched_tokens
        sequence.state = PREFILL
        self._running[sequence.order] = sequence
        self._prefilling[sequence.order] = sequence

    def _finish_chunks(self, run: Run, started: list[ModelSequence], finished: list[ModelSequence]) -> None:
        """Sequences whose prompt this run completed: they have their first token, and decode from the next step on."""
        batch = self._batch
        for sequence, tokens in run.chunks:
            if sequence.state is not PREFILL:
                continue
            self.counters.prompt_tokens += tokens
            if sequence.computed < sequence.prompt_tokens + sequence.generated:
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
                self._drop(sequence, FINISHED)
            else:
                del self._prefilling[sequence.order]
                batch.join(sequence)

    # ------------------------------------------------------------------ blocks from other engines

    def _fetch(self, sequence: ModelSequence, remote: KvHandoff, now_s: float) -> bool:
        """Give the first in the queue blocks for what another engine has of it beyond our own cache, and begin to fetch them.

        False when it stays first: there is no room, or (``remote`` is None then) nothing to fetch. As vLLM: the whole prompt must fit,
        and the blocks in what those leave that are being computed or fetched and have not got all of theirs.
        """
        blocks, size = self.blocks, self.blocks.size_tokens
        tokens = sequence.prompt_tokens + sequence.generated
        hits = blocks.hits(sequence, tokens)
        count = len(hits) * blocks.group
        # the last token is computed again; with blocks of one token it is not fetched either
        fetched = min(remote.tokens, tokens if size > 1 else tokens - 1) // size - count
        if fetched <= 0:
            self._release_remote(sequence, now_s)
            return False
        taken = blocks.evictable_among(hits)
        if blocks.of(tokens) - count + taken > blocks.free or fetched + taken > blocks.free - self._reserved():
            return False
        self._queue.pop()
        blocks.acquire(hits)
        blocks.allocate(fetched)
        sequence.held = hits
        sequence.computed = (count + fetched) * size
        sequence.fetched_tokens = fetched * size
        sequence.state = FETCHING
        self._fetches.begin(sequence, remote.link.send(now_s, fetched * size * self._token_bytes))
        return True

    def _reserved(self) -> int:
        """Blocks that prompts still need that are being computed or fetched."""
        count = 0
        for sequence in self._prefilling.values():
            count += self.blocks.missing(sequence)
        for sequence in self._fetches.sequences():
            count += self.blocks.missing(sequence)
        return count

    def _take_fetched(self, now_s: float) -> None:
        """What has arrived by now is cached and waits ahead of the queue; the other engine's blocks are free."""
        while (sequence := self._fetches.take_arrived(now_s)) is not None:
            self._release_remote(sequence, now_s)
            if sequence.state is ABORTED:
                self.blocks.leave(sequence)
                continue
            self.counters.fetched_tokens += sequence.fetched_tokens
            self.blocks.keep(sequence)
            sequence.computed = min(sequence.computed, sequence.prompt_tokens - 1)
            sequence.state = FETCHED
            self._fetches.wait(sequence)

    def _resume_fetched(self, sequence: ModelSequence, now_s: float) -> bool:
        """The batch takes a sequence whose blocks have come, if the rest of its prompt has room."""
        if self.blocks.missing(sequence) > self.blocks.free:
            return False
        self._fetches.pop()
        self._begin(sequence, now_s, sequence.computed)
        return True

    def _release_remote(self, sequence: ModelSequence, now_s: float) -> None:
        remote = sequence.remote
        sequence.remote = None
        if remote is not None:
            remote.release(now_s)

    # ------------------------------------------------------------------ leaving the batch

    def _drop(self, sequence: ModelSequence, state: State) -> None:
        """Out of the batch, its blocks free (or kept for another engine); what it computed stays cached as far as its hashes are known."""
        if sequence.state is DECODE:
            self._batch.leave(sequence)
            self.blocks.keep(sequence)
        else:
            del self._prefilling[sequence.order]
        del self._running[sequence.order]
        sequence.state = state
        if state is FINISHED and sequence.keep_kv:
            self._kept[sequence.order] = sequence
        else:
            self.blocks.leave(sequence)

    def _make_room(self) -> bool:
        """Throw out sequences until every running one has blocks for its next tokens. True when any was."""
        preempted = False
        while self._next_blocks() > self.blocks.free:
            self._preempt(self._victim())
            preempted = True
        return preempted

    def _next_blocks(self) -> int:
        """Blocks that the running sequences take in the next step."""
        needed = self._batch.next_blocks()
        if not self._prefilling:
            return needed
        budget = self._max_tokens - len(self._batch.members)
        for sequence in self._prefilling.values():
            tokens = min(sequence.prompt_tokens + sequence.generated - sequence.computed, budget)
            needed += self.blocks.of(sequence.computed + tokens) - self.blocks.of(sequence.computed)
            budget -= tokens
        return needed

    def _victim(self) -> ModelSequence:
        if self.by_priority:
            return max(self._running.values(), key=lambda sequence: (sequence.priority, sequence.order))
        return next(reversed(self._running.values()))

    def _preempt(self, sequence: ModelSequence) -> None:
        self._drop(sequence, WAITING)
        sequence.computed = 0
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._queue.push(sequence, front=True)

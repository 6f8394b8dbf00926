"""Requests on engines: each try of one between the engine and the caller's sink, and the books of where it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

from control_plane.clock import Clock
from control_plane.errors import ControlPlaneError
from control_plane.fleet import Fleet
from control_plane.fleet.ahead import count_ahead, count_begun
from control_plane.fleet.prefix.index import NOT_MATCHED
from control_plane.job import Job
from control_plane.live_state import InFlight, LiveState
from control_plane.predicting.flight import Flight
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import Call, EngineOutcome, Headers
from control_plane.types import ExecutionInstance, Leg, RequestMetadata, RequestStatus

_RUNNING: Final = RequestStatus.RUNNING


class AttemptListener(Protocol):
    """Who started an attempt and hears when its stream begins, and of its end, once."""

    def attempt_began(self, attempt: Attempt) -> None: ...
    def attempt_finished(self, attempt: Attempt, outcome: EngineOutcome) -> None: ...
    def attempt_failed(self, attempt: Attempt, error: ControlPlaneError) -> None: ...


class Attempt:
    """One try of a request on one instance: a Sink between the engine and the caller's sink that counts and keeps the books."""

    __slots__ = (
        "_attempts",
        "_in_flight",
        "_listener",
        "_prompt_tokens",
        "_settled",
        "_waits",
        "ahead",
        "cached",
        "call",
        "chunk",
        "flight",
        "frame",
        "instance",
        "job",
        "sent",
        "started_s",
    )

    def __init__(self, job: Job, instance: ExecutionInstance, attempts: Attempts, listener: AttemptListener) -> None:
        self.job = job
        self.instance = instance
        self._attempts = attempts
        self._listener = listener
        self._settled = False
        self.call: Call | None = None
        self.started_s = job.scheduled_s or attempts.clock.now_s()
        #: what the predictor keeps of it; None where another predictor than ours is in use
        self.flight: Flight | None = None
        live: LiveState = instance
        #: the books of tokens there, and what this one has in them
        self._in_flight: InFlight = live.in_flight
        self._prompt_tokens: int = job.input_tokens
        self._waits = True
        self._in_flight.opened(self._prompt_tokens, self.started_s)
        #: prompt tokens that were expected to be in its cache, and how sure that was (``fleet.prefix``)
        self.cached: tuple[int, int] = NOT_MATCHED
        #: it counts as work ahead on its engine: a stream that has shown no token
        self.ahead = job.wire.stream
        #: something has reached the caller's sink: from here on the request cannot be tried elsewhere
        self.sent = False
        #: bytes go from the engine to the caller's sink without a frame of ours in between
        self.chunk: Callable[[bytes], None] = job.sink.chunk
        self.frame: Callable[[bytes, bytes], None] | None = getattr(job.sink, "frame", None)
        attempts.opened(self)

    def started(self, status: int, headers: Headers, call: Call) -> None:
        self.sent = True
        self.call = call
        job = self.job
        if not job.wire.body:
            job.let_go_of_body()  # as the engine has: it is not sent again
        job.sink.started(status, headers, call)
        if self.ahead:  # a stream's head is held until its first event
            self._attempts.begun(self)

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        job = self.job
        begins = self._waits
        if begins:
            self._waits = False
            self._in_flight.begun(self._prompt_tokens)
        self._in_flight.context_tokens += n
        if not job.first_token_s:
            job.first_token_s = first_s
        job.last_token_s = last_s
        job.output_tokens += n
        flight = self.flight
        if flight is not None:
            flight.book.tokens(flight, n, first_s, last_s)
        if begins and job.wire.stream:
            # all books know of its first token when others are placed because of it
            self._listener.attempt_began(self)
        job.sink.tokens(n, first_s, last_s)

    def finished(self, outcome: EngineOutcome) -> None:
        if self._settle(well=True):
            self._attempts.count(failed=False)
            self._listener.attempt_finished(self, outcome)

    def failed(self, error: ControlPlaneError) -> None:
        if self._settle(well=False):
            self._attempts.count(failed=True)
            self._listener.attempt_failed(self, error)

    def cancel(self) -> None:
        """Stop the engine's work; the listener hears nothing."""
        call = self.call
        if self._settle(well=False) and call is not None:
            call.cancel()

    def give_up(self, error: ControlPlaneError) -> None:
        """Stop the engine's work and report ``error``."""
        call = self.call
        if call is not None:
            call.cancel()
        self.failed(error)

    @property
    def settled(self) -> bool:
        return self._settled

    def _settle(self, *, well: bool) -> bool:
        if self._settled:
            return False
        self._settled = True
        self.call = None
        if self._waits:
            self._in_flight.begun(self._prompt_tokens)
        # its answer's tokens of this attempt: a retry begins anew at nothing
        self._in_flight.closed(self._prompt_tokens, self.job.output_tokens, self.started_s)
        self._attempts.closed(self, well=well)
        return True


class Attempts:
    """Starts requests on the fleet's instances and keeps count of them. ``running``: on an engine now, by id."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self.clock = clock
        self.running: dict[str, RequestMetadata] = {}
        self.ended = 0
        self.failed = 0
        self._fleet = fleet
        predictor = fleet.predictor
        self._predictor = predictor if isinstance(predictor, LatencyPredictor) else None
        #: streams that have shown no token, in the order of their sending
        self._ahead: dict[ExecutionInstance, dict[Attempt, None]] = {}

    def start(self, job: Job, leg: Leg, listener: AttemptListener) -> Attempt:
        """Run ``job`` where ``leg`` says. A failure comes to ``listener.attempt_failed``, maybe at once. Raises InstanceNotFound."""
        instance, engine = self._fleet.serving(leg.instance_id)
        attempt = Attempt(job, instance, self, listener)
        job.instance = instance
        try:
            call = engine.start(leg, job.wire, attempt, job.request)
        except Exception as error:  # an engine of the user's own, or a request that cannot be written: no reason to try it elsewhere
            known = error if isinstance(error, ControlPlaneError) else None
            attempt.failed(known or ControlPlaneError(f"{leg.instance_id}: the request could not be sent: {error!r}"))
            return attempt
        if attempt.call is None and not attempt.settled:
            attempt.call = call
        return attempt

    def opened(self, attempt: Attempt) -> None:
        """An attempt takes its place on its instance."""
        job = attempt.job
        # an answer that is not streamed shows nothing before its end: it runs from here on, and not from the first byte
        job.state = _RUNNING
        self.running[job.request_id] = job.shown
        fleet, predictor = self._fleet, self._predictor
        cached = fleet.prefixes.cached_tokens(job.request, attempt.instance)
        if predictor is not None:
            attempt.flight = predictor.began(
                job.request, attempt.instance, attempt.started_s, streamed=job.wire.stream, index_tokens=cached
            )
        fleet.placed(attempt.instance, job.predicted_ms, job.phase)
        if attempt.ahead:
            # what is cached is not computed: the engine is through with that at once
            job.prefill_ms = fleet.predictor.prefill_ms(attempt.instance, max(1, job.input_tokens - cached))
            count_ahead(attempt.instance, job.prefill_ms)
            self._ahead.setdefault(attempt.instance, {})[attempt] = None

    def begun(self, attempt: Attempt) -> None:
        """Its first token is there: it is no work ahead any more."""
        attempt.ahead = False
        there = self._ahead[attempt.instance]
        del there[attempt]
        if not there:
            del self._ahead[attempt.instance]
        count_begun(attempt.instance, attempt.job.prefill_ms)

    def ahead_on(self, instance: ExecutionInstance) -> list[Attempt]:
        """Streams there that have shown no token, oldest first."""
        return list(self._ahead.get(instance, ()))

    def oldest_ahead_s(self, instance: ExecutionInstance) -> float:
        """When the oldest of those was sent; inf without any."""
        there = self._ahead.get(instance)
        return next(iter(there)).started_s if there else math.inf

    def closed(self, attempt: Attempt, *, well: bool) -> None:
        """An attempt leaves its instance, however it ended."""
        job = attempt.job
        self.running.pop(job.request_id, None)
        flight = attempt.flight
        if flight is not None:
            flight.book.leave(flight, job.last_token_s if well and job.last_token_s else self.clock.now_s(), well=well)
        if attempt.ahead:
            self.begun(attempt)
        self._fleet.released(attempt.instance, job.predicted_ms, job.phase)

    def count(self, *, failed: bool) -> None:
        if failed:
            self.failed += 1
        else:
            self.ended += 1

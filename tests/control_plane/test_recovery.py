"""The retry rule by itself: a table of failures and what follows."""

from __future__ import annotations

import pytest

from control_plane.errors import ControlPlaneError, EngineError, InstanceFailed, RequestTimeout
from control_plane.job import Job, LaneKey
from control_plane.protocols import WireRequest
from control_plane.recovery import after_failure
from control_plane.types import RequestKind, RequestMetadata

ALL = frozenset({"a", "b", "c"})
LOST = InstanceFailed("connection lost")
REFUSED = InstanceFailed("connection refused", connected=False)


def job(*, attempts: int = 1, tried: str = "a", avoid: str = "") -> Job:
    made = Job(RequestMetadata(request_id="r"), LaneKey("m", RequestKind.CHAT, None, frozenset(avoid)), WireRequest("/", b""), None, 0.0)  # type: ignore[arg-type]
    made.attempts = attempts
    made.tried = frozenset(tried)
    return made


@pytest.mark.parametrize(
    ("case", "error", "sent", "registered", "again"),
    [
        (job(), LOST, False, ALL, frozenset("a")),
        (job(), LOST, True, ALL, None),
        (job(attempts=2, tried="ab", avoid="a"), LOST, False, ALL, None),
        (job(), LOST, False, frozenset("a"), None),
        (job(), InstanceFailed("garbage", retryable=False), False, ALL, None),
        (job(), InstanceFailed("hung", timed_out=True), False, ALL, frozenset("a")),
        (job(), EngineError(400, b"{}"), False, ALL, None),
        (job(), EngineError(404, b"{}"), False, ALL, None),
        (job(), EngineError(422, b"{}"), False, ALL, None),
        (job(), EngineError(408, b"{}"), False, ALL, frozenset("a")),
        (job(), EngineError(429, b"{}"), False, ALL, frozenset("a")),
        (job(), EngineError(500, b"{}"), False, ALL, frozenset("a")),
        (job(), EngineError(503, b"{}"), False, ALL, frozenset("a")),
        (job(), RequestTimeout("waited too long"), False, ALL, None),
        # never reached: no attempt is counted, it goes on to others and at last waits for any to come back
        (job(attempts=0, tried=""), REFUSED, False, ALL, frozenset("a")),
        (job(attempts=0, tried="", avoid="bc"), REFUSED, False, ALL, frozenset()),
        (job(attempts=0, tried=""), REFUSED, False, frozenset("a"), frozenset()),
        # the kept connection broke under it and nobody takes a new one: perhaps it killed the engine, so this was one of its attempts
        (job(), InstanceFailed("refused", connected=False, reached=True), False, ALL, frozenset("a")),
        (job(attempts=2, tried="ab", avoid="a"), InstanceFailed("refused", connected=False, reached=True), False, ALL, None),
        # reached one and broke it, then could not reach the others: those only, when they are back
        (job(attempts=1, tried="b", avoid="bc"), REFUSED, False, ALL, frozenset("b")),
    ],
)
def test_what_follows_a_failure(
    case: Job, error: ControlPlaneError, sent: bool, registered: frozenset[str], again: frozenset[str] | None
) -> None:
    assert after_failure(case, error, "a", sent=sent, registered=registered, max_attempts=2) == again

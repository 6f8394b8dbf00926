"""What to do after a failed attempt: a pure rule, so that it can be read, tested and simulated by itself.

- Once anything reached the client, nothing is tried again.
- An engine's 4xx is the caller's and final, except 408 and 429.
- A request that reached an engine is tried at most once more, elsewhere: one that kills engines must not kill the fleet.
- A request that never reached its engine (no connection) harmed nobody: it goes on to others, and when there are none it waits in
  the queue for one to come back, for as long as requests wait for a usable instance at all. One that was written to a kept connection
  which broke, and then found nobody to connect to, may be what killed the engine: it counts as having reached it.
"""

from __future__ import annotations

from control_plane.errors import ControlPlaneError, InstanceFailed
from control_plane.job import Job


def after_failure(
    job: Job, error: ControlPlaneError, server_id: str, *, sent: bool, registered: frozenset[str], max_attempts: int
) -> frozenset[str] | None:
    """Whether ``job``, whose attempt at the address of ``server_id`` ended in ``error``, is queued again: the addresses to avoid then, or
    None. An address is named by the instance registered for it; what fails there concerns all of its data-parallel ranks.

    Args:
        sent: something of the answer has reached the client.
        registered: ids of all instances that could serve it were they well, wherever it was tried.
        max_attempts: how many engines a request may reach in all. The attempt that just failed is counted in ``job.attempts`` and
            ``job.tried`` already, if it reached its engine.
    """
    if sent or not isinstance(error, InstanceFailed) or not error.retryable:
        return None
    if error.reached and job.attempts >= max_attempts:
        return None
    if not registered - job.tried:
        return None
    avoid = job.lane.avoid | job.tried | {server_id}
    return avoid if registered - avoid else job.tried

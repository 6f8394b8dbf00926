"""A user's policy that is no subclass of ours."""

from __future__ import annotations

from typing import Any

from control_plane.errors import InvalidRequest
from control_plane.policies.base import SchedulingPolicy
from control_plane.types import ExecutionInstance, RequestMetadata, SchedulingDecision


class ForeignPolicy(SchedulingPolicy):
    """Wraps an object with a coroutine ``schedule(request, instances)``: first come, first served, placed as it decides."""

    def __init__(self, policy: Any) -> None:
        if not callable(getattr(policy, "schedule", None)):
            raise InvalidRequest(
                f"{policy!r} is no scheduling policy: give a name, or an object with `async schedule(request, instances)`",
                param="scheduling_policy",
            )
        self.policy = policy
        self.name = getattr(policy, "name", None) or type(policy).__name__

    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        decision: SchedulingDecision = await self.policy.schedule(request, instances)
        return decision

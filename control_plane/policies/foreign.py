"""A user's policy that is no subclass of ours."""

from __future__ import annotations

import inspect
from typing import Any

from control_plane.errors import InvalidRequest
from control_plane.policies.base import SchedulingPolicy
from control_plane.types import ExecutionInstance, RequestMetadata, SchedulingDecision


class ForeignPolicy(SchedulingPolicy):
    """Wraps an object with a coroutine ``schedule(request, instances)``: first come, first served, placed as it decides, or in
    the order of its ``get_next_request`` where it has one. The hooks that it has are called too."""

    def __init__(self, policy: Any) -> None:
        if not callable(getattr(policy, "schedule", None)):
            raise InvalidRequest(
                f"{policy!r} is no scheduling policy: give a name, or an object with `async schedule(request, instances)`",
                param="scheduling_policy",
            )
        self.policy = policy
        self.name = getattr(policy, "name", None) or type(policy).__name__
        for hook in ("get_next_request", "on_request_completed", "on_instance_registered"):
            if callable(getattr(policy, hook, None)):
                setattr(self, hook, getattr(policy, hook))

    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        answer = self.policy.schedule(request, instances)
        decision: SchedulingDecision = await answer if inspect.isawaitable(answer) else answer
        return decision

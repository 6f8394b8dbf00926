"""Calling the hooks of a policy, which may be the user's own: their fault is said and harms nobody."""

from __future__ import annotations

import inspect
from typing import Any

from control_plane.policies.base import SchedulingPolicy
from control_plane.protocols import EventSink


def call_hook(policy: SchedulingPolicy, hook: str, events: EventSink, *arguments: Any) -> None:
    """``policy.<hook>(*arguments)``. Instances are registered without a running loop, so a hook cannot be a coroutine."""
    try:
        answer = getattr(policy, hook)(*arguments)
    except Exception as error:
        message = f"{hook} of the scheduling policy {policy.name} failed: {error!r}"
    else:
        if not inspect.iscoroutine(answer):
            return
        answer.close()
        message = f"{hook} of the scheduling policy {policy.name} is a coroutine and did not run; make it a plain function"
    events.event("policy_hook_failed", message, policy=policy.name)

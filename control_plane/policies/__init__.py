"""Scheduling policies: in which order the waiting requests start. One file each; this table is the list of them."""

from __future__ import annotations

from control_plane.loading import load_object, unknown_name
from control_plane.policies.adaptive import AdaptivePolicy
from control_plane.policies.base import SchedulingPolicy
from control_plane.policies.cost_optimized import CostOptimizedPolicy
from control_plane.policies.decision import Decided, as_decided, decide
from control_plane.policies.fair_share import FairSharePolicy
from control_plane.policies.fifo import FIFOPolicy
from control_plane.policies.foreign import ForeignPolicy
from control_plane.policies.hooks import call_hook
from control_plane.policies.priority import PriorityPolicy
from control_plane.policies.slo_aware import SLOAwarePolicy

POLICIES: dict[str, type[SchedulingPolicy]] = {
    policy.name: policy for policy in (FIFOPolicy, PriorityPolicy, SLOAwarePolicy, CostOptimizedPolicy, FairSharePolicy, AdaptivePolicy)
}

__all__ = [
    "POLICIES",
    "AdaptivePolicy",
    "CostOptimizedPolicy",
    "Decided",
    "FIFOPolicy",
    "FairSharePolicy",
    "PriorityPolicy",
    "SLOAwarePolicy",
    "SchedulingPolicy",
    "as_decided",
    "call_hook",
    "create_policy",
    "decide",
]


def create_policy(policy: object) -> SchedulingPolicy:
    """A policy from its name in the table, ``module:Class``, a class, or an object (which is returned as it is; one that only has a
    coroutine ``schedule`` is wrapped). Raises InvalidRequest (``param="scheduling_policy"``) that names the nearest name."""
    made = policy
    if isinstance(policy, str):
        known = POLICIES.get(policy)
        if known is None and ":" not in policy:
            raise unknown_name(policy, POLICIES, "scheduling_policy")
        made = known() if known is not None else load_object(policy, "scheduling_policy")
    elif isinstance(policy, type):
        made = policy()
    return made if isinstance(made, SchedulingPolicy) else ForeignPolicy(made)

"""First come, first served."""

from __future__ import annotations

from control_plane.policies.base import SchedulingPolicy


class FIFOPolicy(SchedulingPolicy):
    """key = arrival. Use it where all requests are alike; it ignores priorities and deadlines."""

    name: str = "fifo"

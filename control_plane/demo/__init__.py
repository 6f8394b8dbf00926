"""``control-plane demo``: a gateway over three simulated engines, a mixed load, one engine killed on the way, and what came of it."""

from control_plane.demo.run import run_demo

__all__ = ["run_demo"]

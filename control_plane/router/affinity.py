"""The same user or session to the same instance, whose cache then holds the conversation."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.errors import InvalidRequest
from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.router.ring import RingCache, owner_within_bound
from control_plane.types import ExecutionInstance, RequestMetadata

LOAD_BOUND = 1.25
HEAD_BYTES = 512


class Affinity(RoutingStrategy):
    """Consistent hashing with bounded load on the session, else the user, else the tenant, else the prompt's head.

    The ring spans all instances of the view, so one that is full for a moment keeps its keys.
    """

    name = "affinity"

    def __init__(self, load_bound: float = LOAD_BOUND) -> None:
        if not 1.0 < load_bound < float("inf"):
            raise InvalidRequest(f"load_bound {load_bound!r} must be a finite number above 1", param="load_bound")
        self.load_bound = load_bound
        self._rings = RingCache()

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        what, key = self._key(request)
        ring = self._rings.of(view.instances())
        chosen, passed = owner_within_bound(ring, key, candidates, view, self.load_bound)
        reason = f"home of its {what}" if not passed else f"next to the home of its {what}: {passed} before it are over the load bound"
        return record_around(request, chosen, candidates, view, reason)

    def _key(self, request: RequestMetadata) -> tuple[str, bytes]:
        for what, name in (("session", request.session_id), ("user", request.user_id), ("tenant", request.tenant_id)):
            if name:
                return what, f"{what}:{name}".encode("utf-8", "replace")
        return "prompt's head", request.head(HEAD_BYTES)

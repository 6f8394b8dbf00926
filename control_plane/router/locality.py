"""Requests that begin alike to the same instance, whose prefix cache then holds their beginning."""

from __future__ import annotations

from control_plane.errors import InvalidRequest
from control_plane.router.affinity import HEAD_BYTES, LOAD_BOUND, Affinity
from control_plane.types import RequestMetadata


class Locality(Affinity):
    """Consistent hashing with bounded load on the first ``head_bytes`` of the prompt. Fewer bytes gather more requests."""

    name = "locality"

    def __init__(self, head_bytes: int = HEAD_BYTES, load_bound: float = LOAD_BOUND) -> None:
        if head_bytes < 1:
            raise InvalidRequest(f"head_bytes {head_bytes} is below 1", param="head_bytes")
        super().__init__(load_bound)
        self.head_bytes = head_bytes

    def _key(self, request: RequestMetadata) -> tuple[str, bytes]:
        return "prompt's head", request.head(self.head_bytes)

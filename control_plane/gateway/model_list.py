"""``/v1/models``: every name that the registered instances serve, in OpenAI's list shape."""

from __future__ import annotations

from typing import Any

from control_plane.errors import ModelNotFound
from control_plane.fleet import Fleet
from control_plane.types import ExecutionInstance


def model_list(fleet: Fleet, created: int) -> dict[str, Any]:
    """All cards. ``created`` is Unix seconds. A model whose instances are down is listed all the same."""
    return {"object": "list", "data": [model_card(name, serving, created) for name, serving in sorted(fleet.models().items())]}


def model_card(name: str, serving: list[ExecutionInstance], created: int) -> dict[str, Any]:
    """One card. ``max_model_len`` is the least of its instances, since a request may go to any; left out where none told."""
    card: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "vllm", "root": name, "parent": None}
    lengths = [one.engine.max_model_len_tokens for one in serving if one.engine.max_model_len_tokens]
    if lengths:
        card["max_model_len"] = min(lengths)
    bases = {one.model_name for one in serving}
    if name not in bases and len(bases) == 1:
        card["parent"] = bases.pop()
    if any(one.engine.simulated for one in serving):
        card["simulated"] = True
    return card


def find_card(fleet: Fleet, name: str, created: int) -> dict[str, Any]:
    """The card of one name (names may hold slashes). Raises ModelNotFound."""
    models = fleet.models()
    if name not in models:
        raise ModelNotFound(name, tuple(models))
    return model_card(name, models[name], created)

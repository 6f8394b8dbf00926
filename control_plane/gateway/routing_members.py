"""The members of a request's body that routing looks at; all others are passed over unread."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Raw, Struct, UnsetType

from control_plane.errors import InvalidRequest


class NamesNoModel(InvalidRequest):
    """A request that can only be relayed by its model names none."""


class Head(Struct, gc=False):
    """The members that routing looks at; UNSET: the client did not send it."""

    model: str | UnsetType | None = UNSET
    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    system: Raw | UnsetType = UNSET
    instructions: Raw | UnsetType = UNSET
    stream: bool | None = None
    stream_options: Raw | UnsetType = UNSET
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    user: Any = None
    tools: Raw | UnsetType = UNSET
    cache_salt: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    previous_response_id: str | None = None
    # ours: taken out before the body goes on
    priority: int | str | UnsetType | None = UNSET
    request_id: str | UnsetType | None = UNSET
    session_id: str | UnsetType | None = UNSET
    slo_deadline_ms: float | UnsetType | None = UNSET
    ttft_slo_ms: float | UnsetType | None = UNSET
    tpot_slo_ms: float | UnsetType | None = UNSET
    cost_budget: float | UnsetType | None = UNSET
    when_late: str | UnsetType | None = UNSET


class AnthropicMetadata(Struct):
    user_id: Any = None

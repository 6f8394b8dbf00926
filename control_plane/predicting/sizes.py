"""How long a request's prompt is and how long its answer gets, in tokens."""

from __future__ import annotations

from typing import Final

from control_plane.live_state import RequestFields
from control_plane.predicting.bounded import insert
from control_plane.predicting.lengths import LengthClass, Lengths
from control_plane.types import RequestKind, RequestMetadata

BYTES_PER_TOKEN_PRIOR: Final = 4.0
#: what a ratio may be; one request counts as this share of it
LEAST_BYTES_PER_TOKEN: Final = 0.5
MOST_BYTES_PER_TOKEN: Final = 16.0
RATIO_SHARE: Final = 0.05
MAX_MODELS: Final = 1024

_CHAT: Final = RequestKind.CHAT
NOT_GENERATIVE: Final = frozenset((RequestKind.EMBEDDING, RequestKind.RERANK, RequestKind.SCORE, RequestKind.ANY))


class RequestSizes:
    """Learned by model (bytes of a token), and by model, tenant, size and ``max_tokens`` (lengths of answers)."""

    __slots__ = ("_bytes_per_token", "lengths")

    def __init__(self) -> None:
        self._bytes_per_token: dict[str, float] = {}
        self.lengths = Lengths()

    def input_tokens(self, request: RequestMetadata) -> int:
        fields: RequestFields = request
        told: int | None = fields.input_tokens
        if told is not None:
            return told
        prompt = fields.prompt
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            return len(prompt)
        size: int | None = fields.prompt_size_bytes
        if size is None:
            size = request.prompt_bytes
        return int(size / self.bytes_per_token(fields.model_name or "")) + 1

    def bytes_per_token(self, model: str) -> float:
        return self._bytes_per_token.get(model, BYTES_PER_TOKEN_PRIOR)

    def lengths_of(self, request: RequestMetadata) -> LengthClass | None:
        """How long such answers get; None where nothing is generated."""
        fields: RequestFields = request
        kind = fields.kind
        if (kind is None and fields.input is not None) or (kind is not _CHAT and kind in NOT_GENERATIVE):
            return None
        return self.lengths.of(fields.model_name or "", fields.tenant, self.input_tokens(request), fields.max_tokens)

    def observe_length(self, model: str, tenant: str, prompt_tokens: int, max_tokens: int | None, output_tokens: int) -> None:
        self.lengths.observe(model, tenant, prompt_tokens, max_tokens, output_tokens)

    def observe_prompt(self, model: str, prompt_bytes: int, tokens: int) -> None:
        """A prompt of that many bytes had ``tokens`` tokens as the engine counted."""
        if tokens < 1 or prompt_bytes < 1:
            return
        known = self.bytes_per_token(model)
        seen = min(MOST_BYTES_PER_TOKEN, max(LEAST_BYTES_PER_TOKEN, prompt_bytes / tokens))
        insert(self._bytes_per_token, model, known + RATIO_SHARE * (seen - known), MAX_MODELS)


def within(tokens: float, limit: int | None) -> int:
    """A length as a whole number, at least 1 and at most ``limit``."""
    found = int(tokens + 0.5) or 1
    return found if limit is None or found < limit else limit

"""Token counts as engines write them."""

from __future__ import annotations

import msgspec


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class UsageForm(msgspec.Struct):
    """Usage in OpenAI's chat form, its responses form, and Anthropic's: whichever names are there."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens_details: Details | None = None


decode_usage = msgspec.json.Decoder(UsageForm).decode

"""From messages and prompts to token ids: the simulated model's chat template (ChatML)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from control_plane.sim_engine.errors import MAX_TOKEN_CHARACTERS, invalid, shown, too_long, too_many_characters, validation
from control_plane.sim_engine.tokens import IM_END, IM_START, VOCABULARY_SIZE, Tokenizer

#: vLLM tries a message as every kind it knows and reports them all; here only the first is
_FIRST_KIND: Final = "ChatCompletionDeveloperMessageParam"


class Prompts:
    """Renders prompts of one model."""

    __slots__ = ("_context", "_model", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, model: str, context: int) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._context = context

    def chat(self, messages: Sequence[Any], tools: Any = None, *, generation: bool = True, continued: bool = False) -> list[int]:
        """Token ids of a conversation. Raises ApiError for what a text model's template refuses."""
        if not messages:
            raise invalid("Cannot apply chat template to an empty conversation. Provide at least one message.")
        tokens: list[int] = []
        if tools:
            tokens += self._turn("tools", msgspec.json.encode(tools).decode())
        for place, message in enumerate(messages):
            if not isinstance(message, dict) or "role" not in message:
                field = f"body.messages.{place}.{_FIRST_KIND}.role"
                raise validation([{"type": "missing", "loc": field, "msg": "Field required", "input": shown(message)}])
            tokens += self._turn(str(message["role"]), self.content(message, place))
        if continued:
            return tokens[:-2]
        if generation:
            tokens.append(IM_START)
            tokens += self._tokenizer.encode("assistant\n")
        return tokens

    def content(self, message: dict[str, Any], place: int) -> str:
        """The text of one message; tool calls are written out as JSON."""
        content = message.get("content")
        calls = message.get("tool_calls")
        if content is None and calls is None and message["role"] in ("user", "system", "developer", "tool"):
            field = f"body.messages.{place}.{_FIRST_KIND}.content"
            raise validation([{"type": "string_type", "loc": field, "msg": "Input should be a valid string", "input": "None"}])
        text = content if isinstance(content, str) else "".join(self._part(part) for part in content or ())
        return text + msgspec.json.encode(calls).decode() if calls else text

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return part
        kind = part.get("type", "text") if isinstance(part, dict) else ""
        if kind in ("image_url", "input_audio", "video_url", "audio_url", "image", "input_image", "file"):
            raise invalid(f"{self._model} is not a multimodal model")
        return str(part.get("text") or part.get("content") or "") if isinstance(part, dict) else ""

    def _turn(self, role: str, text: str) -> list[int]:
        return [IM_START, *self._encode(f"{role}\n{text}"), IM_END, *self._tokenizer.encode("\n")]

    def _encode(self, text: str) -> list[int]:
        if len(text) > self._context * MAX_TOKEN_CHARACTERS:
            raise too_many_characters(self._context, len(text))
        return self._tokenizer.encode(text)

    def completion(self, prompt: Any) -> list[list[int]]:
        """The prompts of ``/v1/completions``: a text, token ids, or a list of either. Raises ApiError."""
        if prompt is None or prompt == "":
            raise invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        if isinstance(prompt, str):
            return [self._encode(prompt)]
        if not isinstance(prompt, list):
            kinds = (("list_type", "list"), ("list_type", "list"), ("string_type", "string"), ("list_type", "list"))
            raise validation(
                [
                    {"type": kind, "loc": "body.prompt", "msg": f"Input should be a valid {what}", "input": str(prompt)}
                    for kind, what in kinds
                ]
            )
        if not prompt:
            raise invalid("You must pass at least one prompt")
        if isinstance(prompt[0], int):
            return [self._ids(prompt)]
        return [self._ids(item) if isinstance(item, list) else self._encode(str(item)) for item in prompt]

    def _ids(self, tokens: list[Any]) -> list[int]:
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool):
                raise validation(
                    [{"type": "int_type", "loc": "body.prompt", "msg": "Input should be a valid integer", "input": str(token)}]
                )
            if not 0 <= token < VOCABULARY_SIZE:
                raise invalid(f"Token id {token} is out of vocabulary")
        if len(tokens) > self._context:
            raise too_long(self._context, len(tokens))
        return tokens

"""From messages and prompts to token ids: the simulated model's chat template (ChatML)."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, Final

import msgspec

from control_plane.sim_engine.checks import Refused, either, list_of, model, natural, string
from control_plane.sim_engine.errors import (
    MAX_TOKEN_CHARACTERS,
    ApiError,
    invalid,
    refused_by_engine,
    shown,
    too_long,
    too_many_characters,
    validation,
)
from control_plane.sim_engine.fields import unfit
from control_plane.sim_engine.tokens import IM_END, IM_START, VOCABULARY_SIZE, Tokenizer

#: vLLM tries a message as every kind it knows and reports them all; here only the first is
_FIRST_KIND: Final = "ChatCompletionDeveloperMessageParam"
_INCOMPATIBLE: Final = (
    "continue_final_message and add_generation_prompt are not compatible. Use continue_final_message when you want the model to continue "
    "the final message, and add_generation_prompt when you want to add a header that will prompt it to start a new assistant message "
    "instead."
)


_MEDIA: Final = frozenset({"image_url", "input_audio", "video_url", "audio_url", "image", "input_image", "file"})
_CALLS: Final = list_of(
    model({"function": model({"name": string, "arguments": string}, "name", "arguments"), "type": string, "id": string}, "function")
)
_PROMPT: Final = either(list_of(natural), list_of(list_of(natural)), string, list_of(string))


def prompt_field(value: Any) -> Any:
    """The check of a prompt or of inputs: a text, token ids, or a list of either. Long ones of the right types are told at once."""
    if isinstance(value, list):
        ids = all(type(item) is int and item >= 0 for item in value)
        if ids or all(type(item) is str for item in value):
            return value
    return _PROMPT(value)


def _check_calls(calls: Any) -> None:
    try:
        _CALLS(calls or [])
    except Refused as refused:
        found = refused.findings[0]
        _, number, *inside = found.place.split(".")
        place = ".".join(("body", number, "ChatCompletionMessageFunctionToolCallParam", *inside[:1]))
        raise unfit((found._replace(place=""),), place) from None


def check_messages(messages: list[Any]) -> None:
    """The parts and calls of a chat's messages. (vLLM tells them as every kind that it knows; here the first.) Raises ApiError."""
    for message in messages:
        _check_calls(message.get("tool_calls") if isinstance(message, dict) else None)
        content = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            whole = isinstance(part, dict) and (isinstance(part.get("text"), str) if kind == "text" else kind in part)
            if not whole or kind not in (*_MEDIA, "text", "refusal"):
                found = f"1 validation error for ValidatorIterator\n{place}.ChatCompletionContentPartTextParam"
                raise ApiError(400, f"{found}\n  Input should be a valid dictionary [input_value={part!r}]")


def _check_role(message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise validation([{"type": "dict_type", "loc": place, "msg": "Input should be a valid dictionary", "input": shown(message)}])
    found = {"type": "missing", "loc": f"{place}.role", "msg": "Field required", "input": shown(message)}
    if "role" not in message:
        raise validation([found])
    if not isinstance(message["role"], str):
        expected = "'developer'"
        found.update(type="literal_error", msg=f"Input should be {expected}", input=shown(message["role"]))
        raise validation([{**found, "ctx": {"expected": expected}}])


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
        if continued and generation:
            raise ApiError(400, _INCOMPATIBLE)
        tokens: list[int] = []
        if tools:
            tokens += self._turn("tools", msgspec.json.encode(tools).decode())
        for place, message in enumerate(messages):
            _check_role(message, f"body.messages.{place}.{_FIRST_KIND}")
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
        absent = content is None and calls is None and "content" in message
        if (absent and message["role"] in ("user", "system", "developer", "tool")) or not isinstance(content, (str, list, NoneType)):
            field = f"body.messages.{place}.{_FIRST_KIND}.content"
            raise validation([{"type": "string_type", "loc": field, "msg": "Input should be a valid string", "input": shown(content)}])
        text = content if isinstance(content, str) else "".join(self._part(part) for part in content or ())
        return text + msgspec.json.encode(calls).decode() if calls else text

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return part
        kind = part.get("type", "text") if isinstance(part, dict) else ""
        if kind in _MEDIA:
            raise invalid(f"{self._model} is not a multimodal model")
        return str(part.get("text") or part.get("content") or "") if isinstance(part, dict) else ""

    def _turn(self, role: str, text: str) -> list[int]:
        return [IM_START, *self._encode(f"{role}\n{text}"), IM_END, *self._tokenizer.encode("\n")]

    def _encode(self, text: str) -> list[int]:
        if len(text) > self._context * MAX_TOKEN_CHARACTERS:
            raise too_many_characters(self._context, len(text))
        return self._tokenizer.encode(text)

    def completion(self, prompt: Any) -> list[list[int]]:
        """The prompts of ``/v1/completions``, as :func:`prompt_field` has taken them. Raises ApiError."""
        if prompt is None or prompt == "":
            raise invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        if isinstance(prompt, str):
            return [self._encode(prompt)]
        if not prompt:
            raise invalid("You must pass at least one prompt")
        if isinstance(prompt[0], int):
            return [self._ids(prompt)]
        return [self._ids(item) if isinstance(item, list) else self._encode(item) for item in prompt]

    def _ids(self, tokens: list[int]) -> list[int]:
        highest = max(tokens, default=0)
        if highest >= VOCABULARY_SIZE:
            raise refused_by_engine(f"Token id {highest} is out of vocabulary")
        if len(tokens) > self._context:
            raise too_long(self._context, len(tokens))
        return tokens

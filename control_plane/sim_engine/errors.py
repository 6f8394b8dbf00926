"""The error answers of vLLM 0.32, in its three shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

#: texts longer than this times the context are refused unread
MAX_TOKEN_CHARACTERS: Final = 80
_STATUS_TYPES: Final = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}


class ApiError(Exception):
    """An answer that is not 200. ``anthropic()`` gives the shape of ``/v1/messages``."""

    def __init__(self, status: int, message: str, *, kind: str | None = None, param: str | None = None, parsing: bool = False) -> None:
        super().__init__(message)
        #: found by vLLM's engine, when a stream has begun: then it is an event of that
        self.late = False
        self.status = status
        self.message = message
        self.kind = kind or _STATUS_TYPES.get(status, "InternalServerError")
        self.param = param
        #: found before the request was understood: these have vLLM's shape on every path
        self.parsing = parsing

    def body(self) -> bytes:
        return msgspec.json.encode(self._told())

    def event(self) -> bytes:
        """As the only event of a stream; Python's own encoder writes it in vLLM, with blanks."""
        return b"data: %b\n\n" % json.dumps(self._told()).encode()

    def _told(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}

    def anthropic(self) -> bytes:
        if self.parsing:
            return self.body()
        return msgspec.json.encode({"type": "error", "error": {"type": self.kind, "message": self.message}})


class PlainError(Exception):
    """Starlette's own: ``{"detail": ...}``."""

    def __init__(self, status: int, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = tuple(headers)

    def body(self) -> bytes:
        return msgspec.json.encode({"detail": self.detail})


class Moved(PlainError):
    """A path with a slash too many: Starlette sends to the one without."""

    def __init__(self, path: str) -> None:
        super().__init__(307, "")
        self.path = path


def invalid(message: str, parameter: str | None = None, value: object = None) -> ApiError:
    """A value that vLLM refuses after parsing (its VLLMValidationError)."""
    if parameter is not None:
        shown = f", value={value}" if value is not None else ""
        message = f"{message} (parameter={parameter}{shown})"
    return ApiError(400, message, param=parameter)


def refused_by_engine(message: str, parameter: str | None = None, value: object = None) -> ApiError:
    """The same, found only by the engine behind vLLM's server."""
    error = invalid(message, parameter, value)
    error.late = True
    return error


def unknown_model(model: str, served: str | None) -> ApiError:
    """``served`` None: a pooling server, which does not say what it serves."""
    if served is None:
        return ApiError(404, f"The model `{model}` does not exist.")
    return ApiError(404, f"The model `{model}` does not exist. Valid aliases: {served}.", param="model")


def too_long(limit: int, tokens: int | None = None) -> ApiError:
    """``tokens``: how many there are, where they came as ids; a text is only read until it is too long."""
    count, value = (f"at least {limit + 1}", limit + 1) if tokens is None else (str(tokens), tokens)
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {count} input tokens, which exceeds this "
        "limit even without any output tokens. Please reduce the length of the input prompt.",
        "input_tokens",
        value,
    )


def too_many_characters(limit: int, characters: int) -> ApiError:
    bound = limit * MAX_TOKEN_CHARACTERS
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {characters} characters (more than {bound} "
        f"characters, which is the upper bound for {limit} input tokens). Please reduce the length of the input prompt.",
        "input_text",
        characters,
    )


def shown(value: object) -> str:
    """A value as vLLM prints it in a validation error."""
    if isinstance(value, dict):
        return f"<dict of {len(value)} items>"
    if isinstance(value, list):
        return f"<list of {len(value)} items>"
    return str(value)


def validation(errors: Sequence[dict[str, Any]]) -> ApiError:
    """Pydantic's findings as vLLM words them; each has ``type``, ``loc``, ``msg``, ``input`` and perhaps ``ctx``."""
    many = "s" if len(errors) > 1 else ""
    lines = "".join(f"\n  {error}" for error in errors)
    return ApiError(400, f"{len(errors)} validation error{many}:{lines}", kind="Bad Request", param=errors[0]["loc"], parsing=True)

"""Parsing of request bodies, with the refusals that FastAPI and pydantic give in vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from control_plane.sim_engine.errors import ApiError, PlainError, shown, validation

Body = dict[str, Any]
#: gives the value as pydantic would convert it, or the error's type and message
Check = Callable[[Any], Any]


class _Bad(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def parse(content_type: bytes | None, body: bytes) -> Body:
    """The JSON object of a request. Raises ApiError or PlainError."""
    if content_type is None or content_type.partition(b";")[0].strip().lower() != b"application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise ApiError(400, message, kind="Bad Request", parsing=True)
    if not body:
        raise validation([_error("missing", "body", "Field required", None)])
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        parsed = _decode_leniently(body)
    if not isinstance(parsed, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise validation([_error("model_attributes_type", "body", message, parsed)])
    return parsed


def _decode_leniently(body: bytes) -> Any:
    """Python's own decoder takes NaN, and says where and what is wrong."""
    try:
        return json.loads(body)
    except UnicodeDecodeError:
        raise PlainError(400, "There was an error parsing the body") from None
    except json.JSONDecodeError as error:
        found = _error("json_invalid", f"body.{error.pos}", "JSON decode error", {})
        found["ctx"] = {"error": error.msg}
        raise validation([found]) from None


def check(body: Body, checks: Mapping[str, Check], required: tuple[str, ...] = ()) -> Body:
    """The fields that ``checks`` names, converted; others as they are. Raises ApiError with all findings."""
    errors = [_error("missing", f"body.{name}", "Field required", body) for name in required if name not in body]
    result = dict(body)
    for name, value in body.items():
        convert = checks.get(name)
        if convert is None or (value is None and name not in required):
            continue
        try:
            result[name] = convert(value)
        except _Bad as bad:
            errors.append(_error(bad.kind, f"body.{name}", bad.message, value))
            if bad.kind == "value_error":
                errors[-1]["ctx"] = {"error": ValueError(bad.message.removeprefix("Value error, "))}
    if errors:
        raise validation(errors)
    return result


def _error(kind: str, place: str, message: str, value: object) -> dict[str, Any]:
    return {"type": kind, "loc": place, "msg": message, "input": shown(value)}


def integer(value: Any) -> int:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        raise _Bad("int_from_float", "Input should be a valid integer, got a number with a fractional part")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise _Bad("int_parsing", "Input should be a valid integer, unable to parse string as an integer") from None
    raise _Bad("int_type", "Input should be a valid integer")


def number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _Bad("float_parsing", "Input should be a valid number, unable to parse string as a number") from None
    raise _Bad("float_type", "Input should be a valid number")


_TRUTHS: Final = {"true": True, "yes": True, "on": True, "t": True, "y": True, "1": True}
_TRUTHS.update({"false": False, "no": False, "off": False, "f": False, "n": False, "0": False})


def boolean(value: Any) -> bool:
    if value in (0, 1) and isinstance(value, (bool, int, float)):
        return bool(value)
    if isinstance(value, (str, int, float)):
        found = _TRUTHS.get(value.lower()) if isinstance(value, str) else None
        if found is None:
            raise _Bad("bool_parsing", "Input should be a valid boolean, unable to interpret input")
        return found
    raise _Bad("bool_type", "Input should be a valid boolean")


def string(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _Bad("string_type", "Input should be a valid string")


def listing(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise _Bad("list_type", "Input should be a valid list")


def mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise _Bad("dict_type", "Input should be a valid dictionary")


def string_or_list(value: Any) -> Any:
    if isinstance(value, (str, list)):
        return value
    raise _Bad("string_type", "Input should be a valid string")


def positive(value: Any) -> int:
    """An integer that one validator of vLLM's Anthropic request wants above zero."""
    found = integer(value)
    if found < 1:
        raise _Bad("value_error", "Value error, max_tokens must be positive")
    return found


#: what chat, completions and responses have in common
SAMPLING: Final[dict[str, Check]] = {
    "model": string,
    "frequency_penalty": number,
    "logit_bias": mapping,
    "max_tokens": integer,
    "n": integer,
    "presence_penalty": number,
    "seed": integer,
    "stop": string_or_list,
    "stream": boolean,
    "stream_options": mapping,
    "temperature": number,
    "top_p": number,
    "user": string,
    "top_k": integer,
    "min_p": number,
    "repetition_penalty": number,
    "stop_token_ids": listing,
    "include_stop_str_in_output": boolean,
    "ignore_eos": boolean,
    "min_tokens": integer,
    "truncate_prompt_tokens": integer,
    "prompt_logprobs": integer,
    "echo": boolean,
    "priority": integer,
    "request_id": string,
    "return_token_ids": boolean,
    "cache_salt": string,
    "structured_outputs": mapping,
}

"""Parsing of request bodies, with the refusals that FastAPI and pydantic give in vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from control_plane.sim_engine.checks import Check, Finding, Refused, checked
from control_plane.sim_engine.errors import ApiError, PlainError, invalid, shown, validation

Body = dict[str, Any]
#: characters of a cache salt, and those that it may not have
_LONGEST_SALT = 128
_NOT_IN_SALTS = "@/\\\0"


def parse(content_type: bytes | None, body: bytes) -> Body:
    """The JSON object of a request. Raises ApiError or PlainError."""
    if content_type is None or content_type.partition(b";")[0].strip().lower() != b"application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise ApiError(400, message, kind="Bad Request", parsing=True)
    parsed = _decode(body) if body else None
    if parsed is None:
        raise validation([_error("missing", "body", "Field required", None)])
    if b"\\u" in body:
        _check_characters(parsed)
    if not isinstance(parsed, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise validation([_error("model_attributes_type", "body", message, parsed)])
    return parsed


def _check_characters(parsed: Any) -> None:
    """Raises ApiError for half a character (a lone surrogate): no answer could repeat it, and no tokenizer of vLLM's takes it."""
    try:
        msgspec.json.encode(parsed)
    except UnicodeEncodeError:
        raise ApiError(400, "TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]") from None


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    # Python's own decoder takes NaN, and says where and what is wrong
    try:
        return json.loads(body)
    except (UnicodeDecodeError, RecursionError):
        raise PlainError(400, "There was an error parsing the body") from None
    except json.JSONDecodeError as error:
        found = _error("json_invalid", f"body.{error.pos}", "JSON decode error", {})
        found["ctx"] = {"error": error.msg}
        raise validation([found]) from None


def check(body: Body, checks: Mapping[str, Check], required: tuple[str, ...] = ()) -> Body:
    """The fields that ``checks`` names, converted; others as they are. Raises ApiError with all findings."""
    try:
        return checked(body, checks, required)
    except Refused as refused:
        raise unfit(refused.findings) from None


def unfit(findings: tuple[Finding, ...], place: str = "body") -> ApiError:
    """The answer to a body with these findings."""
    errors = []
    for finding in findings:
        errors.append(_error(finding.kind, place + finding.place, finding.message, finding.value))
        if finding.ctx:
            errors[-1]["ctx"] = finding.ctx
    return validation(errors)


def check_salt(body: Body) -> None:
    """Raises ApiError for a ``cache_salt`` that the caches behind vLLM could not keep."""
    salt = body.get("cache_salt")
    if salt is None:
        return
    if not isinstance(salt, str) or not salt:
        raise invalid("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
    if len(salt) > _LONGEST_SALT or any(letter in salt for letter in _NOT_IN_SALTS):
        message = f"Parameter 'cache_salt' must be at most {_LONGEST_SALT} characters and must not contain '@', '/', '\\\\', or NUL."
        raise invalid(message, "cache_salt")


def _error(kind: str, place: str, message: str, value: object) -> dict[str, Any]:
    return {"type": kind, "loc": place, "msg": message, "input": shown(value)}

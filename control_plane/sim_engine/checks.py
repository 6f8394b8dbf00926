"""Checks of single values, with the findings that pydantic has in vLLM: what is wrong, where, and with what.

A check gives the value as pydantic converts it or raises :class:`Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

Check = Callable[[Any], Any]
_INT64: Final = 2**63


class Finding(NamedTuple):
    """One thing that is wrong. ``place``: where inside the value, as ``.0.name``."""

    kind: str
    message: str
    value: Any
    place: str = ""
    ctx: dict[str, Any] | None = None


class Refused(Exception):
    """A value that a check does not take."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__(findings[0].message)
        self.findings = findings


def refuse(kind: str, message: str, value: Any, **ctx: Any) -> Refused:
    return Refused(Finding(kind, message, value, "", ctx or None))


class Firm:
    """A check that takes no null; all others are passed over for null."""

    __slots__ = ("_check",)

    def __init__(self, check: Check) -> None:
        self._check = check

    def __call__(self, value: Any) -> Any:
        return self._check(value)


# ---- scalars


def integer(value: Any) -> int:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        raise refuse("int_from_float", "Input should be a valid integer, got a number with a fractional part", value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise refuse("int_parsing", "Input should be a valid integer, unable to parse string as an integer", value) from None
    raise refuse("int_type", "Input should be a valid integer", value)


def number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise refuse("float_parsing", "Input should be a valid number, unable to parse string as a number", value) from None
    raise refuse("float_type", "Input should be a valid number", value)


_TRUTHS: Final = {"true": True, "yes": True, "on": True, "t": True, "y": True, "1": True}
_TRUTHS.update({"false": False, "no": False, "off": False, "f": False, "n": False, "0": False})


def boolean(value: Any) -> bool:
    if value in (0, 1) and isinstance(value, (bool, int, float)):
        return bool(value)
    if isinstance(value, (str, int, float)):
        found = _TRUTHS.get(value.lower()) if isinstance(value, str) else None
        if found is None:
            raise refuse("bool_parsing", "Input should be a valid boolean, unable to interpret input", value)
        return found
    raise refuse("bool_type", "Input should be a valid boolean", value)


def string(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise refuse("string_type", "Input should be a valid string", value)


def mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise refuse("dict_type", "Input should be a valid dictionary", value)


def listing(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise refuse("list_type", "Input should be a valid list", value)


def anything(value: Any) -> Any:
    return value


def between(check: Check, low: float, high: float | None = None) -> Check:
    def bounded(value: Any) -> Any:
        found = check(value)
        if found < low:
            raise refuse("greater_than_equal", f"Input should be greater than or equal to {_plain(low)}", value, ge=low)
        if high is not None and found > high:
            raise refuse("less_than_equal", f"Input should be less than or equal to {_plain(high)}", value, le=high)
        return found

    return bounded


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


#: what a 64-bit field holds
int64: Final = between(integer, -_INT64, _INT64 - 1)
#: of a token
natural: Final = between(integer, 0)


def literal(*allowed: str) -> Check:
    names = [repr(name) for name in allowed]
    told = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]

    def known(value: Any) -> Any:
        if not isinstance(value, str) or value not in allowed:
            raise refuse("literal_error", f"Input should be {told}", value, expected=told)
        return value

    return known


# ---- what holds others


def list_of(check: Check, most: int | None = None) -> Check:
    def items(value: Any) -> list[Any]:
        found, findings = [], []
        for place, item in enumerate(listing(value)):
            try:
                found.append(check(item))
            except Refused as refused:
                findings += [finding._replace(place=f".{place}{finding.place}") for finding in refused.findings]
        if findings:
            raise Refused(*findings)
        if most is not None and len(found) > most:
            message = f"List should have at most {most} items after validation, not {len(found)}"
            raise refuse("too_long", message, value, field_type="List", max_length=most, actual_length=len(found))
        return found

    return items


def map_of(check: Check) -> Check:
    def values(value: Any) -> dict[str, Any]:
        return checked(mapping(value), dict.fromkeys(value, Firm(check)))

    return values


def either(*checks: Check) -> Check:
    """The first that takes the value; the findings of all when none does."""

    def some(value: Any) -> Any:
        findings: list[Finding] = []
        for check in checks:
            try:
                return check(value)
            except Refused as refused:
                findings += refused.findings
        raise Refused(*findings)

    return some


def model(fields: Mapping[str, Check], *required: str) -> Check:
    """An object with these fields; others are not looked at."""

    def members(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse("model_attributes_type", "Input should be a valid dictionary or object to extract fields from", value)
        return checked(value, fields, required)

    return members


def checked(value: dict[str, Any], fields: Mapping[str, Check], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy with the ``fields`` converted, in their order. Raises Refused with all findings."""
    result, findings = dict(value), []
    for name, check in fields.items():
        if name not in value:
            if name in required:
                findings.append(Finding("missing", "Field required", value, f".{name}"))
        elif value[name] is not None or name in required or isinstance(check, Firm):
            try:
                result[name] = check(value[name])
            except Refused as refused:
                findings += [finding._replace(place=f".{name}{finding.place}") for finding in refused.findings]
    if findings:
        raise Refused(*findings)
    return result


# ---- what several requests have in common

text_or_texts: Final = either(string, list_of(string, most=4))
TOOL: Final = model({"type": Firm(literal("function")), "function": model({"name": string, "parameters": mapping}, "name")}, "function")
EFFORT: Final = literal("none", "minimal", "low", "medium", "high", "xhigh", "max")
#: of chat, completions and responses
SAMPLING: Final[dict[str, Check]] = {
    "model": string,
    "frequency_penalty": number,
    "logit_bias": map_of(number),
    "max_tokens": integer,
    "n": integer,
    "presence_penalty": number,
    "seed": int64,
    "stop": text_or_texts,
    "stream": boolean,
    "stream_options": model({"include_usage": boolean, "continuous_usage_stats": boolean}),
    "temperature": number,
    "top_p": number,
    "user": string,
    "use_beam_search": Firm(boolean),
    "top_k": integer,
    "min_p": number,
    "repetition_penalty": number,
    "length_penalty": Firm(number),
    "stop_token_ids": list_of(integer),
    "include_stop_str_in_output": Firm(boolean),
    "ignore_eos": Firm(boolean),
    "min_tokens": Firm(integer),
    "skip_special_tokens": Firm(boolean),
    "truncate_prompt_tokens": between(integer, -1),
    "prompt_logprobs": integer,
    "allowed_token_ids": list_of(integer),
    "bad_words": Firm(list_of(string)),
    "echo": boolean,
    "structured_outputs": model({"choice": list_of(string), "regex": string, "grammar": string, "json_object": boolean}),
    "priority": Firm(int64),
    "request_id": Firm(string),
    "return_token_ids": boolean,
    "cache_salt": string,
}

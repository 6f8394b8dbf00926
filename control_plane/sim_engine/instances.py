"""Texts that satisfy a constraint: the smallest instance of a JSON schema, a match of a regular expression."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from control_plane.sim_engine.errors import refused_by_engine

try:  # the parser of re has been renamed between Python versions
    from re import _parser as _regex  # type: ignore[attr-defined]
except ImportError:  # pragma: no cover
    import sre_parse as _regex

_KINDS: Final = frozenset({"object", "array", "string", "integer", "number", "boolean", "null"})
_MAX_DEPTH: Final = 16
_MAX_VALUES: Final = 10_000
#: characters that one repetition in a pattern may make
_MAX_REPEATED: Final = 10_000


def instance_json(schema: Any) -> str:
    """The smallest instance as JSON text, compact."""
    return msgspec.json.encode(instance(schema)).decode()


def instance(schema: Any) -> Any:
    """Required properties only, first alternatives, lower bounds. Beyond 16 levels or 10,000 values everything is null."""
    return _Builder(schema).build(schema, 0)


class _Builder:
    __slots__ = ("_left", "_root")

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = _MAX_VALUES

    def build(self, schema: Any, depth: int) -> Any:
        self._left -= 1
        if not isinstance(schema, dict) or depth > _MAX_DEPTH or self._left < 0:
            return None
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][0]
        if "$ref" in schema:
            return self.build(_resolve(str(schema["$ref"]), self._root), depth + 1)
        for key in ("anyOf", "oneOf", "allOf"):
            if schema.get(key):
                return self.build({**schema[key][0], **{k: v for k, v in schema.items() if k != key}}, depth + 1)
        return self._of_type(schema, depth)

    def _of_type(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            kind = kind[0]
        if kind is not None and kind not in _KINDS:
            raise refused_by_engine(f"Grammar error: Invalid type: {kind}")
        if kind == "object":
            properties = schema.get("properties", {})
            return {name: self.build(properties.get(name, {}), depth + 1) for name in schema.get("required", ())}
        if kind == "array":
            count = min(schema.get("minItems", 0), max(0, self._left))
            return [self.build(schema.get("items", {}), depth + 1) for _ in range(count)]
        return _scalar(kind, schema)


def _scalar(kind: Any, schema: dict[str, Any]) -> Any:
    if kind == "string":
        text = match(str(schema["pattern"])) if "pattern" in schema else "text"
        return text.ljust(min(10_000, schema.get("minLength", 0)), "x")[: schema.get("maxLength")]
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        return max(low, 0) if "maximum" not in schema else min(max(low, 0), schema["maximum"])
    return {"boolean": True, "null": None}.get(kind, "text")


def _resolve(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#").split("/"):
        if part:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def match(pattern: str) -> str:
    """A text that ``pattern`` matches. Raises ApiError when it is no regular expression."""
    try:
        parsed = _regex.parse(pattern)
    except re.error as error:
        raise refused_by_engine(f'Grammar error: invalid regex "{pattern}" (in regex): {error}') from None
    return _match(parsed)


def _match(parsed: Any) -> str:
    return "".join(_match_one(str(operation).lower(), argument) for operation, argument in parsed)


def _match_one(operation: str, argument: Any) -> str:
    if operation == "literal":
        return chr(int(argument))
    if operation == "in":
        return _match_set(argument)
    if operation in ("max_repeat", "min_repeat", "possessive_repeat"):
        low, _, repeated = argument
        text = _match(repeated)
        return text * min(int(low), _MAX_REPEATED // max(1, len(text)))
    if operation == "subpattern":
        return _match(argument[-1])
    if operation == "branch":
        return _match(argument[1][0])
    if operation in ("any", "not_literal"):
        return "b" if argument == ord("a") else "a"
    return ""


def _match_set(choices: Any) -> str:
    operation, argument = str(choices[0][0]).lower(), choices[0][1]
    if operation == "negate":
        refused = {chr(value) for kind, value in choices if str(kind).lower() == "literal"}
        return next(letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789_ " if letter not in refused)
    if operation == "range":
        return chr(int(argument[0]))
    if operation == "category":
        return {"category_digit": "0", "category_space": " "}.get(str(argument).lower(), "a")
    return chr(int(argument))

"""What constrains a text: ``structured_outputs`` and ``response_format``, with vLLM's refusals, and the text that fits them."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from control_plane.sim_engine.checks import literal, mapping, model, string
from control_plane.sim_engine.errors import invalid, refused_by_engine
from control_plane.sim_engine.fields import Body
from control_plane.sim_engine.instances import instance_json, match

#: the members of vLLM's parameters, in the order in which it prints them, with their defaults
_MEMBERS: Final[dict[str, Any]] = {
    **dict.fromkeys(("json", "regex", "choice", "grammar", "json_object")),
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
    "_backend": None,
    "_backend_was_auto": False,
}
_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_FORMAT: Final = model(
    {
        "type": literal("text", "json_object", "json_schema"),
        "json_schema": model({"name": string, "schema": mapping}, "name"),
    },
    "type",
)
#: a grammar of one rule that is one text; others are not followed
_ONE_TEXT: Final = re.compile(r'\s*root\s*::=\s*("(?:[^"\\]|\\.)*")\s*')


def response_format(value: Any) -> Any:
    """The check of that field. (A structural tag is taken and not followed.)"""
    return value if isinstance(value, dict) and value.get("type") == "structural_tag" else _FORMAT(value)


def check_constraints(body: Body, parameter: str | None = None) -> None:
    """What vLLM refuses before it looks at types. Raises ApiError. ``parameter``: the field that it names then, if any."""
    form: Any = body.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema" and form.get("json_schema") is None:
        message = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
        raise invalid(message, "response_format")
    if kind == "structural_tag" and not (form.get("structures") or isinstance(form.get("format"), dict)):
        raise invalid("Invalid response_format structural_tag specification.", "response_format")
    wanted = body.get("structured_outputs")
    if isinstance(wanted, dict) and sum(wanted.get(name) is not None for name in ("json", "regex", "choice")) > 1:
        raise invalid("You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice').", parameter)


def forced_text(body: Body) -> str | None:
    """The text that the request leaves no choice but to give; None: free. Raises ApiError."""
    given: Any = body.get("structured_outputs")
    form: Any = body.get("response_format")
    if given is not None:
        _count(given)
    wanted = dict(given or {})
    kind = form["type"] if form is not None else "text"
    if kind == "json_object":
        wanted["json_object"] = True
    elif kind == "json_schema":
        wanted["json"] = form["json_schema"].get("schema")
    elif given is None:
        return None
    _count(wanted)
    return _fitting(wanted)


def _count(wanted: dict[str, Any]) -> None:
    """Exactly one constraint. Raises ApiError."""
    count = sum(wanted.get(kind) is not None for kind in _KINDS)
    if count == 1:
        return
    told = {name: wanted.get(name, default) for name, default in _MEMBERS.items()}
    if count:
        raise invalid(f"You can only use one kind of structured outputs constraint but multiple are specified: {told}")
    raise invalid(f"You must use one kind of structured outputs constraint but none are specified: {told}")


def _fitting(wanted: dict[str, Any]) -> str | None:
    if (choices := wanted.get("choice")) is not None:
        if not choices:
            raise refused_by_engine("Choice '[]' cannot be an empty list")
        return str(choices[0])
    if (pattern := wanted.get("regex")) is not None:
        return match(pattern)
    if (schema := wanted.get("json")) is not None:
        return instance_json(_schema(schema))
    if (grammar := wanted.get("grammar")) is not None:
        found = _ONE_TEXT.fullmatch(grammar)
        return str(json.loads(found[1])) if found else None
    return "{}" if wanted.get("json_object") else None


def _schema(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        raise refused_by_engine("Invalid JSON grammar specification.") from None

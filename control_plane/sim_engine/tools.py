"""Tool calls: which tool a request forces, its call as the model would write it (Hermes' form), and as the API tells it."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import msgspec

from control_plane.sim_engine.errors import invalid
from control_plane.sim_engine.fields import Body
from control_plane.sim_engine.instances import instance_json

Json = dict[str, Any]
_CALL: Final = re.compile(r'<tool_call>\s*\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*(\{.*\})\s*\}\s*</tool_call>', re.DOTALL)


class ToolCall(NamedTuple):
    """``text`` is what the model generates; ``arguments`` stands in it from character ``begin``."""

    name: str
    arguments: str
    text: str
    begin: int
    #: when it was written to its end
    finish_reason: str
    #: beside a call that the model made by itself
    content: str | None = ""

    def whole(self, call_id: str) -> Json:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"chatcmpl-tool-{call_id}", "type": "function", "function": function}

    def deltas(self, before: int, text: str, call_id: str) -> list[Json]:
        """For ``text``, which begins ``before`` characters into the call: the name once it is known, then arguments as they come."""
        found: list[Json] = []
        end = before + len(text)
        if before < self.begin <= end:
            function: Json = {"name": self.name}
            call = {"id": f"chatcmpl-tool-{call_id}", "type": "function", "index": 0, "function": function}
            found.append({"content": None, "tool_calls": [call]})
        low, high = max(before, self.begin), min(end, self.begin + len(self.arguments))
        if low < high:
            function = {"arguments": self.text[low:high]}
            found.append({"content": None, "tool_calls": [{"index": 0, "function": function}]})
        return found


def written_call(text: str) -> ToolCall | None:
    """The call that stands in a text, as vLLM's Hermes parser finds it."""
    found = _CALL.fullmatch(text.strip())
    return ToolCall(found[1], found[2], text, text.index(found[2]), "tool_calls", None) if found else None


def chosen_tool(body: Body, forced: str | None = None) -> ToolCall | None:
    """The call that ``tool_choice`` asks for (required, named), or that the ``forced`` output is. None: text. Raises ApiError."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools == []:
        message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        raise invalid(message, "tools")
    if choice == "none" or (choice is None and tools is None):
        return None
    if choice is None:
        choice = "auto"
    if tools is None:
        raise invalid("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, dict):
        return _named(tools, choice)
    if choice not in ("auto", "required"):
        message = f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.'
        raise invalid(message, "tool_choice")
    if choice == "required":
        return _call(tools[0]["function"], "tool_calls") if tools else None
    return written_call(forced) if forced else None


def _named(tools: Any, choice: Json) -> ToolCall:
    function = choice.get("function")
    usage = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'
    if not isinstance(function, dict):
        raise invalid(f"Invalid value for `function`: `{function}` in `tool_choice`! {usage}", "tool_choice.function")
    if "name" not in function:
        raise invalid(f"Expected field `name` in `function` in `tool_choice`! {usage}", "tool_choice.function.name")
    name = function["name"]
    if not isinstance(name, str) or not name:
        raise invalid(f"Invalid `name` in `function`: `{name}` in `tool_choice`! {usage}", "tool_choice.function.name")
    for tool in tools:
        if tool["function"]["name"] == name:
            return _call(tool["function"], "stop")
    raise invalid("The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice")


def _call(function: Json, finish_reason: str) -> ToolCall:
    parameters = function.get("parameters")
    arguments = instance_json(parameters) if parameters else "{}"
    name = str(function["name"])
    before = f'<tool_call>\n{{"name": {msgspec.json.encode(name).decode()}, "arguments": '
    return ToolCall(name, arguments, f"{before}{arguments}}}\n</tool_call>", len(before), finish_reason)

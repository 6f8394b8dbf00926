"""Tool calls: which tool a request forces, its call as the model would write it (Hermes' form), and as the API tells it."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from control_plane.sim_engine.errors import invalid
from control_plane.sim_engine.fields import Body
from control_plane.sim_engine.instances import instance_json

Json = dict[str, Any]


class ToolCall(NamedTuple):
    """``text`` is what the model generates; ``arguments`` stands in it from character ``begin``."""

    name: str
    arguments: str
    text: str
    begin: int
    #: when it was written to its end
    finish_reason: str

    def whole(self, call_id: str) -> Json:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"chatcmpl-tool-{call_id}", "type": "function", "function": function}

    def deltas(self, before: int, text: str, call_id: str) -> list[Json]:
        """For ``text``, which begins ``before`` characters into the call: the name once it is known, then arguments as they come."""
        found: list[Json] = []
        end = before + len(text)
        if before < self.begin <= end:
            function: Json = {"name": self.name}
            found.append({"tool_calls": [{"id": f"chatcmpl-tool-{call_id}", "type": "function", "index": 0, "function": function}]})
        low, high = max(before, self.begin), min(end, self.begin + len(self.arguments))
        if low < high:
            function = {"arguments": self.text[low:high]}
            found.append({"tool_calls": [{"index": 0, "function": function}]})
        return found


def chosen_tool(body: Body) -> ToolCall | None:
    """The call that ``tool_choice`` required or named asks for; None: the model is free to talk. Raises ApiError."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools == []:
        message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        raise invalid(message, "tools")
    if choice is None or choice == "none":
        return None
    if tools is None:
        raise invalid("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, dict):
        return _named(tools, choice)
    if choice not in ("auto", "required"):
        message = f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.'
        raise invalid(message, "tool_choice")
    return _call(tools[0]["function"], "tool_calls") if choice == "required" else None


def _named(tools: Any, choice: Json) -> ToolCall:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        usage = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'
        raise invalid(f"Expected field `name` in `function` in `tool_choice`! {usage}", "tool_choice.function.name")
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

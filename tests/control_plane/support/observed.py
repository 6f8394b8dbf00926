"""What of an answer must be the same on a real and on a simulated engine, as plain JSON: two answers agree when these are equal.

Texts, ids, times and counts of tokens are left out where a model's chance or its tokenizer makes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from golden_requests import Answer, Case

#: members whose values say what kind of thing an object is or how it ended; of all others only the type is compared
KEPT = frozenset({"object", "type", "role", "status", "finish_reason", "stop_reason", "owned_by", "model"})
#: members of these are maps by token, whose keys are chance
TOKEN_MAPS = frozenset({"top_logprobs", "prompt_logprobs"})
_RESPONSE_ID = re.compile(r"\bresp_[0-9a-f]{16}\b")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
#: the simulated engine marks its answers, and names itself in `server`
MARKS = frozenset({"x-simulated"})


def observe(case: Case, answer: Answer) -> dict[str, Any]:
    """Status, header names, content type, and the body by what it is: errors whole, JSON and events by shape, other text whole."""
    observed: dict[str, Any] = {
        "status": answer.status,
        "headers": sorted({name for name, _ in answer.headers} - MARKS),
        "content_type": answer.header("content-type"),
    }
    if case.path == "/metrics":
        observed["metrics"] = metric_families(answer.body.decode())
        return observed
    parsed = answer.json()
    if answer.events is not None:
        observed["events"] = event_shapes(answer.events)
    elif parsed is None:
        observed["text"] = answer.body.decode(errors="replace")
    else:
        observed["json"] = shape(parsed) if answer.status < 400 else json.loads(_RESPONSE_ID.sub("resp_ID", answer.body.decode()))
    return observed


def shape(value: Any, name: str = "") -> Any:
    """What a JSON value looks like: names and types, without values (but of the KEPT); runs of equal list items count once."""
    if isinstance(value, dict):
        if name in TOKEN_MAPS and "token" not in value:
            return {"(tokens)": _once(shape(item) for item in value.values())}
        return {key: shape(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return _once(shape(item, name) for item in value)
    if name in KEPT and isinstance(value, str):
        return f"= {value}"
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    return "number" if isinstance(value, int | float) else "string"


def event_shapes(events: Iterable[str]) -> list[Any]:
    """The events of a stream in order as (choice, event's name, shape of its data), grouped by choice, runs counted once.

    How many tokens an event carries and how choices interleave is chance on a real engine; this is what is left.
    """
    by_choice: dict[str, list[Any]] = {}
    for event in events:
        fields = dict(line.partition(": ")[::2] for line in event.split("\n"))
        data = fields.get("data", "")
        parsed = json.loads(data) if data.startswith("{") else None
        choices = parsed.get("choices") if parsed is not None else None
        choice = str(choices[0]["index"]) if choices else "none"
        by_choice.setdefault(choice, []).append([fields.get("event"), data if parsed is None else shape(parsed)])
    return [[choice, _once(seen)] for choice, seen in sorted(by_choice.items())]


def metric_families(text: str) -> dict[str, Any]:
    """vLLM's own series: help, type and, by sample name, every set of labels (an info's only by name). Values are left out."""
    families: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith(("# HELP vllm:", "# TYPE vllm:")):
            _, keyword, family, told = line.split(" ", 3)
            families.setdefault(family, {"samples": {}})[keyword.lower()] = told
        elif line.startswith("vllm:"):
            name, _, labels = line.rpartition(" ")[0].partition("{")
            pairs = _LABEL.findall(labels)
            told = ",".join(sorted(key for key, _ in pairs) if name.endswith("_info") else sorted(f"{key}={value}" for key, value in pairs))
            family = next(found for found in reversed(families) if name.startswith(found))
            families[family]["samples"].setdefault(name, []).append(told)
    for family in families.values():
        for labels in family["samples"].values():
            labels.sort()
    return families


def _once(items: Iterable[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if not kept or kept[-1] != item:
            kept.append(item)
    return kept


def differences(real: Any, other: Any, path: str = "") -> list[str]:
    """One line for each place where `other` is not as `real`: where, what the real one has, what the other has."""
    if isinstance(real, dict) and isinstance(other, dict):
        keys = [*real, *(key for key in other if key not in real)]
        return [line for key in keys for line in differences(real.get(key, "(absent)"), other.get(key, "(absent)"), f"{path}.{key}")]
    if isinstance(real, list) and isinstance(other, list) and len(real) == len(other):
        return [line for i, pair in enumerate(zip(real, other, strict=True)) for line in differences(*pair, f"{path}[{i}]")]
    return [] if real == other else [f"{path[1:]}: real {_short(real)}, other {_short(other)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]}..."

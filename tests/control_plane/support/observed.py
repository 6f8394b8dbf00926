"""What of an answer must be the same on a real and on a simulated engine, as plain JSON: two answers agree when these are equal.

Texts, ids, times and counts of tokens are left out where a model's chance or its tokenizer makes them.

To record what real servers answer (see golden_requests for their flags), for tests without one:

    python tests/control_plane/support/observed.py GENERATING_URL EMBEDDING_URL tests/control_plane/data/vllm_golden.json.gz
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from golden_refusals import REFUSALS
from golden_requests import CASES, EMBEDDING_CASES, Answer, Case, send_all

#: sent to a server that generates, and to it and to one that embeds
GENERATING_CASES = (*CASES, *REFUSALS)
ALL_CASES = (*GENERATING_CASES, *EMBEDDING_CASES)
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


class Allowance(NamedTuple):
    """A difference that is meant. ``where``: part of the path at which it lies."""

    case: str
    where: str
    reason: str


_BRANCHES = "pydantic tells every branch of a union, which are vLLM's internals; the simulated engine tells the first"
_NOT_MODELLED = "the simulated engine has no such part"

ALLOWANCES = (
    Allowance("models", "data[0].owned_by", "a simulated engine says that it is one"),
    Allowance("models", "data[0].simulated", "a simulated engine says that it is one"),
    Allowance("embed_models", "data[0].owned_by", "a simulated engine says that it is one"),
    Allowance("embed_models", "data[0].simulated", "a simulated engine says that it is one"),
    Allowance("metrics", "vllm:estimated_", _NOT_MODELLED),
    Allowance("metrics", "vllm:engine_sleep_state", _NOT_MODELLED),
    Allowance("metrics", "vllm:mm_cache_", _NOT_MODELLED),
    Allowance("metrics", "vllm:prompt_tokens_cached_by_source_", _NOT_MODELLED),
    Allowance("metrics", "vllm:admission_rejections_", _NOT_MODELLED),
    Allowance("metrics", "vllm:tool_call_parser_invocations_", _NOT_MODELLED),
    Allowance("metrics", "vllm:cache_config_info.samples", "it tells those of the cache's settings that it has"),
    Allowance("chat_stream_n2", "delta.content", "a sampled last token may have no text of its own (half a character)"),
    Allowance("chat_stream_stop", "events", "how much text a stop string holds back depends on the length of the model's words"),
    Allowance("chat_logit_bias_out_of_range", "error.message", "names the size of the vocabulary"),
    Allowance("chat_content_null", "error.message", _BRANCHES),
    Allowance("chat_no_role", "error.message", _BRANCHES),
    Allowance("chat_response_format_unknown", "error.message", _BRANCHES),
    Allowance("embed_format_unknown", "error.message", _BRANCHES),
    Allowance("embed_missing", "error.message", _BRANCHES),
    Allowance("embed_score_missing", "error.message", _BRANCHES),
    Allowance("chat_structured_bad_regex", "error.message", "another library reads the regular expression"),
    Allowance("completion_min_tokens", "finish_reason", "when a model of random weights ends its text is chance"),
)


def unexpected(case: Case, real: Any, other: Any) -> list[str]:
    """The differences between two observations of a case that no allowance covers."""
    allowed = [entry.where for entry in ALLOWANCES if entry.case == case.name]
    lines = differences(real, other)
    return [line for line in lines if not any(where in line.partition(": ")[0] for where in allowed)]


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


def record(url: str, embedding_url: str) -> dict[str, Any]:
    """What two real servers answer to every case, and their version."""
    answers = send_all(url, GENERATING_CASES) | send_all(embedding_url, EMBEDDING_CASES)
    observed = {case.name: observe(case, answers[case.name]) for case in ALL_CASES}
    return {"vllm_version": answers["version"].json()["version"], "cases": observed}


def write(recorded: dict[str, Any], out: Path) -> None:
    """Compressed, and the same bytes for the same content."""
    out.write_bytes(gzip.compress(json.dumps(recorded, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0))


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote."""
    recorded: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return recorded


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    write(record(sys.argv[1], sys.argv[2]), Path(sys.argv[3]))

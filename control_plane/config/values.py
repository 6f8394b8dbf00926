"""Values that stand for others: ``${NAME}`` for an environment variable, ``file:/path`` for a secret's file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from control_plane.config.names import is_secret, is_text

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand(value: Any, problems: list[str], path: tuple[str, ...] = ()) -> Any:
    """``value`` with every string in it resolved; what cannot be is added to ``problems``, by the field's path."""
    if isinstance(value, Mapping):
        return {str(key): expand(inner, problems, (*path, str(key))) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [expand(inner, problems, (*path, str(index))) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    resolved = _VARIABLE.sub(lambda match: _variable(match[1], problems, path), value)
    if is_secret(path) and resolved.startswith("file:"):
        return _secret(resolved.removeprefix("file:"), problems, path)
    return resolved


def from_text(text: str, annotation: Any) -> Any:
    """What a flag or an environment variable means for a field: text as it is; else lists, mappings, true, false and null as YAML
    writes them, anything else for the field to judge. Raises yaml.YAMLError."""
    if is_text(annotation):
        return text
    parsed = yaml.safe_load(text)
    return parsed if isinstance(parsed, list | dict | bool | None) else text


def _variable(name: str, problems: list[str], path: tuple[str, ...]) -> str:
    found = os.environ.get(name)
    if found is None:
        problems.append(f"{'.'.join(path)}: ${{{name}}} given, but the environment has no {name}")
    return found or ""


def _secret(name: str, problems: list[str], path: tuple[str, ...]) -> Any:
    """The file's text without white space around it; for a list of secrets (``api_keys: file:...``), its lines."""
    try:
        text = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{'.'.join(path)}: file:{name} given, but it cannot be read: {error}")
        return [] if path[-1] == "api_keys" else None
    return text.split() if path[-1] == "api_keys" else text

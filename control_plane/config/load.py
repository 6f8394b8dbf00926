"""From file, environment and code to one checked configuration; and from everything that is wrong with it to one clear message.

Layers, the later wins: file, ``CONTROL_PLANE_*`` (``__`` between levels: ``CONTROL_PLANE_SERVER__PORT``), code or flags.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from control_plane.compiled import COMPILE_VARIABLE, PURE_VARIABLE
from control_plane.config.names import annotation_of, env_names, is_secret, nearest, siblings
from control_plane.config.schema import ControlPlaneConfig
from control_plane.config.values import expand, from_text
from control_plane.errors import ConfigurationError

ENV_PREFIX = "CONTROL_PLANE_"
#: of how the package itself is built and loaded, not of the configuration
_OTHER_VARIABLES = frozenset((COMPILE_VARIABLE, PURE_VARIABLE))
_SERVICE_LINK = re.compile(r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?")
#: known words that have no effect in this version, and why
NOT_YET = {"discovery": "instances from discovery are not available yet; list them under `instances`"}


Source = str | Path | Mapping[str, Any] | ControlPlaneConfig | None


def load_config(source: Source = None, overrides: Mapping[str, Any] | None = None) -> ControlPlaneConfig:
    """Read, merge and check.

    Args:
        source: path of a YAML (or JSON) file, or its content as a mapping; None: environment and overrides only. A configuration
            loaded before is taken as it is, but for the overrides.
        overrides: the same tree; what stands here wins.

    Raises ConfigurationError that lists everything wrong: the field, what was given, what would be right.
    """
    problems: list[str] = []
    if isinstance(source, ControlPlaneConfig):
        if not overrides:
            return source
        source = source.model_dump(exclude_unset=True)
    content, origin = _read(source)
    merged = _merge(_merge(content, _from_environment(problems)), overrides or {})
    merged = expand(merged, problems)
    config: ControlPlaneConfig | None = None
    try:
        config = ControlPlaneConfig.model_validate(merged)
    except ValidationError as error:
        problems += _explain(error)
    if problems or config is None:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigurationError(f"{count} in the configuration ({origin}):\n{listed}", param=problems[0].split(":")[0])
    return config


def public_dict(config: ControlPlaneConfig) -> dict[str, Any]:
    """The configuration as JSON-able data, secrets replaced by ``***``."""

    def mask(value: Any, path: tuple[str, ...]) -> Any:
        if path and is_secret(path) and value:
            return "***"
        if isinstance(value, dict):
            return {key: mask(inner, (*path, key)) for key, inner in value.items()}
        return [mask(inner, path) for inner in value] if isinstance(value, list) else value

    masked: dict[str, Any] = mask(config.model_dump(mode="json"), ())
    return masked


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[Mapping[str, Any], str]:
    if source is None:
        return {}, "environment and flags"
    if isinstance(source, Mapping):
        return source, "as given"
    try:
        content = yaml.load(Path(source).read_text(encoding="utf-8"), _NoDuplicates)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the configuration file {source} cannot be read: {error}", param="config") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the configuration file {source} is not valid YAML: {error}", param="config") from None
    if not isinstance(content, dict | None):
        raise ConfigurationError(f"the configuration file {source} holds {type(content).__name__}, not `name: value` lines", param="config")
    return content or {}, str(source)


class _NoDuplicates(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _from_environment(problems: list[str]) -> dict[str, Any]:
    known = env_names(ControlPlaneConfig, ENV_PREFIX)
    named = {name for name in os.environ if name.startswith(ENV_PREFIX)} - _OTHER_VARIABLES
    unknown = sorted(name for name in named if name not in known and not _is_service_link(name))
    problems += [f"{name}: no such setting{_guess(nearest(name, known) or nearest(name, known, 0.0))}" for name in unknown]
    tree: dict[str, Any] = {}
    for name, path in known.items():
        text = os.environ.get(name)
        if text is None or _is_service_link(name):
            continue
        try:
            put(tree, path, from_text(text, annotation_of(ControlPlaneConfig, path)))
        except yaml.YAMLError:
            given = "" if is_secret(path) else f"{text!r} given; "
            problems.append(f"{name}: {given}lists and mappings are written as JSON")
    return tree


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set what stands at ``path``, making the mappings on the way. Where a value that is none is in the way, that is what is wrong."""
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            return
        tree = inner
    tree[path[-1]] = value


def _is_service_link(name: str) -> bool:
    """Kubernetes gives every pod such variables for each service; ours may well be called ``control-plane``."""
    rest = name.removeprefix(ENV_PREFIX)
    return bool(_SERVICE_LINK.fullmatch(rest)) or (rest == "PORT" and "://" in os.environ[name])


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else of ``above`` replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError) -> Iterator[str]:
    for one in error.errors(include_url=False):
        path = ".".join(str(part) for part in one["loc"])
        if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            yield f"{path}: {_unknown(one['loc'])}"
            continue
        wanted = one["msg"].removeprefix("Value error, ")
        given = "" if is_secret(one["loc"]) or isinstance(one["input"], dict | list) or one["type"] == "missing" else repr(one["input"])
        yield f"{path}: " + (f"{given} given; " if given else "") + (wanted[:1].lower() + wanted[1:])


def _unknown(loc: tuple[int | str, ...]) -> str:
    key = str(loc[-1])
    if len(loc) == 1 and key in NOT_YET:
        return NOT_YET[key]
    here, elsewhere = siblings(ControlPlaneConfig, loc)
    found = elsewhere.get(key) or nearest(key, here) or elsewhere.get(nearest(key, elsewhere) or "") or nearest(key, here, 0.0)
    return f"no such key{_guess(found)}"


def _guess(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""

"""Any field of the configuration as a flag: ``--queue-timeout-s 60``, ``--health.probe-interval-s 1``, ``--no-enable-monitoring``.

Fields of ``server`` need no prefix: ``--max-streams 100``. Values of text fields are taken as they are, others as YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import yaml

from control_plane.config.load import put
from control_plane.config.names import annotation_of, is_secret, leaves
from control_plane.config.schema import ControlPlaneConfig
from control_plane.config.values import from_text
from control_plane.errors import ConfigurationError

#: flags that ``serve`` has beside the configuration's fields
OWN_FLAGS = ("--config", "--engine", "--log-level")


def overrides_from(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration tree that ``arguments`` spell. Raises ConfigurationError naming an unknown flag and the nearest known."""
    flags = _flags()
    tree: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        negated = flag.startswith("--no-") and f"--{flag[5:]}" in flags
        path = flags.get(f"--{flag[5:]}" if negated else flag)
        if path is None:
            raise ConfigurationError(_unknown(flag, flags), param=flag)
        if negated:
            value = "false"
        elif not given:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        put(tree, path, _parse(flag, value, path))
    return tree


def _flags() -> dict[str, tuple[str, ...]]:
    paths = list(leaves(ControlPlaneConfig))
    flags = {"--" + path[-1].replace("_", "-"): path for path in paths if path[0] == "server" and len(path) > 1}
    return flags | {"--" + ".".join(path).replace("_", "-"): path for path in paths}


def _unknown(flag: str, flags: dict[str, tuple[str, ...]]) -> str:
    if not flag.startswith("-"):
        return f"{flag!r} is no option; options are --name value"
    near = get_close_matches(flag, [*flags, *OWN_FLAGS], 1, 0.6)
    return f"no such option: {flag}" + (f"; did you mean {near[0]}?" if near else "")


def _parse(flag: str, value: str, path: Sequence[str]) -> Any:
    try:
        return from_text(value, annotation_of(ControlPlaneConfig, path))
    except yaml.YAMLError as error:
        given = "what was given" if is_secret(path) else repr(value)
        raise ConfigurationError(f"{flag}: {given} cannot be read: {error}", param=flag) from None

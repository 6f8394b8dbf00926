"""Policies and routers by name: nearest known name for a wrong one, and ``module:Class`` for the user's own."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from control_plane.errors import InvalidRequest


def unknown_name(name: str, known: Iterable[str], param: str) -> InvalidRequest:
    """The error for a name that is not in a table: the nearest one, and all there are."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return InvalidRequest(f"{param} {name!r} is not known; {hint}known: {', '.join(names)}, or module:Class for your own", param=param)


def load_object(path: str, param: str) -> object:
    """Import ``module:Class`` and call it without arguments; ``module:object`` is returned as it is. Raises InvalidRequest saying
    which step failed."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidRequest(f"{param} {path!r}: the module {module_name!r} cannot be imported: {error!r}", param=param) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise InvalidRequest(f"{param} {path!r}: the module {module_name!r} has no {attribute!r}", param=param)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except Exception as error:
        raise InvalidRequest(f"{param} {path!r}: {attribute}() failed: {error!r}", param=param) from error

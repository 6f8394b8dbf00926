"""The names in the configuration's tree: which keys stand where, their environment variables, the nearest to a wrong one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

#: fields that hold secrets, wherever they stand
SECRET_FIELDS = frozenset(("api_key", "api_keys", "admin_key"))


def is_secret(path: Iterable[int | str]) -> bool:
    """Whether the value at ``path`` (indices of lists included) is one that must not be shown."""
    names = [part for part in path if isinstance(part, str) and not part.isdigit()]
    return bool(names) and names[-1] in SECRET_FIELDS


def fields_of(tree: Any) -> dict[str, Any]:
    """Name to annotation of a pydantic model or dataclass; empty for anything else."""
    if isinstance(tree, type) and issubclass(tree, BaseModel):
        return {name: info.annotation for name, info in tree.model_fields.items()}
    if isinstance(tree, type) and dataclasses.is_dataclass(tree):
        hints = get_type_hints(tree)
        return {one.name: hints[one.name] for one in dataclasses.fields(tree)}
    return {}


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, of inner nodes too; what is inside lists has no path of its own."""
    for name, annotation in fields_of(tree).items():
        yield (*path, name)
        inner = _inner(annotation)
        if get_origin(annotation) is not list:
            yield from leaves(inner, (*path, name))


def annotation_of(tree: Any, path: Iterable[str]) -> Any:
    """The annotation of the field at ``path``, as :func:`leaves` gives it."""
    for name in path:
        tree = fields_of(_inner(tree))[name]
    return tree


def is_text(annotation: Any) -> bool:
    """``str`` or ``str | None``: what is typed for it is taken as it is."""
    return annotation is str or set(get_args(annotation)) == {str, type(None)}


def env_names(tree: Any, prefix: str) -> dict[str, tuple[str, ...]]:
    """The environment variable of every field, with the field's path; outer ones before those inside them."""
    paths = sorted(leaves(tree), key=len)
    return {prefix + "__".join(path).upper(): path for path in paths}


def siblings(tree: Any, loc: tuple[int | str, ...]) -> tuple[list[str], dict[str, str]]:
    """Keys that are known where ``loc`` ends; and, by their last part, the full names of all others."""
    here = tree
    for part in loc[:-1]:
        if isinstance(part, str):
            here = _inner(fields_of(here).get(part))
    return list(fields_of(here)), {path[-1]: ".".join(path) for path in leaves(tree) if len(path) > 1}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that ``name`` was probably meant to be: the same but for its place in the tree, or spelt alike."""
    known = sorted(known)
    words = name.removeprefix("CONTROL_PLANE_")
    inside = next((one for one in known if one.endswith(f"__{words}")), None)
    return inside or next(iter(get_close_matches(name, known, 1, cutoff)), None)


def _inner(annotation: Any) -> Any:
    """The model inside ``X | None`` and ``list[X]``."""
    if get_origin(annotation) in (Union, UnionType, list):
        return next((_inner(one) for one in get_args(annotation) if one is not type(None)), None)
    return annotation

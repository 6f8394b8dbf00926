"""Which code of this package runs: its modules compiled by mypyc, or the same sources as plain Python.

A compiled module lies beside its source, and Python prefers it by itself. Two things make it take the sources: CONTROL_PLANE_PURE=1, and
sources that changed after they were compiled; an editable install lists their digests for that, a wheel has no list and nothing to check.
It is all or nothing, since compiled modules know each other's memory layout.

`hatch_build.py` and the Makefile run this file by itself, so it imports nothing of ours.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from importlib.util import source_hash
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import PathEntryFinder

PURE_VARIABLE = "CONTROL_PLANE_PURE"
#: read by hatch_build.py, when the package is built
COMPILE_VARIABLE = "CONTROL_PLANE_COMPILE"
#: the library that holds the code of all compiled modules, beside the package; the first of them that is imported loads it
LIBRARY = "control_plane__mypyc"
#: one line a source, its digest and its path inside the package; each version of Python has compiled modules of its own
MANIFEST = f"compiled.{sys.implementation.cache_tag}.manifest"


def choose() -> None:
    """Called before anything else of the package is imported."""
    package = os.path.dirname(__file__)
    library = os.path.join(os.path.dirname(package), LIBRARY + EXTENSION_SUFFIXES[0])
    if os.environ.get(PURE_VARIABLE, "0") not in ("", "0") or not os.path.exists(library):  # a copy of the package alone has none
        _take_sources(package)
    elif changed := changed_sources(package):
        import logging

        _take_sources(package)
        what = changed[0] + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
        logging.getLogger("control_plane").warning(
            "control_plane: %s changed since it was compiled: running as plain Python; `make compile` compiles it again", what
        )


def in_use() -> bool:
    """Whether compiled modules are what runs."""
    return LIBRARY in sys.modules


def kind() -> str:
    """The same in words, for people."""
    return "compiled" if in_use() else "plain Python"


def digest(source: bytes) -> str:
    """What Python itself tells changed sources by, in checked .pyc files."""
    return source_hash(source).hex()


def changed_sources(package: str) -> list[str]:
    """The sources that are not what was compiled; empty where nothing keeps a list of them."""
    try:
        with open(os.path.join(package, MANIFEST), encoding="utf-8") as manifest:
            lines = manifest.read().splitlines()
    except FileNotFoundError:
        return []
    if not lines:  # it is being compiled at this moment
        return ["all"]
    return [path for known, path in (line.split(" ", 1) for line in lines) if known != _digest_of(os.path.join(package, path))]


def _digest_of(path: str) -> str:
    try:
        with open(path, "rb") as source:
            return digest(source.read())
    except FileNotFoundError:
        return "gone"


def _take_sources(package: str) -> None:
    """Python's own finder asks this hook first for each folder of the package; whoever builds upon that finder gets sources as well."""
    sources = FileFinder.path_hook((SourceFileLoader, SOURCE_SUFFIXES))

    def sources_only(folder: str) -> PathEntryFinder:
        if folder != package and not folder.startswith(package + os.sep):
            raise ImportError("not of this package")
        return sources(folder)

    sys.path_hooks.insert(0, sources_only)
    sys.path_importer_cache.pop(package, None)  # the finder that found this module


if __name__ == "__main__":  # asked by the Makefile
    sys.exit(bool(changed_sources(os.path.dirname(os.path.abspath(__file__)))))

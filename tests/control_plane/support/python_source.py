"""Python source read as a tree, safely in a process that other tests have used."""

from __future__ import annotations

import ast
import gc


def tree_of(source: str) -> ast.Module:
    """``ast.parse`` without the collector: CPython 3.11 raises a SystemError (gh-106905) where the collector runs while it builds
    the tree and finalizes something that parses too, as a lost future does by logging its traceback."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_on:
            gc.enable()

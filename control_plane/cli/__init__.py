"""The command ``control-plane``: one file per group of commands. Each loads what it needs when it runs, so that every start is quick."""

from control_plane.cli.app import main

__all__ = ["main"]

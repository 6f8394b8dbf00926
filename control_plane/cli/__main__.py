"""``python -m control_plane.cli``: the same command where the script is not on the path."""

from control_plane.cli.app import main

main()

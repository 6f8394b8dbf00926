"""One runnable example for each feature: ``python -m control_plane.examples.NAME``.

Each starts the engines that it needs, simulated, in its own process; ``local.py`` is what they share. Where its docstring says so, it
takes the address of a real engine or gateway instead.
"""

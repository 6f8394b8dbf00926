"""Which prompts' beginnings each engine holds: exactly where engines tell of their blocks, else from what was sent to them."""

from control_plane.fleet.prefix.index import PrefixIndex
from control_plane.fleet.prefix.settings import PrefixSettings
from control_plane.observability.prefix_report import PrefixReport

__all__ = ["PrefixIndex", "PrefixReport", "PrefixSettings"]

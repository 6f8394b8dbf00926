"""The instances: which there are, how they are, and what is in flight on them."""

from control_plane.fleet.load import Load, describe_load, load_of
from control_plane.fleet.prefix import PrefixIndex, PrefixReport, PrefixSettings
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scraper import ModelCard, Scrape, parse_metrics, parse_models
from control_plane.fleet.settings import HealthSettings

__all__ = [
    "Fleet",
    "HealthSettings",
    "Load",
    "ModelCard",
    "PrefixIndex",
    "PrefixReport",
    "PrefixSettings",
    "Scrape",
    "describe_load",
    "load_of",
    "parse_metrics",
    "parse_models",
]

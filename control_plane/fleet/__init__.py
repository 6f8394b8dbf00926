"""The instances: which there are, how they are, and what is in flight on them."""

from control_plane.fleet.prefix import PrefixIndex, PrefixReport, PrefixSettings
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scraper import ModelCard, Scrape, parse_metrics, parse_models
from control_plane.fleet.settings import HealthSettings

__all__ = [
    "Fleet",
    "HealthSettings",
    "ModelCard",
    "PrefixIndex",
    "PrefixReport",
    "PrefixSettings",
    "Scrape",
    "parse_metrics",
    "parse_models",
]

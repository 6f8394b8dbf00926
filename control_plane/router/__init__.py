"""Routing strategies: on which instance a request runs. One file each; this table is the list of them."""

from __future__ import annotations

from control_plane.router.adaptive import AdaptiveRouting
from control_plane.router.affinity import Affinity
from control_plane.router.base import RoutingStrategy
from control_plane.router.foreign import ForeignStrategy
from control_plane.router.least_response_time import LeastResponseTime
from control_plane.router.load_balanced import LoadBalanced
from control_plane.router.load_balancer import LoadBalancer
from control_plane.router.locality import Locality
from control_plane.router.placement import Placement
from control_plane.router.power_of_two import PowerOfTwo
from control_plane.router.predicted_latency import PredictedLatency
from control_plane.router.prefix_aware import PrefixAware
from control_plane.router.random_choice import RandomChoice
from control_plane.router.request_router import RequestRouter
from control_plane.router.round_robin import RoundRobin
from control_plane.router.table import ROUTERS, create_strategy

__all__ = [
    "ROUTERS",
    "AdaptiveRouting",
    "Affinity",
    "ForeignStrategy",
    "LeastResponseTime",
    "LoadBalanced",
    "LoadBalancer",
    "Locality",
    "Placement",
    "PowerOfTwo",
    "PredictedLatency",
    "PrefixAware",
    "RandomChoice",
    "RequestRouter",
    "RoundRobin",
    "RoutingStrategy",
    "create_strategy",
]

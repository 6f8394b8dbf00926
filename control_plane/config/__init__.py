"""The configuration of a control plane: one tree, read from file, environment and flags, checked as a whole.

Importing this package loads pydantic; nothing else of ours does, so ``import control_plane`` stays light.
"""

from control_plane.config.load import ENV_PREFIX, load_config, public_dict
from control_plane.config.schema import ControlPlaneConfig, InstanceConfig, ServerConfig, json_schema

__all__ = ["ENV_PREFIX", "ControlPlaneConfig", "InstanceConfig", "ServerConfig", "json_schema", "load_config", "public_dict"]

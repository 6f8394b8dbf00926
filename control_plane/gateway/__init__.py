"""The HTTP face: OpenAI's, Anthropic's and vLLM's API in front of a manager, and the admin API beside it."""

from control_plane.gateway.app import Gateway
from control_plane.gateway.settings import GatewaySettings

__all__ = ["Gateway", "GatewaySettings"]

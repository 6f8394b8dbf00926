"""What the prefix index may hold and learn."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    """Bounds of the prefix index, and whether engines' KV events feed it.

    Raises:
        ConfigurationError: names the field that is wrong.
    """

    #: listen to the KV events of engines that publish them (vLLM's ``--kv-events-config``)
    kv_events: bool = True
    #: KV blocks kept of all engines together, about 190 bytes each; what comes above is not indexed
    max_blocks: int = 4_000_000
    #: pieces of prompts of which it is known which block they end in, about 230 bytes each
    max_pieces: int = 250_000
    #: prompts tokenised a second (``/tokenize`` of the engine that runs them) to learn which blocks they are; 0: none
    learn_per_s: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.kv_events, bool):
            raise ConfigurationError(f"prefix.kv_events {self.kv_events!r} is not True or False", param="prefix.kv_events")
        for name in ("max_blocks", "max_pieces"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"prefix.{name} {value!r} is not a whole number, 1 or more", param=f"prefix.{name}")
        rate = self.learn_per_s
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1000:
            raise ConfigurationError(f"prefix.learn_per_s {rate!r} is not a number from 0 to 1000", param="prefix.learn_per_s")

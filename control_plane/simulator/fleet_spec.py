"""Fleets as they are written on a command line: ``2xh100-llama3-8b:prefilling,6xh100-llama3-8b:decoding``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from control_plane.errors import InvalidRequest
from control_plane.roofline import EngineProfile, profile
from control_plane.types import ExecutionInstance, ExecutionInstanceType

MAX_INSTANCES: Final = 10_000
_PART: Final = re.compile(r"(?P<count>\d{1,6})x(?P<profile>[^:]+)(?::(?P<role>[a-z_]+))?")


@dataclass(frozen=True, slots=True)
class FleetPart:
    """Engines of one kind. ``named``: how the profile was written, a name of the catalogue or a file."""

    count: int
    named: str
    profile: EngineProfile
    role: ExecutionInstanceType


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """A fleet of one model. ``text`` is how it was written."""

    text: str
    parts: tuple[FleetPart, ...]

    @property
    def model_name(self) -> str:
        return self.parts[0].profile.model.name

    @property
    def instance_count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def price_per_hour_usd(self) -> float:
        """List prices of all its GPUs."""
        return sum(part.count * part.profile.price_per_hour_usd for part in self.parts)

    @property
    def context_tokens(self) -> int:
        """Prompt and answer that every one of its engines can hold."""
        return min(min(p.profile.max_model_len_tokens, p.profile.kv_block_count * p.profile.block_size_tokens) for p in self.parts)

    def instances(self) -> Iterator[tuple[ExecutionInstance, EngineProfile]]:
        """Fresh records of its engines."""
        number = 0
        for part in self.parts:
            for _ in range(part.count):
                yield self._instance(f"e{number:03d}", part), part.profile
                number += 1

    def _instance(self, name: str, part: FleetPart) -> ExecutionInstance:
        of = part.profile
        return ExecutionInstance(
            instance_id=name,
            host=name,
            model_name=of.model.name,
            tensor_parallel_size=of.tensor_parallel_size,
            pipeline_parallel_size=of.pipeline_parallel_size,
            gpu_count=of.gpu_count,
            gpu_memory_gb=of.gpu.memory_gb,
            price_per_gpu_hour_usd=of.gpu.price_per_hour_usd,
            instance_type=part.role,
            profile=part.named,
        )


def parse_fleet(text: str) -> FleetSpec:
    """``COUNTxPROFILE[:ROLE]``, comma-separated. Raises InvalidRequest, naming the part."""
    parts: list[FleetPart] = []
    for piece in text.split(","):
        found = _PART.fullmatch(piece.strip())
        if found is None:
            raise InvalidRequest(f"fleet {piece.strip()!r} is not COUNTxPROFILE[:ROLE], such as 8xh100-llama3-8b", param="fleet")
        count = int(found["count"])
        if not 1 <= count <= MAX_INSTANCES:
            raise InvalidRequest(f"fleet {piece.strip()!r}: {count} engines; 1 to {MAX_INSTANCES} would be right", param="fleet")
        try:
            role = ExecutionInstanceType(found["role"] or "general")
        except ValueError:
            known = ", ".join(ExecutionInstanceType)
            raise InvalidRequest(f"fleet {piece.strip()!r}: role {found['role']!r} is not one of {known}", param="fleet") from None
        parts.append(FleetPart(count, found["profile"], profile(found["profile"]), role))
    models = sorted({part.profile.model.name for part in parts})
    if len(models) > 1:
        raise InvalidRequest(f"fleet {text!r} mixes models ({', '.join(models)}); a trace is run by one", param="fleet")
    if sum(part.count for part in parts) > MAX_INSTANCES:
        raise InvalidRequest(f"fleet {text!r} has over {MAX_INSTANCES} engines", param="fleet")
    return FleetSpec(text, tuple(parts))

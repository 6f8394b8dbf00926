"""What a calibration tells: on the terminal, and beside the coefficients in the profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from rich.table import Table

from control_plane.calibration.fitting import Fitted, Row
from control_plane.calibration.limits import Limits
from control_plane.calibration.measure import Readings
from control_plane.calibration.plan import Kind
from control_plane.calibration.server import Served
from control_plane.catalogue import guess_model
from control_plane.profile_file import ProfileFile
from control_plane.terminal import table

__all__ = ["closing_lines", "points_table", "profile_of"]


def points_table(fitted: Fitted) -> Table:
    rows = [
        (row.point.name, row.readings, f"{row.seconds * 1e3:.2f}", f"{row.predicted_s * 1e3:.2f}", f"{row.error:+.1%}", f"{row.spread:.1%}")
        for row in sorted(fitted.rows, key=_order)
    ]
    caption = "ms: of a step (decode), of some steps (beside), to the first token (alone); spread: middle half over median"
    return table("Measured, and what the fit says", ("what", "readings", "ms", "fit", "error", "spread"), rows, caption=caption)


def closing_lines(fitted: Fitted, limits: Limits, readings: Readings) -> Iterator[str]:
    """How good it is, in sentences."""
    yield f"max_num_seqs {limits.max_num_seqs} ({limits.max_num_seqs_how})"
    yield f"max_num_batched_tokens {limits.max_num_batched_tokens} ({limits.max_num_batched_tokens_how})"
    server = fitted.server
    yield (
        f"beside the engine's steps: {server.request_s * 1e3:.2f} ms a request ({server.serial_s * 1e3:.2f} of it one after another), "
        f"{server.prompt_token_s * 1e6:.2f} us a prompt token, "
        f"{server.text_token_s * 1e6:.2f} us more where it comes as text, {server.chunk_s * 1e6:.0f} us a streamed token"
    )
    yield (
        f"mean error of the fit: {fitted.mean_error(Kind.DECODE):.1%} of decode steps, "
        f"{fitted.mean_error(Kind.MIXED, Kind.BURST, Kind.PREFIX):.1%} of steps with prompts, "
        f"{fitted.mean_error(Kind.IDLE):.1%} of the time to the first token alone"
    )
    if readings.lost:
        yield f"{readings.lost} readings were lost: tokens merged on the way, or the batch was not complete for long enough"


def profile_of(
    name: str, base: str | None, served: Served, limits: Limits, fitted: Fitted, readings: Readings, *, url: str, at: datetime, seed: int
) -> ProfileFile:
    """The profile with the points it comes from."""
    model = None
    if base is None:
        # of a model that is not in the catalogue only the name is known; its sizes are said to be guessed
        model = replace(guess_model(served.model), max_model_len_tokens=served.max_model_len_tokens)
    measured: dict[str, Any] = {
        "at": at.isoformat(timespec="seconds"),
        "engine": url,
        "model": served.model,
        "version": served.version,
        "rounds": readings.rounds_done,
        "seed": seed,
        "max_num_seqs": limits.max_num_seqs_how,
        "max_num_batched_tokens": limits.max_num_batched_tokens_how,
        "beside_steps": fitted.server.as_dict(),
        "points": [_point(row) for row in sorted(fitted.rows, key=_order)],
    }
    if base is None:
        measured["model_sizes"] = f"those of {guess_model(served.model).name}, guessed by the name; they count for KV transfers only"
    if served.simulated:
        measured["simulated"] = True
    return ProfileFile(
        name=name,
        base=base,
        model=model,
        block_size_tokens=served.block_size_tokens,
        kv_block_count=served.kv_block_count,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len_tokens=served.max_model_len_tokens,
        request_s=float(f"{fitted.server.request_s:.4g}"),
        request_serial_s=float(f"{fitted.server.serial_s:.4g}"),
        prompt_token_s=float(f"{fitted.server.prompt_token_s:.4g}"),
        step_time=fitted.step,
        measured=measured,
    )


def _order(row: Row) -> tuple[int, int, int, int, int]:
    point = row.point
    kinds = list(Kind)
    return kinds.index(point.kind), point.batch, point.context_tokens, point.cached_tokens, point.prompt_tokens


def _point(row: Row) -> dict[str, Any]:
    return {
        "what": row.point.name,
        "readings": row.readings,
        "ms": float(f"{row.seconds * 1e3:.4g}"),
        "fit_ms": float(f"{row.predicted_s * 1e3:.4g}"),
        "spread": round(row.spread, 4),
    }

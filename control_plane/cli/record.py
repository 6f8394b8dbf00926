"""``control-plane record``: a running gateway's traffic as a trace, into a file."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from typing import Any

from control_plane.cli.operate import AdminClient
from control_plane.errors import ControlPlaneError

#: what the recording's last line counts, in words
_TOLD = {
    "left_out": "left out (refused, failed, or no text generation)",
    "dropped": "lost, since they were not fetched in time",
}


def record(client: AdminClient, out: str, duration_s: float | None) -> None:
    """Write lines as they come until ``duration_s`` is over, the gateway stops, or Ctrl-C; then say how many. ``out`` ``-``: standard
    output.

    Raises ControlPlaneError where no gateway answers or the recording breaks off (what came is in the file), OSError for a file that
    cannot be written.
    """
    wanted = "" if duration_s is None else f"?duration_s={duration_s!r}"
    count, footer = 0, None
    # opened before the gateway is asked: a file that cannot be written is told at once
    with nullcontext(sys.stdout.buffer) if out == "-" else open(out, "wb") as file, suppress(KeyboardInterrupt):
        for line in client.lines(f"/record{wanted}"):
            file.write(line)
            file.flush()
            if line.startswith(b'{"trace"'):
                footer = _footer(line)
            else:
                count += 1
        if footer is None:
            # http.client takes an answer that is cut off for one that has ended
            raise ControlPlaneError(f"the gateway broke the recording off; {count:,} requests are in {out}")
    where = "standard output" if out == "-" else out
    lost = [f"{footer[name]:,} {text}" for name, text in _TOLD.items() if footer[name]] if footer is not None else []
    print("; ".join([f"{count:,} requests recorded in {where}", *lost]), file=sys.stderr)


def _footer(line: bytes) -> dict[str, Any] | None:
    """The last line of a recording, None for its first."""
    with suppress(ValueError):
        found = json.loads(line)
        if found.keys() >= _TOLD.keys():
            return dict(found)
    return None

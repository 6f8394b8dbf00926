"""Where the answer to one request goes."""

from __future__ import annotations

from typing import Final, Protocol

from control_plane.errors import InstanceFailed


class Receiver(Protocol):
    """Where one answer goes: ``on_head`` once, ``on_body`` any number of times, then ``on_complete``; ``on_error`` ends it at any point.

    One that has ``on_frame(frame, data)`` too gets there what would come to ``on_body`` as ``data``, when it is one whole chunk of a
    chunked body: ``frame`` is the same with its framing, in the one spelling that we write ourselves.
    """

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The final status and headers (names in lower case). Interim answers (1xx) are not reported."""

    def on_body(self, data: bytes) -> None:
        """Bytes of the body, unframed, never empty."""

    def on_complete(self) -> None: ...
    def on_error(self, error: InstanceFailed) -> None: ...


class _Deaf:
    """Receives for calls that are over."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_complete(self) -> None: ...
    def on_error(self, error: InstanceFailed) -> None: ...


DEAF: Final = _Deaf()


def no_frame(frame: bytes, data: bytes) -> None:
    """The receiver has no use for frames."""

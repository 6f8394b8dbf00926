"""Who may ask: client keys on the API, and the rules that keep strangers away from the admin API."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from control_plane.errors import Forbidden, Unauthorized
from control_plane.transport import Exchange

_WRITES = frozenset(("POST", "PUT", "PATCH"))
_PROXY_HEADERS = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"via")


class ClientKeys:
    """The API's keys, held as digests: looking one up tells nothing by its timing."""

    __slots__ = ("_digests",)

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = frozenset(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Unauthorized unless ``Authorization: Bearer`` or ``x-api-key`` carries one of the keys."""
        given = bearer(headers.get(b"authorization")) or headers.get(b"x-api-key")
        if not given:
            raise Unauthorized("This gateway needs a key: send it as `Authorization: Bearer KEY`.")
        if hashlib.sha256(given).digest() not in self._digests:
            raise Unauthorized("The key that was sent is not one of this gateway's.")


def bearer(value: bytes | None) -> bytes | None:
    """The token of an ``Authorization: Bearer`` header, None when it is none."""
    if value is None or value[:7].lower() != b"bearer ":
        return None
    return value[7:].strip()


class AdminGuard:
    """Guards the admin API on one listener.

    With a key, the key decides. Without one: on the admin listener whoever reaches it may ask; on the main listener only a loopback
    peer with a loopback ``Host`` that no proxy passed on. Writes must say that they are JSON, which no foreign web page can make a
    browser say. A listener bound to loopback takes only a loopback ``Host``, so that no page can reach it by a name of its own.
    """

    def __init__(self, admin_key: str | None, *, own_listener: bool, listen_host: str) -> None:
        self._key = admin_key.encode() if admin_key is not None else None
        self._own_listener = own_listener
        self._loopback_only = not own_listener or is_loopback(listen_host)

    def check(self, exchange: Exchange) -> None:
        """Raises Unauthorized or Forbidden saying what is missing."""
        if self._key is not None:
            given = bearer(exchange.header(b"authorization"))
            if given is None or not hmac.compare_digest(given, self._key):
                raise Unauthorized("The admin API needs its key: send it as `Authorization: Bearer KEY`.")
            return
        if not self._own_listener:
            self._check_local(exchange)
        if self._loopback_only and not is_loopback(host_name(exchange.header(b"host"))):
            raise Forbidden("Without an admin key the admin API answers only to a loopback Host such as 127.0.0.1 or localhost.")
        if exchange.method in _WRITES and not _is_json(exchange.header(b"content-type")):
            raise Forbidden("A write to the admin API must be sent with `Content-Type: application/json`.")

    def _check_local(self, exchange: Exchange) -> None:
        if not is_loopback(exchange.peer):
            raise Forbidden(
                "Without an admin key the admin API answers only on this machine. Set admin_key, or admin_port for a listener of its own."
            )
        if any(name in _PROXY_HEADERS or name.startswith(b"x-forwarded-") for name, _ in exchange.headers):
            raise Forbidden("This request came through a proxy; without an admin key the admin API does not answer it.")


def host_name(host: bytes | None) -> str:
    """The name in a Host header, without the port and without brackets."""
    text = (host or b"").decode("latin-1").strip()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def is_loopback(host: str) -> bool:
    """``localhost`` or an address of the loopback network."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_json(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == b"application/json"

"""What can be set on the gateway."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from control_plane.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Options of the HTTP face. All have a default that serves; raises ConfigurationError naming the field at fault."""

    #: a request must carry one of these as ``Authorization: Bearer`` (or ``x-api-key``); empty: anyone may ask
    api_keys: tuple[str, ...] = ()
    #: the admin API wants it as ``Authorization: Bearer``; None: the admin API serves loopback only (or its own listener)
    admin_key: str | None = None
    #: browsers' origins that may ask, such as ``https://chat.example``; ``*`` is any
    cors_origins: tuple[str, ...] = ()
    #: one JSON line a request: ids, instance, milliseconds, status, tokens; never text
    access_log: bool = True
    #: file the access log is appended to; None: standard error
    access_log_path: str | None = None
    #: seconds between SSE comments while a stream waits in the queue (commits status 200: later errors are events); None: off
    queue_keepalive_s: float | None = None
    #: requests open at a time before newcomers are refused with 503; None: as many as file descriptors allow
    max_streams: int | None = None
    #: ask engines for token counts at the end of a stream (hidden from clients that did not ask for them)
    ask_usage: bool = True
    #: bounds of what a client may send
    max_body_bytes: int = 64 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    #: stored responses whose instance is remembered, for ``/v1/responses/{id}`` and ``previous_response_id``
    max_remembered_responses: int = 100_000
    #: certificate chain and key (PEM files); both or none
    tls_cert_path: str | None = None
    tls_key_path: str | None = None

    def __post_init__(self) -> None:
        positive = ("queue_keepalive_s", "max_streams", "max_body_bytes", "max_header_bytes", "max_remembered_responses")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} is {value}; it must be above 0", param=name)
        for name in ("api_keys", "cors_origins"):
            if isinstance(getattr(self, name), str):
                raise ConfigurationError(f"{name} is one string; give a list of them", param=name)
        if not all(self.api_keys) or self.admin_key == "":
            param = "api_keys" if self.api_keys else "admin_key"
            raise ConfigurationError("an empty key would let anyone in; leave it out instead", param=param)
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ConfigurationError("tls_cert_path and tls_key_path are given together or not at all", param="tls_cert_path")

    def tls_context(self) -> ssl.SSLContext | None:
        """The server's TLS side, None without a certificate. Raises ConfigurationError when the files do not load."""
        if self.tls_cert_path is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self.tls_cert_path, self.tls_key_path)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"the TLS certificate does not load: {error}", param="tls_cert_path") from None
        return context

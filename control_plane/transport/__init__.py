"""HTTP/1.1 on asyncio protocols and llhttp: the server's side, the client's side, and the coarse timers of both."""

from control_plane.transport.client import HttpClient
from control_plane.transport.client_call import ClientCall
from control_plane.transport.deadline import Deadline
from control_plane.transport.exchange import Exchange
from control_plane.transport.known_headers import KnownHeaders
from control_plane.transport.limits import ClientLimits, ServerLimits
from control_plane.transport.receiver import Receiver
from control_plane.transport.request_head import Refused, RequestHead, path_of
from control_plane.transport.server import Handler, HttpServer
from control_plane.transport.wheel import Timer, TimerWheel

__all__ = [
    "ClientCall",
    "ClientLimits",
    "Deadline",
    "Exchange",
    "Handler",
    "HttpClient",
    "HttpServer",
    "KnownHeaders",
    "Receiver",
    "Refused",
    "RequestHead",
    "ServerLimits",
    "Timer",
    "TimerWheel",
    "path_of",
]

"""Whether this process, or its machine, has run out of file descriptors."""

from __future__ import annotations

import errno
import socket
from typing import Final

_SHORTAGE: Final = frozenset((errno.EMFILE, errno.ENFILE))


def out_of_descriptors(error: OSError) -> bool:
    """Whether ``error`` comes of a lack of descriptors. A name that could not be looked up for it says something else: then it is tried."""
    if error.errno in _SHORTAGE:
        return True
    return (isinstance(error, socket.gaierror) or error.errno is None) and not descriptor_left()


def descriptor_left() -> bool:
    """Whether a socket can be had now."""
    try:
        socket.socket().close()
    except OSError as error:
        return error.errno not in _SHORTAGE
    return True

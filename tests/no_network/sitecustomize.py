"""Block the network but for this machine, at the start of a Python with this folder on its path.

By an audit hook (PEP 578), which sees every socket of Python in every thread and cannot be taken
away. What connects without Python, as torch's own stores do, is not seen.
"""

from __future__ import annotations

import socket
import sys
from ipaddress import ip_address


class NetworkBlocked(RuntimeError):
    """A test wanted to reach another machine."""


_CONNECTING = ("socket.connect", "socket.sendto", "socket.sendmsg")
_LOOKING_UP = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def block_network() -> None:
    """Refuse from now on every connection and look-up that leaves this machine."""
    if not getattr(sys, "_network_is_blocked", False):
        sys._network_is_blocked = True  # type: ignore[attr-defined]
        sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if not event.startswith("socket."):
        return
    host: object = None
    if event in _CONNECTING:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # Unix sockets have a path.
    elif event in _LOOKING_UP:
        host = arguments[0]
    if not _is_here(host):
        raise NetworkBlocked(
            f"Tests must work without a network; got {event} of {host!r}. Serve what is needed "
            "from 127.0.0.1, or keep it beside the test."
        )


def _is_here(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not isinstance(name, str) or name in ("", "localhost", socket.gethostname()):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


block_network()

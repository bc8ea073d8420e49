"""Tests, and every Python that they start, reach this machine and no other."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable

import pytest

from tests.interpreters import printed

# An address that belongs to nobody, for documentation: RFC 5737.
ELSEWHERE = "192.0.2.1", 9

LEAVING: dict[str, Callable[[], object]] = {
    "connect": lambda: socket.create_connection(ELSEWHERE, timeout=1),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ELSEWHERE),
    "look-up": lambda: socket.getaddrinfo("example.org", 80),
    "look-up of bytes": lambda: socket.gethostbyname("example.org"),
    "request": lambda: urllib.request.urlopen("http://example.org", timeout=1),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", LEAVING)
def test_another_machine_cannot_be_reached(way: str) -> None:
    with pytest.raises(RuntimeError, match="Tests must work without a network"):
        LEAVING[way]()


def test_a_thread_cannot_either() -> None:
    caught: list[Exception] = []

    def leave() -> None:
        try:
            socket.create_connection(ELSEWHERE, timeout=1)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert [type(error).__name__ for error in caught] == ["NetworkBlocked"]


def test_a_python_that_a_test_starts_cannot_either() -> None:
    code = (
        "import socket\n"
        "try:\n    socket.create_connection(('192.0.2.1', 9), timeout=1)\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    assert printed(code) == "NetworkBlocked\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_can_be_reached(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection((host, server.getsockname()[1]), timeout=5) as connection:
            connection.sendall(b"x")
            with server.accept()[0] as other:
                assert other.recv(1) == b"x"

"""What holds for every test and every docstring example: no network, and no luck."""

import os
import socket
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
import torch
from hypothesis import settings

# Deterministic unless asked to explore: the same suite passes or fails twice alike.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class NetworkBlockedError(RuntimeError):
    """A test reached for the network without saying so. No OSError, or libraries would catch it and retry."""


def _refuse(target: object) -> NoReturn:
    raise NetworkBlockedError(
        f"this test reaches for {target!r}. Use a double, or mark it with `network` (left out by default) "
        "or with `loopback` (a server of its own on this machine)."
    )


@pytest.fixture(autouse=True)
def _network_is_blocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block sockets and name look-ups, except with the `network` marker and, on this machine, with `loopback`."""
    if request.node.get_closest_marker("network"):
        return
    allowed = LOOPBACK if request.node.get_closest_marker("loopback") else frozenset()
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    look_up: Callable[..., object] = socket.getaddrinfo

    def guarded(name: str) -> Callable[..., object]:
        def reach(self: socket.socket, address: tuple[object, ...]) -> object:
            if self.family != socket.AF_UNIX and address[0] not in allowed:
                _refuse(address)
            return real[name](self, address)

        return reach

    def guarded_look_up(host: object, *details: object, **named: object) -> object:
        if host not in allowed:
            _refuse(host)
        return look_up(host, *details, **named)

    for name in real:
        monkeypatch.setattr(socket.socket, name, guarded(name))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: tiny matrices lose ten times more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""The guard in conftest.py blocks, and lets through what is marked."""

import socket
from contextlib import closing

import pytest


def test_a_connection_is_refused():
    with closing(socket.socket()) as client, pytest.raises(RuntimeError, match=r"reaches for \('192\.0\.2\.1', 80\)"):
        client.connect(("192.0.2.1", 80))


def test_a_name_is_not_looked_up():
    with pytest.raises(RuntimeError, match=r"reaches for 'huggingface\.co'"):
        socket.create_connection(("huggingface.co", 443))


def test_a_server_on_this_machine_needs_the_marker():
    with closing(socket.create_server(("127.0.0.1", 0))) as server, pytest.raises(RuntimeError, match="loopback"):
        socket.create_connection(server.getsockname())


@pytest.mark.loopback
def test_a_marked_test_reaches_its_own_server():
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as server,
        closing(socket.create_connection(server.getsockname())) as client,
    ):
        assert client.getpeername() == server.getsockname()


@pytest.mark.loopback
def test_a_marked_test_reaches_no_further():
    with pytest.raises(RuntimeError, match=r"reaches for 'huggingface\.co'"):
        socket.create_connection(("huggingface.co", 443))

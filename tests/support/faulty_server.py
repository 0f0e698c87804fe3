"""A server on this machine that speaks OpenAI's protocol, and breaks it where it is told to."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JSON = "application/json"


@dataclass
class FaultyServer:
    """Where it is, what it does with each request in turn (the last for ever), and what it was asked."""

    url: str
    script: list[Callable[["Exchange"], None]]
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    gone: threading.Event = field(default_factory=threading.Event)
    busy: int = 0
    busiest: int = 0


@dataclass
class Exchange:
    """One request on its connection."""

    server: FaultyServer
    handler: BaseHTTPRequestHandler
    request: dict

    def send(self, body: bytes, *, status=200, kind=JSON, length=None, **headers):
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", kind)
        self.handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, text in headers.items():
            self.handler.send_header(name.replace("_", "-"), text)
        self.handler.end_headers()
        self.handler.wfile.write(body)


def completion(text, *, finish="stop", usage=True, **message) -> bytes:
    said = {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
    }
    if usage:
        said["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(said).encode()


def says(text, **how):
    return lambda exchange: exchange.send(completion(text, **how))


def slow(seconds, text):
    def behave(exchange):
        exchange.server.gone.wait(seconds)
        exchange.send(completion(text))

    return behave


def hangs(exchange):
    exchange.server.gone.wait(60)


def drips(exchange):
    exchange.handler.send_response(200)
    exchange.handler.end_headers()
    while not exchange.server.gone.wait(0.05):
        exchange.handler.wfile.write(b" ")


def refuses(status, body=b'{"error": {"message": "no"}}', **headers):
    return lambda exchange: exchange.send(body, status=status, **headers)


def sends(body, *, kind=JSON):
    return lambda exchange: exchange.send(body, kind=kind)


def half(text):
    whole = completion(text)
    return lambda exchange: exchange.send(whole[: len(whole) // 2], length=len(whole))


def resets(exchange):
    connection = exchange.handler.connection
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextlib.contextmanager
def faulty_server(*script) -> Iterator[FaultyServer]:
    """Serve on a free port of this machine until the block ends."""
    server = FaultyServer("", list(script))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                turn = len(server.requests)
                server.requests.append(request)
                server.headers.append({name.lower(): text for name, text in self.headers.items()})
                server.times.append(time.monotonic())
                server.busy += 1
                server.busiest = max(server.busiest, server.busy)
            try:
                server.script[min(turn, len(server.script) - 1)](Exchange(server, self, request))
            except OSError:
                pass  # the client has hung up
            finally:
                self.close_connection = True
                with server.lock:
                    server.busy -= 1

        def finish(self):
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *details):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.gone.set()
            listening.shutdown()
            thread.join()

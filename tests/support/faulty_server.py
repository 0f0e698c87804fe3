"""A local server with OpenAI's protocol that fails in scripted ways."""

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
    """Its address, its reaction to each request in turn (the last repeats), and the requests it received."""

    url: str
    script: list[Callable[["Exchange"], None]]
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)
    active: int = 0
    max_active: int = 0


@dataclass
class Exchange:
    """One request, with the connection to answer on."""

    server: FaultyServer
    handler: BaseHTTPRequestHandler
    request: dict

    def send(self, body: bytes, *, status=200, content_type=JSON, length=None, **headers):
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", content_type)
        self.handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(body)


def completion(text, *, finish="stop", usage=True, **message) -> bytes:
    body = {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(body).encode()


def says(text, **options):
    return lambda exchange: exchange.send(completion(text, **options))


def slow(seconds, text):
    def respond(exchange):
        exchange.server.stopped.wait(seconds)
        exchange.send(completion(text))

    return respond


def hangs(exchange):
    exchange.server.stopped.wait(60)


def drips(exchange):
    exchange.handler.send_response(200)
    exchange.handler.end_headers()
    while not exchange.server.stopped.wait(0.05):
        exchange.handler.wfile.write(b" ")


def drips_headers(exchange):
    exchange.handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not exchange.server.stopped.wait(0.05):
        exchange.handler.wfile.write(b"X")


def drips_error(exchange):
    exchange.handler.send_response(400)
    exchange.handler.end_headers()
    while not exchange.server.stopped.wait(0.05):
        exchange.handler.wfile.write(b"X")


def endless(part, *, status=200):
    def respond(exchange):
        exchange.handler.send_response(status)
        exchange.handler.end_headers()
        while not exchange.server.stopped.is_set():
            exchange.handler.wfile.write(part)

    return respond


def endless_informational(exchange):
    while not exchange.server.stopped.is_set():
        exchange.handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def refuses(status, body=b'{"error": {"message": "no"}}', **headers):
    return lambda exchange: exchange.send(body, status=status, **headers)


def sends(body, *, content_type=JSON, **headers):
    return lambda exchange: exchange.send(body, content_type=content_type, **headers)


def half(text):
    whole = completion(text)
    return lambda exchange: exchange.send(whole[: len(whole) // 2], length=len(whole))


def resets(exchange):
    connection = exchange.handler.connection
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def eventually(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


def quiet():
    """Whether all threads of requests come to their end; others, as those of a cluster, are not theirs."""
    own = ("artaug-request", "artaug-exchange")
    return eventually(lambda: not any(thread.name.startswith(own) for thread in threading.enumerate()))


@contextlib.contextmanager
def faulty_server(*script) -> Iterator[FaultyServer]:
    """Serve on a free port of this machine until the block ends."""
    server = FaultyServer("", list(script))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                index = len(server.requests)
                server.requests.append(request)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.times.append(time.monotonic())
                server.active += 1
                server.max_active = max(server.max_active, server.active)
            try:
                server.script[min(index, len(server.script) - 1)](Exchange(server, self, request))
            except OSError:
                pass  # the client has closed the connection
            finally:
                self.close_connection = True
                with server.lock:
                    server.active -= 1

        def finish(self):
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *details):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass

    with Quiet(("127.0.0.1", 0), Handler) as http_server:
        server.url = f"http://127.0.0.1:{http_server.server_address[1]}/v1"
        thread = threading.Thread(target=http_server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            http_server.shutdown()
            thread.join()

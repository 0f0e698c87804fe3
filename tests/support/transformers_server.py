"""A real server of a real model: ``transformers serve``, and one address in front of several servers."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@contextlib.contextmanager
def transformers_server(folder, model_and_processor) -> Iterator[tuple[str, str]]:
    """Serve a model in a process of its own: the address, and the name of the model there."""
    for part in model_and_processor:
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--host", "127.0.0.1", "--device", "cpu"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*command, "--port", str(port)], env=offline, stdout=log, stderr=log) as process,
    ):
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()


def _wait_until_healthy(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(log.read_text())


@dataclass
class OneAddress:
    """The address of several servers, which get the requests in turn."""

    servers: Sequence[str]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """The server of each answer."""
    before_answer: Callable[[bytes], object] = bytes
    """Called with a request when its answer is there, and before it is sent."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_server(self, request):
        with self._lock:
            self.requests.append(request)
            return self.servers[len(self.requests) % len(self.servers)]


@contextlib.contextmanager
def one_address(*servers) -> Iterator[OneAddress]:
    """Listen until the block ends. A server that is away makes a status 502, as a load balancer does."""
    address = OneAddress(servers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server = address.next_server(body)
            headers = {"Content-Type": self.headers["Content-Type"]}
            forwarded = urllib.request.Request(server + self.path.removeprefix("/v1"), body, headers)
            try:
                with urllib.request.urlopen(forwarded, timeout=60) as response:
                    status, answer = response.status, response.read()
            except urllib.error.HTTPError as error:
                status, answer = error.code, error.read()
            except OSError as error:
                status, answer = 502, str(error).encode()
            if status == 200:
                address.before_answer(body)
                address.answered.append(server)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        address.url = f"http://127.0.0.1:{listening.server_port}/v1"
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield address
        finally:
            listening.shutdown()
            thread.join()

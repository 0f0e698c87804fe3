"""One POST request within a time and a size, whatever the server sends.

The clients of the index limit each read: a server that sends a header's bytes one by one, or a body that grows when it
is decompressed, keeps to that limit for hours. Here the whole exchange (names, connection, TLS, redirects, headers,
body) runs in a thread of its own, which is given up at the deadline: its socket is shut down, so that it ends.
"""

import contextlib
import functools
import io
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

_PART_BYTES = 2**16
_MAX_ERROR_BYTES = 2**16  # of the body of an error, which is only quoted
_MAX_HEAD_BYTES = 2**20  # of headers, trailers and the frames of chunks, all together
_MAX_REDIRECTS = 4
_LONGEST_WAIT_S = 1e6  # what every system's clock takes, infinity being none
_REDIRECTS_WITH_BODY = frozenset({307, 308})  # after the others the request would become a GET
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class HttpResponse:
    """The response of a server."""

    status: int
    headers: Mapping[str, str]
    """The names are in lower case."""
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status is one of success: some gateways answer 201 to every POST request."""
        return 200 <= self.status < 300


class UnusableResponseError(Exception):
    """A response that another attempt would not change: too large, compressed, or a redirect to somewhere else."""


@dataclass(eq=False)
class Exchange:
    """One request and its response. `abort` ends it from another thread."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    timeout_s: float
    max_bytes: int
    """Of a response's body, after it was decompressed."""
    _response: "Future[HttpResponse]" = field(default_factory=Future)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _socket: socket.socket | None = None
    _ended: bool = False
    _received: int = 0

    def run(self) -> HttpResponse:
        """Send the request and receive the response.

        Raises:
            TimeoutError: if the response is not complete in time.
            CancelledError: after `abort`.
            OSError: if the connection failed.
            HTTPException: for a response that is not HTTP, or not whole.
            UnusableResponseError: for one that is too large, compressed, or a redirect that must not be followed.
        """
        threading.Thread(target=self._work, name="artaug-exchange", daemon=True).start()
        try:
            return self._response.result(min(self.timeout_s, _LONGEST_WAIT_S))
        finally:
            self.abort()

    def abort(self) -> None:
        """End the exchange, if it is not complete."""
        with self._lock:
            self._ended = True
            self._shut_down()
        self._response.cancel()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is not connected any more
                # The base class's method: that of a TLS socket would unwrap it. It wakes a thread that waits to read.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _work(self) -> None:
        try:
            response = self._follow()
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            with contextlib.suppress(InvalidStateError):
                self._response.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                self._response.set_result(response)

    def _follow(self) -> HttpResponse:
        """The response to the request, after redirects inside its origin."""
        url = self.url
        for _ in range(_MAX_REDIRECTS):
            response = self._request(url)
            location = response.headers.get("location")
            if not 300 <= response.status < 400 or location is None:
                return response
            target = _redirected(url, location) if response.status in _REDIRECTS_WITH_BODY else None
            if target is None:
                raise UnusableResponseError(
                    f"the server redirects ({response.status}) to {location!r}; neither picture nor key is sent "
                    "there. Set base_url to where the server is"
                )
            url = target
        raise UnusableResponseError(f"the server redirects more than {_MAX_REDIRECTS} times")

    def _request(self, url: str) -> HttpResponse:
        parts = urlsplit(url)
        proxy = _proxy(parts)
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        headers = {
            "Host": _authority(parts),
            **self.headers,
            "Content-Length": str(len(self.body)),
            "Connection": "close",
        }
        try:
            self._connect(proxy or parts)
            if parts.scheme == "https":
                if proxy is not None:
                    self._open_tunnel(parts, proxy)
                self._start_tls(parts)
            elif proxy is not None:
                path, headers = url, {**headers, **_proxy_authorization(proxy)}
            return self._receive(self._send("POST", path, headers, self.body))
        finally:
            with self._lock:
                if self._socket is not None:
                    self._socket.close()
                self._socket = None

    def _use(self, connection: socket.socket) -> None:
        with self._lock:
            self._socket = connection
            if self._ended:
                self._shut_down()

    def _connect(self, parts: SplitResult) -> None:
        deadline, failure = time.monotonic() + min(self.timeout_s, _LONGEST_WAIT_S), OSError("the name has no address")
        addresses = socket.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            connection = socket.socket(family, kind, protocol)
            self._use(connection)
            # An address that does not answer leaves time for the others.
            connection.settimeout(max((deadline - time.monotonic()) / (len(addresses) - index), 0.001))
            try:
                connection.connect(address)
            except OSError as error:
                failure = error
                connection.close()
                continue
            connection.settimeout(None)  # from now on, `run` keeps the time
            return
        raise failure

    def _start_tls(self, parts: SplitResult) -> None:
        connection = _tls_context().wrap_socket(
            self._connected(), server_hostname=parts.hostname, do_handshake_on_connect=False
        )
        self._use(connection)  # before the handshake, so that `abort` ends it too
        connection.do_handshake()

    def _open_tunnel(self, parts: SplitResult, proxy: SplitResult) -> None:
        authority = f"{_host(parts)}:{_port(parts)}"
        response = self._send("CONNECT", authority, {"Host": authority, **_proxy_authorization(proxy)}, b"")
        if response.status != 200:
            raise OSError(f"the proxy {_authority(proxy)} answered {response.status}")

    def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> HTTPResponse:
        connection = self._connected()
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # perhaps it has answered before it closed
            connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body)
        while True:
            response = HTTPResponse(_Readable(self), method=method)  # type: ignore[arg-type]  # it only calls makefile
            response.begin()
            if not 101 < response.status < 200:  # such as 103, hints that come before the response
                return response

    def _connected(self) -> socket.socket:
        if self._socket is None or self._ended:
            raise OSError("the exchange was ended")
        return self._socket

    def read_into(self, buffer: bytearray | memoryview) -> int:
        """Read what has come, and at least one byte, unless the server has closed the connection."""
        count = self._connected().recv_into(buffer)
        self._received += count
        if self._received > self.max_bytes + _MAX_HEAD_BYTES:
            raise UnusableResponseError(f"the server's answer goes on after {self._received:,} bytes")
        return count

    def _receive(self, response: HTTPResponse) -> HttpResponse:
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = HttpResponse(response.status, headers, b"")
        limit = self.max_bytes if answer.is_success else min(_MAX_ERROR_BYTES, self.max_bytes)
        body = bytearray()
        try:
            for part in _decoded(response, headers.get("content-encoding", ""), limit):
                body += part
        except UnusableResponseError:
            if answer.is_success:
                raise
            body = (body.rsplit(None, 1) or [body])[0]  # half a word may be half a key, which nothing would hide
        return replace(answer, body=bytes(body))


@dataclass(frozen=True, eq=False)
class _Readable:
    """What `HTTPResponse` needs of a socket."""

    exchange: Exchange

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self.exchange), 1)  # nothing is read ahead: another response may follow


class _Stream(io.RawIOBase):
    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a buffer, as the base class has it
        return self._exchange.read_into(buffer)


def _decoded(response: HTTPResponse, encoding: str, limit: int) -> Iterator[bytes]:
    """The body in parts, decompressed, ``limit`` bytes in all: a thousandth of them may hold the whole of a bomb.

    Raises:
        UnusableResponseError: if there is more, after as much as the limit.
    """
    names = [name for name in encoding.lower().replace(" ", "").split(",") if name not in {"", "identity"}]
    if names and names not in (["gzip"], ["x-gzip"], ["deflate"]):
        raise UnusableResponseError(f"the server's answer is compressed by {encoding!r}, which was not asked for")
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32) if names else None  # 32: a header of gzip or of zlib
    size = 0
    while part := _part(response):
        if decompressor is not None:
            try:
                part = decompressor.decompress(part, limit + 1 - size)
            except zlib.error as error:
                raise UnusableResponseError(f"the server's answer cannot be decompressed: {error}") from None
        yield part[: limit - size]
        size += len(part)
        if size > limit:
            raise UnusableResponseError(f"the server's answer goes on after {limit:,} bytes")
    if response.length:  # http.client raises for chunks only
        raise IncompleteRead(b"", response.length)


def _part(response: HTTPResponse) -> bytes:
    try:
        return response.read(_PART_BYTES)
    except ValueError as error:  # http.client reads as many bytes as a chunk has, also fewer than none
        raise HTTPException(f"the sizes of the answer's chunks are wrong: {error}") from None


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names (``HTTPS_PROXY``, ``NO_PROXY`` and so on), if any."""
    proxies = urllib.request.getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    # NO_PROXY may name a host with its port or without, and an IPv6 address without its brackets.
    if not address or any(map(urllib.request.proxy_bypass, (_authority(parts), _host(parts), parts.hostname or ""))):
        return None
    try:
        proxy = urlsplit(address if "://" in address else f"http://{address}")
        if proxy.scheme == "http" and _port(proxy) and (proxy.hostname or "").encode("idna"):
            return proxy
    except ValueError:
        pass  # a host or a port that cannot be
    raise UnusableResponseError(
        f"the environment's proxy for {parts.scheme} is none: need http://host:port, or NO_PROXY"
    )


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"}


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _redirected(url: str, location: str) -> str | None:
    """Where a redirect leads; None if that is another origin, or no address."""
    try:
        target = urljoin(url, location)
        same = _origin(urlsplit(target)) == _origin(urlsplit(url))
    except ValueError:
        return None
    return target if same and all("!" <= letter <= "~" for letter in target) else None


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, _port(parts)


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS.get(parts.scheme, 0)


def _authority(parts: SplitResult) -> str:
    return _host(parts) if parts.port is None else f"{_host(parts)}:{parts.port}"


def _host(parts: SplitResult) -> str:
    name = parts.hostname or ""
    return f"[{name}]" if ":" in name else name

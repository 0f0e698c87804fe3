"""The page on which a person keeps and drops pairs, and the server of this one page: loopback only, stdlib only."""

import io
import json
import logging
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from artaug._internal.images import as_rgb
from artaug.geometry import Box
from artaug.pairs import ImagePair, pair_digest
from artaug.review.decisions import append_decision, read_decisions

_logger = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "queue.html"
_HOSTS = {"127.0.0.1", "localhost"}
_OWN_SITE = {None, "none", "same-origin"}
_NUMBER, _NUMBERED = re.compile(r"[0-9]{1,9}"), re.compile(r"[0-9]{1,9}\.png")
_TEXT = "text/plain; charset=utf-8"
_MOST_BYTES = 4096
_PATIENCE_S, _LOOK_S = 0.5, 0.05
_IDLE_S = 30


def serve_pairs(pairs: Sequence[ImagePair], path: Path, *, announce: Callable[[str], object], port: int = 0) -> None:
    """Serve the page until the person has finished; the last word on each pair is in the file at ``path``.

    Raises:
        OSError: if the port is taken.
        StorageError: for a file with a line that is no decision.
    """
    desk = Desk.of(pairs, path)
    with _Server(desk, port=port) as server:
        Thread(target=server.serve_forever, args=(_LOOK_S,), daemon=True, name="artaug queue").start()
        try:
            announce(f"http://127.0.0.1:{server.server_port}/{desk.token}/")
            while not desk.finished.wait(_PATIENCE_S):  # a wait without end hears no interrupt on Windows
                pass
        finally:
            server.shutdown()


@dataclass(frozen=True)
class Desk:
    """The pairs on the table, and what has been decided about them."""

    path: Path
    pairs: tuple[ImagePair, ...]
    digests: tuple[str, ...]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    finished: Event = field(default_factory=Event, repr=False)
    lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def of(cls, pairs: Sequence[ImagePair], path: Path) -> "Desk":
        """Lay out pairs, those that show the same once."""
        distinct = {pair_digest(pair): pair for pair in reversed(pairs)}
        order = list(dict.fromkeys(pair_digest(pair) for pair in pairs))
        read_decisions(path)  # a file that is none is said before anyone begins
        return cls(path, tuple(distinct[digest] for digest in order), tuple(order))

    def state(self) -> dict[str, Any]:
        """The pairs, without their pictures, and the numbers of those decided, the latest last."""
        with self.lock:
            decided = read_decisions(self.path)
        places = {digest: place for place, digest in enumerate(self.digests)}
        return {
            "pairs": [
                {
                    "prompt": pair.prompt,
                    "keep": decided.get(digest),
                    "regions": [_region(region.area, region.prompt) for region in pair.plan.regions],
                }
                for pair, digest in zip(self.pairs, self.digests, strict=True)
            ],
            "history": [places[digest] for digest in decided if digest in places],
        }

    def decide(self, place: int, keep: bool | None) -> None:
        """Write down one decision."""
        with self.lock:
            append_decision(self.path, self.pairs[place], keep)

    def picture(self, side: str, place: int) -> bytes:
        """One picture of a pair, as PNG."""
        data = io.BytesIO()
        as_rgb(getattr(self.pairs[place], side)).save(data, "png", compress_level=1)
        return data.getvalue()


@dataclass(frozen=True)
class _Reply:
    """What is answered to a request."""

    body: bytes = b"{}"
    kind: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    nonce: str = ""
    """Of the scripts and styles that may run on a page."""
    last: bool = False
    """Whether nothing is asked after this."""


class _RefusedError(Exception):
    """A request that is answered with a refusal."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Server(ThreadingHTTPServer):
    """Answers for one desk."""

    daemon_threads = True  # a browser keeps connections open for later, and nobody waits for those

    def __init__(self, desk: Desk, *, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.desk = desk

    def handle_error(self, request: object, client_address: object) -> None:
        _logger.debug("artaug queue: a request ended early: %r", sys.exception())  # such as a tab closed while it loads


class _Handler(BaseHTTPRequestHandler):
    """One request: who asks, and what is answered."""

    server: _Server
    timeout = _IDLE_S
    server_version, sys_version = "artaug", ""

    def do_GET(self) -> None:
        self._answer(self._got)

    def do_POST(self) -> None:
        self._answer(self._told)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the standard library names it
        _logger.debug("artaug queue: %s", (format % args).replace(self.server.desk.token, "..."))

    def _answer(self, act: Callable[[list[str]], _Reply]) -> None:
        try:
            reply = act(self._parts())
        except _RefusedError as refusal:
            reply = _Reply(str(refusal).encode(), _TEXT, refusal.status)
        except OSError as fault:
            _logger.exception("artaug queue: the file of decisions could not be used")
            reply = _Reply(str(fault).encode(), _TEXT, HTTPStatus.INSUFFICIENT_STORAGE)
        self._send(reply)
        if reply.last:
            self.server.desk.finished.set()

    def _parts(self) -> list[str]:
        """The path below the secret, for those who know it and come from this page or the address bar."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.partition(":")[0] not in _HOSTS:  # another site's name that was pointed here
            raise _RefusedError(HTTPStatus.FORBIDDEN, "This page is for this machine only.")
        if origin not in {None, f"http://{host}"} or self.headers.get("Sec-Fetch-Site") not in _OWN_SITE:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Another page may not ask here.")
        token, *parts = self.path.partition("?")[0].removeprefix("/").split("/")
        if not secrets.compare_digest(token.encode(), self.server.desk.token.encode()):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "Nothing here. The address of the page was announced whole.")
        return parts

    def _got(self, parts: list[str]) -> _Reply:
        desk = self.server.desk
        match parts:
            case [""]:
                nonce = secrets.token_urlsafe(16)
                page = _PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
                return _Reply(page.encode(), "text/html; charset=utf-8", nonce=nonce)
            case ["state"]:
                return _Reply(json.dumps(desk.state()).encode())
            case ["before" | "after" as side, name] if _NUMBERED.fullmatch(name):
                return _Reply(desk.picture(side, _place(int(name.removesuffix(".png")), desk)), "image/png")
            case _:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "No such page.")

    def _told(self, parts: list[str]) -> _Reply:
        said = self._said()
        match parts:
            case ["decide"]:
                place, keep = said.get("pair"), said.get("keep", "missing")
                if type(place) is not int or not (keep is None or isinstance(keep, bool)):
                    raise _RefusedError(
                        HTTPStatus.BAD_REQUEST, "Expected pair (a number) and keep (true, false, null)."
                    )
                self.server.desk.decide(_place(place, self.server.desk), keep)
                return _Reply()
            case ["finish"]:
                return _Reply(last=True)
            case _:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "No such page.")

    def _said(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not _NUMBER.fullmatch(length):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "Expected JSON of known length.")
        if int(length) > _MOST_BYTES:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Expected at most {_MOST_BYTES} bytes.")
        try:
            said = json.loads(self.rfile.read(int(length)))
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "Expected a JSON object.")
        return said

    def _send(self, reply: _Reply) -> None:
        allowed = f"'nonce-{reply.nonce}'" if reply.nonce else "'none'"
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {allowed}; style-src {allowed}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(reply.body)


def _place(place: int, desk: Desk) -> int:
    if not 0 <= place < len(desk.pairs):
        raise _RefusedError(HTTPStatus.NOT_FOUND, f"There are {len(desk.pairs)} pairs.")
    return place


def _region(area: object, prompt: str) -> dict[str, Any]:
    """What a region asked for, and where, if that is a box."""
    box = [area.left, area.top, area.right, area.bottom] if isinstance(area, Box) else None
    return {"prompt": prompt, "box": box}

"""The review page and its server: a session over some pairs, on the loopback interface, with the standard library only."""

import io
import json
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, Thread
from typing import Any

from artaug._internal.images import as_rgb
from artaug.geometry import Box
from artaug.pairs import ImagePair, pair_digest
from artaug.review.decisions import append_decision, read_decisions

_LOG = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page.html"
_HOSTS = {"127.0.0.1", "localhost"}
_OWN_SITE = {None, "none", "same-origin"}  # Sec-Fetch-Site of this page, of the address bar, and of older browsers
_CONTENT_LENGTH, _PNG_NAME = re.compile(r"[0-9]{1,9}"), re.compile(r"[0-9]{1,9}\.png")
_REDIRECT = """<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={address}"><a href="{address}">Review the pairs</a>
"""
_TEXT = "text/plain; charset=utf-8"
_MAX_BODY_BYTES = 4096
_WAIT_S, _POLL_S = 0.5, 0.05
_IDLE_TIMEOUT_S = 30


def serve_pairs(
    pairs: Sequence[ImagePair], path: Path, *, announce: Callable[[str], object] | None, port: int = 0
) -> None:
    """Serve the page until the person has finished. The decisions are in the file at ``path``.

    Its address is passed to ``announce``, or opened in this machine's browser if that is None.

    Raises:
        OSError: if the port is in use.
        StorageError: for a file with a line that is not a decision.
    """
    session = ReviewSession.of(pairs, path)
    with ExitStack() as stack:
        server = stack.enter_context(_ReviewServer(session, port=port))
        Thread(target=server.serve_forever, args=(_POLL_S,), daemon=True, name="artaug review").start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/{session.token}/"
            if announce is None:
                stack.enter_context(_shown_in_browser(address, path.parent))
            else:
                announce(address)
            while not session.finished.wait(_WAIT_S):  # a wait without timeout cannot be interrupted on Windows
                pass
        finally:
            server.shutdown()


@contextmanager
def _shown_in_browser(address: str, folder: Path) -> Iterator[None]:
    """Open an address in this machine's browser; a file in ``folder`` leads there for the ``with`` block.

    Every user of the machine can read the command line of a browser, so the secret address must not stand there. The file
    is not among the temporary ones, nor hidden: a browser in a sandbox, such as a snap, reads neither.
    """
    import webbrowser  # noqa: PLC0415 - only needed when a page is shown

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="artaug-review-", dir=folder) as private:  # that only its owner can enter
        page = Path(private).resolve() / "open.html"
        page.touch(mode=0o600)
        page.write_text(_REDIRECT.format(address=escape(address)), encoding="utf-8")
        webbrowser.open(page.as_uri())
        yield


@dataclass(frozen=True)
class ReviewSession:
    """The pairs of one page, the file of decisions, and the secret of the page's address."""

    path: Path
    pairs: tuple[ImagePair, ...]
    digests: tuple[str, ...]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    finished: Event = field(default_factory=Event, repr=False)
    lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def of(cls, pairs: Sequence[ImagePair], path: Path) -> "ReviewSession":
        """A session over pairs; pairs that show the same appear once, at the place of the first."""
        distinct: dict[str, ImagePair] = {}
        for pair in pairs:
            distinct.setdefault(pair_digest(pair), pair)
        read_decisions(path)  # an invalid file is an error before the page is shown
        return cls(path, tuple(distinct.values()), tuple(distinct))

    def state(self) -> dict[str, Any]:
        """The pairs without their images, and the indices of the decided ones, the latest last."""
        with self.lock:
            decisions = read_decisions(self.path)
        indices = {digest: index for index, digest in enumerate(self.digests)}
        return {
            "pairs": [
                {
                    "prompt": pair.prompt,
                    "keep": decisions.get(digest),
                    "regions": [_region_json(region.area, region.prompt) for region in pair.plan.regions],
                }
                for pair, digest in zip(self.pairs, self.digests, strict=True)
            ],
            "history": [indices[digest] for digest in decisions if digest in indices],
        }

    def decide(self, index: int, keep: bool | None) -> None:
        """Write a decision to the file."""
        with self.lock:
            append_decision(self.path, self.pairs[index], keep)

    def image_png(self, side: str, index: int) -> bytes:
        """The ``before`` or ``after`` image of a pair, as PNG."""
        data = io.BytesIO()
        as_rgb(getattr(self.pairs[index], side)).save(data, "png", compress_level=1)
        return data.getvalue()


@dataclass(frozen=True)
class _Response:
    """The response to a request."""

    body: bytes = b"{}"
    content_type: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    nonce: str = ""
    """Of the scripts and styles that may run on the page."""
    ends_session: bool = False


class _RequestError(Exception):
    """A request that is refused, with the status of the response."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _ReviewServer(ThreadingHTTPServer):
    """Serves one session."""

    daemon_threads = True  # a browser keeps idle connections open, which must not keep the program alive

    def __init__(self, session: ReviewSession, *, port: int) -> None:
        super().__init__(("127.0.0.1", port), _RequestHandler)
        self.session = session

    def handle_error(self, request: object, client_address: object) -> None:
        # Such as a tab that is closed while it loads.
        _LOG.debug("artaug review: a request ended early: %r", sys.exception())


class _RequestHandler(BaseHTTPRequestHandler):
    """Checks where a request comes from, and answers it."""

    server: _ReviewServer
    timeout = _IDLE_TIMEOUT_S
    server_version, sys_version = "artaug", ""

    def do_GET(self) -> None:
        self._respond(self._handle_get)

    def do_POST(self) -> None:
        self._respond(self._handle_post)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the standard library names it
        _LOG.debug("artaug review: %s", (format % args).replace(self.server.session.token, "..."))

    def _respond(self, handle: Callable[[list[str]], _Response]) -> None:
        try:
            response = handle(self._authorized_path())
        except _RequestError as error:
            response = _Response(str(error).encode(), _TEXT, error.status)
        except OSError as error:
            _LOG.exception("artaug review: the file of decisions could not be used")
            response = _Response(str(error).encode(), _TEXT, HTTPStatus.INSUFFICIENT_STORAGE)
        self._send_response(response)
        if response.ends_session:
            self.server.session.finished.set()

    def _authorized_path(self) -> list[str]:
        """The path after the secret, of a request from this page or the address bar."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.partition(":")[0] not in _HOSTS:  # DNS rebinding: the name of another site that resolves to 127.0.0.1
            raise _RequestError(HTTPStatus.FORBIDDEN, "This page is for this machine only.")
        token, *parts = self.path.partition("?")[0].removeprefix("/").split("/")
        # The file that opens the page is of another site. It shows the page, in a tab of its own, and reads nothing.
        shows_page = parts == [""] and self.command == "GET" and self.headers.get("Sec-Fetch-Dest") == "document"
        is_foreign = not shows_page and self.headers.get("Sec-Fetch-Site") not in _OWN_SITE
        if origin not in {None, f"http://{host}"} or is_foreign:
            raise _RequestError(HTTPStatus.FORBIDDEN, "Requests from other pages are refused.")
        if not secrets.compare_digest(token.encode(), self.server.session.token.encode()):
            raise _RequestError(HTTPStatus.NOT_FOUND, "There is no such page: use the whole address, with its secret.")
        return parts

    def _handle_get(self, parts: list[str]) -> _Response:
        session = self.server.session
        match parts:
            case [""]:
                nonce = secrets.token_urlsafe(16)
                page = _PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
                return _Response(page.encode(), "text/html; charset=utf-8", nonce=nonce)
            case ["state"]:
                return _Response(json.dumps(session.state()).encode())
            case ["before" | "after" as side, name] if _PNG_NAME.fullmatch(name):
                index = _checked_index(int(name.removesuffix(".png")), session)
                return _Response(session.image_png(side, index), "image/png")
            case _:
                raise _RequestError(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _handle_post(self, parts: list[str]) -> _Response:
        body = self._json_body()
        match parts:
            case ["decide"]:
                index, keep = body.get("pair"), body.get("keep", "missing")
                if type(index) is not int or not (keep is None or isinstance(keep, bool)):
                    raise _RequestError(
                        HTTPStatus.BAD_REQUEST, "Expected pair (a number) and keep (true, false, null)."
                    )
                self.server.session.decide(_checked_index(index, self.server.session), keep)
                return _Response()
            case ["finish"]:
                return _Response(ends_session=True)
            case _:
                raise _RequestError(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _json_body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not _CONTENT_LENGTH.fullmatch(length):
            raise _RequestError(HTTPStatus.BAD_REQUEST, "Expected JSON of known length.")
        if int(length) > _MAX_BODY_BYTES:
            raise _RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Expected at most {_MAX_BODY_BYTES} bytes.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise _RequestError(HTTPStatus.BAD_REQUEST, "Expected a JSON object.")
        return body

    def _send_response(self, response: _Response) -> None:
        allowed = f"'nonce-{response.nonce}'" if response.nonce else "'none'"
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {allowed}; style-src {allowed}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(response.body)


def _checked_index(index: int, session: ReviewSession) -> int:
    if not 0 <= index < len(session.pairs):
        raise _RequestError(HTTPStatus.NOT_FOUND, f"There are {len(session.pairs)} pairs.")
    return index


def _region_json(area: object, prompt: str) -> dict[str, Any]:
    """The prompt of a region, and its box if its area is one."""
    box = [area.left, area.top, area.right, area.bottom] if isinstance(area, Box) else None
    return {"prompt": prompt, "box": box}

"""`ServedModel`: a model behind any OpenAI-compatible server, such as vLLM, SGLang, llama.cpp or a hosted one."""

import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL.Image import Image, Resampling

from artaug._internal.images import as_rgb, data_url
from artaug._internal.text import shorten
from artaug._internal.transient import DEADLINE_S
from artaug.errors import InvalidValueError
from artaug.serving.backoff import RequestCancelled, RetryGate
from artaug.serving.chat import ChatReply, ChatRequest, Message
from artaug.serving.client import RetryingClient, stream_threads
from artaug.serving.completion import RequestFailure
from artaug.serving.http import Exchange, HttpResponse, UnusableResponseError
from artaug.serving.key import ApiKey
from artaug.serving.usage import Usage, UsageCounter

_LOG = logging.getLogger(__name__)

_KEY_VARIABLE = "OPENAI_API_KEY"
_MAX_RESPONSE_BYTES = 16 * 2**20
_MAX_ERROR_CHARS = 300
_MAX_TOKEN_CHARS = 40
_SCHEMA_REFUSED_STATUS = frozenset({400, 404, 415, 422, 500, 501})  # 500 where the compiler of the schema fails
_ATTEMPTS_AT_500 = 3
_SCHEMA_REFUSED = "the server refused the JSON schema, so the model was asked for free text"


class _State:
    """What is learned of a server while it is used."""

    def __init__(self) -> None:
        self.usage = UsageCounter()
        self.schema_refused = False


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind an OpenAI-compatible server: what `OpenAICritic` and the scorers on a server have in common.

    Transient errors (no connection, a timeout, a truncated response, status 408, 409, 425, 429 and from 500 up, except
    501, 505 and 511) are retried with exponential backoff, or after the time that the server asks for, until
    ``retry_deadline_s`` is over; if the server asks for a wait, all requests of the batch wait. An error in a response with
    status 200 is retried as its own status would be. A response is read up to 16 MiB, and a redirect is followed inside the
    server's own origin only. Proxies are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``).

    Raises:
        InvalidValueError: for a URL that is invalid or may hold a secret, a key that no header can carry or that stands in
            another field too, or a number out of range.
    """

    base_url: str
    """The server's address, such as ``"http://127.0.0.1:8000/v1"``."""
    model: str
    """The model's name on the server."""
    max_new_tokens: int = 1024
    """Tokens of a reply."""
    limit_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The parameter of the request for that limit; OpenAI's newer models need the second."""
    temperature: float | None = 0.0
    """The sampling temperature; None to leave it out, as OpenAI's reasoning models need."""
    extra_body: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further parameters of the request, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``."""
    max_side_px: int = 1280
    """Pictures whose longer side is longer are reduced to it before they are sent."""
    jpeg_quality: int | None = None
    """Pictures are sent as JPEG of this quality, 1 to 95; None for PNG, which is lossless."""
    api_key: str | ApiKey | None = field(default=None, repr=False)
    """The key, without white space around it; None to read the environment variable ``OPENAI_API_KEY``, if it is set, and
    ``""`` to send none. It appears in no output, also where the server quotes it, and in no pickle: an object for other
    processes needs the variable."""
    concurrency: int = field(default=8, repr=False)
    """The largest number of concurrent requests."""
    timeout_s: float = field(default=120.0, repr=False)
    """A request fails if its response is not complete after this time, from looking up the server's name on."""
    max_attempts: int | None = field(default=None, repr=False)
    """The largest number of attempts for a request; None for as many as ``retry_deadline_s`` allows."""
    retry_deadline_s: float = field(default=DEADLINE_S, repr=False)
    """No further attempt of a request starts this long after its first, nor this long after the server last answered any
    request of the batch: a server that is down costs one deadline for the whole batch."""
    _state: _State = field(init=False, repr=False, compare=False, default_factory=_State)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _check_url(self.base_url)
        minimum = {
            **dict.fromkeys(("max_new_tokens", "max_side_px", "concurrency", "max_attempts"), 1),
            **dict.fromkeys(("timeout_s", "retry_deadline_s"), 0),
        }
        if low := [
            f"{name}={number}"
            for name, least in minimum.items()
            if (number := getattr(self, name)) is not None and not number >= least
        ]:
            raise InvalidValueError(
                f"{owner}({', '.join(low)}): need counts of at least 1, and times of at least 0 seconds."
            )
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise InvalidValueError(f"{owner}(jpeg_quality={self.jpeg_quality}): need 1 to 95, or None for PNG.")
        if isinstance(self.api_key, str):
            object.__setattr__(self, "api_key", ApiKey(self.api_key))
        shown = repr(self)
        if _key_of(self).redact(shown) != shown:
            raise InvalidValueError(
                f"the api_key stands in another field of this {owner} too (base_url, model, extra_body or a prompt), "
                "which reprs and reports show: remove it there."
            )

    @property
    def usage(self) -> Usage:
        """The requests and tokens of this object so far."""
        return self._state.usage.total

    def _replies(
        self, requests: Sequence[ChatRequest], data_urls: dict[int, str] | None = None
    ) -> Iterator[tuple[int, ChatReply | RequestFailure]]:
        """Send requests, ``concurrency`` at a time: the index of each, and the reply or the last failure, as they come.

        Args:
            requests: about pictures that were `_resized`.
            data_urls: pictures that are encoded already, by the id of their object, to which those are added that are encoded
                now; None where no later request has the same picture.
        """
        connection = _Connection(self, self._state.usage)
        try:
            yield from stream_threads(
                lambda request: self._complete(connection, request, {} if data_urls is None else data_urls),
                requests,
                max_workers=self.concurrency,
            )
        finally:  # after an interruption, the requests that are not sent yet are cancelled
            connection.close()

    def _complete(
        self, connection: "_Connection", request: ChatRequest, data_urls: dict[int, str]
    ) -> ChatReply | RequestFailure:
        payload = self._payload(request, data_urls)
        schema = None if self._state.schema_refused else request.schema
        structured_payload = payload
        if schema is not None:
            json_schema = {"name": "reply", "strict": True, "schema": schema}
            structured_payload = {**payload, "response_format": {"type": "json_schema", "json_schema": json_schema}}
        # A server whose compiler fails at this schema answers 500 for ever, so free text is tried early.
        early = None if schema is None else _ATTEMPTS_AT_500
        outcome = connection.client.complete(structured_payload, max_attempts_at_500=early)
        without_schema = request.schema is not None and schema is None
        if schema is not None and isinstance(outcome, RequestFailure) and outcome.status in _SCHEMA_REFUSED_STATUS:
            unstructured = connection.client.complete(payload, max_attempts=1 if outcome.status == 500 else None)
            if isinstance(unstructured, ChatReply):  # so the schema was what the server refused
                self._note_schema_refused(outcome.reason)
                outcome, without_schema = unstructured, True
            elif outcome.status == 500 and (self.max_attempts is None or self.max_attempts > _ATTEMPTS_AT_500):
                left = None if self.max_attempts is None else self.max_attempts - _ATTEMPTS_AT_500
                outcome = connection.client.complete(structured_payload, max_attempts=left)
        if isinstance(outcome, RequestFailure):
            self._state.usage.add(Usage(failures=1))
            return outcome
        return replace(outcome, notes=(*([_SCHEMA_REFUSED] if without_schema else []), *outcome.notes))

    def _quoted(self, tokens: Iterable[str]) -> str:
        """Some tokens that the server listed, in words, for an error."""
        key = _key_of(self)
        return ", ".join(repr(shorten(key.redact_part(token), _MAX_TOKEN_CHARS)) for token in tokens)

    def _payload(self, request: ChatRequest, data_urls: dict[int, str]) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [self._chat_message(message, data_urls) for message in request.messages],
            self.limit_parameter: self.max_new_tokens,
        }
        if self.temperature is not None:
            payload["temperature"] = self.temperature
        if request.top_logprobs:
            payload |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return payload

    def _chat_message(self, message: Message, data_urls: dict[int, str]) -> dict[str, Any]:
        if message.image is None:
            return {"role": message.role, "content": message.text}
        content: list[dict[str, Any]] = []
        for image in (message.image, *message.other_images):
            if (url := data_urls.get(id(image))) is None:
                url = data_urls[id(image)] = self._data_url(image)
            content.append({"type": "image_url", "image_url": {"url": url}})
        return {"role": message.role, "content": [*content, {"type": "text", "text": message.text}]}

    def _resized(self, image: Image) -> Image:
        image = as_rgb(image)
        scale = self.max_side_px / max(image.size)
        if scale >= 1:
            return image
        width, height = (max(1, round(side * scale)) for side in image.size)
        return image.resize((width, height), Resampling.LANCZOS)

    def _data_url(self, image: Image) -> str:
        file = io.BytesIO()
        if self.jpeg_quality is None:
            image.save(file, "PNG", compress_level=3)
        else:
            image.save(file, "JPEG", quality=self.jpeg_quality, subsampling=0)
        return data_url(file.getvalue(), "png" if self.jpeg_quality is None else "jpeg")

    def _note_schema_refused(self, reason: str) -> None:
        if not self._state.schema_refused:
            _LOG.warning(
                "%s refused the JSON schema; the model is asked for free text from now on: %s", self.base_url, reason
            )
        self._state.schema_refused = True


class _Connection:
    """The connection to a server, for one batch of requests."""

    def __init__(self, model: ServedModel, usage: UsageCounter) -> None:
        self._url = f"{model.base_url.rstrip('/')}/chat/completions"
        self._key = _key_of(model)
        self._extra_body, self._timeout_s = dict(model.extra_body), model.timeout_s
        self._gate = RetryGate()
        self._exchanges: set[Exchange] = set()
        self.client = RetryingClient(
            self._send,
            self._gate,
            usage,
            max_attempts=model.max_attempts,
            retry_deadline_s=model.retry_deadline_s,
            server=model.base_url,
            redact=self._key.redact,
        )

    def close(self) -> None:
        """Cancel all requests, those that wait for the server too."""
        self._gate.close()
        for exchange in tuple(self._exchanges):
            exchange.abort()

    def _send(self, payload: Mapping[str, Any]) -> HttpResponse | RequestFailure:
        headers = {"User-Agent": "artaug", "Accept": "application/json", "Accept-Encoding": "identity"}
        headers["Content-Type"] = "application/json"
        if key := self._key.reveal():
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps({**payload, **self._extra_body}).encode()
        exchange = Exchange(self._url, headers, body, timeout_s=self._timeout_s, max_bytes=_MAX_RESPONSE_BYTES)
        self._exchanges.add(exchange)
        try:
            if self._gate.is_closed:  # after `close` has gone through the exchanges
                raise RequestCancelled
            return self._without_key(exchange.run())
        except CancelledError:
            raise RequestCancelled from None
        except TimeoutError:
            return RequestFailure(f"no whole answer within {self._timeout_s:g} s", retryable=True)
        except UnusableResponseError as error:
            return RequestFailure(shorten(self._key.redact(str(error)), _MAX_ERROR_CHARS))
        except (OSError, HTTPException) as error:
            text = shorten(self._key.redact(f"{type(error).__name__}: {error}"), _MAX_ERROR_CHARS)
            return RequestFailure(f"the connection failed: {text}", retryable=True)
        finally:
            self._exchanges.discard(exchange)

    def _without_key(self, response: HttpResponse) -> HttpResponse:
        """The response in UTF-8, without the key. It is hidden before anything is cut, which might leave half of it."""
        text = response.body.decode(json.detect_encoding(response.body), errors="replace")
        headers = {name: self._key.redact(value) for name, value in response.headers.items()}
        return HttpResponse(response.status, headers, self._key.redact(text).encode())


def _key_of(model: ServedModel) -> ApiKey:
    """The key that requests carry: the object's own, or that of the environment."""
    return model.api_key if isinstance(model.api_key, ApiKey) else ApiKey(os.environ.get(_KEY_VARIABLE, ""))


def _check_url(url: str) -> None:
    """Refuse what is no address, or holds what may be secret; the error shows no more of it than scheme and host."""
    no_address = InvalidValueError("the base_url is no address of a server: need one like 'http://127.0.0.1:8000/v1'.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:  # a host or a port that cannot be
        raise no_address from None
    visible = all("!" <= letter <= "~" for letter in url)
    if not (host and visible) or port == 0 or parts.scheme not in {"http", "https"}:
        raise no_address
    if "@" in parts.netloc or parts.query or parts.fragment or ";" in parts.path:
        raise InvalidValueError(
            f"the base_url of {host} holds a user, a password, a query, parameters or a fragment, which reprs would show: "
            "use api_key, and extra_body for what else the server needs."
        )

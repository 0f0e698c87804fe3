"""`OpenAICritic`: a model behind any OpenAI-compatible server, such as vLLM, SGLang, llama.cpp or a hosted one."""

import io
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, final
from urllib.parse import urlsplit

from PIL.Image import Image, Resampling

from artaug._internal.extras import optional
from artaug._internal.images import as_rgb, data_url
from artaug.critics.conversation import Conversation, Message
from artaug.critics.coordinates import FAMILIES, Coordinates
from artaug.critics.dialogue import ChatReply, ChatRequest, run_dialogue
from artaug.critics.probing import ProbeResult, probe_coordinates
from artaug.critics.server.backoff import RetryGate
from artaug.critics.server.client import HttpResponse, RequestFailure, RetryingClient, map_threads
from artaug.critics.server.usage import Usage, UsageCounter
from artaug.critique import Abstention, Critic, Critique
from artaug.errors import InvalidValueError

_LOG = logging.getLogger(__name__)

_KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "none"  # the client needs a key; a local server accepts any
_MAX_RESPONSE_BYTES = 16 * 2**20
_SCHEMA_REFUSED_STATUS = frozenset({400, 404, 415, 422, 501})
_FAMILY_PATTERNS = {  # families whose convention does not depend on the processor, by the names of their checkpoints
    "qwen2_vl": r"qwen[-_ ]?2[-_]vl\b",
    "qwen3_vl": r"qwen[-_ ]?3[-_]vl\b",
    "internvl": r"internvl",
    "gemma3": r"gemma[-_ ]?3[-_:]\d",
}


@final
@dataclass(frozen=True, kw_only=True)
class OpenAICritic(Critic):
    """Criticises pictures with a model behind an OpenAI-compatible server, several requests at a time.

    Every picture gets a critique, or an abstention with the error that was left after all attempts. Temporary errors (no
    connection, a timeout, a truncated response, status 408, 409, 425, 429, 500, 502, 503, 504, 529) are retried with
    exponential backoff, or after the time that the server asks for; then all requests of the critic wait.

    Raises:
        InvalidValueError: for a URL that is invalid or holds a password, a number out of range, or if no conversation is
            given and the model's name does not say how it writes boxes.
        MissingExtraError: if openai is not installed.
    """

    base_url: str
    """The server's address, such as ``"http://127.0.0.1:8000/v1"``."""
    model: str
    """The model's name on the server."""
    conversation: Conversation | None = None
    """The prompts, and how the model writes boxes. May be None for Qwen2-VL, Qwen3-VL, InternVL and Gemma 3."""
    structured: bool = True
    """Request JSON on the schema (``response_format``). If the server refuses it, the model is asked for free text: one
    warning is logged, and each critique notes it as a repair."""
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
    api_key: str | None = field(default=None, repr=False)
    """The key; None to read the environment variable ``OPENAI_API_KEY``, if it is set. It never appears in outputs."""
    concurrency: int = field(default=8, repr=False)
    """The largest number of concurrent requests."""
    timeout_s: float = field(default=120.0, repr=False)
    """A request fails if its response is not complete after this time."""
    max_attempts: int = field(default=5, repr=False)
    """The largest number of attempts for a request."""
    retry_deadline_s: float = field(default=600.0, repr=False)
    """No further attempt starts this long after the first."""

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        minimum = {
            **dict.fromkeys(("max_new_tokens", "max_side_px", "concurrency", "max_attempts"), 1),
            **dict.fromkeys(("timeout_s", "retry_deadline_s"), 0),
        }
        if low := [
            f"{name}={getattr(self, name)}" for name, least in minimum.items() if not getattr(self, name) >= least
        ]:
            raise InvalidValueError(
                f"OpenAICritic({', '.join(low)}): need counts of at least 1, and times of at least 0 seconds."
            )
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise InvalidValueError(f"OpenAICritic(jpeg_quality={self.jpeg_quality}): need 1 to 95, or None for PNG.")
        if self.conversation is None:
            object.__setattr__(self, "conversation", Conversation(coordinates=_coordinates_by_name(self.model)))
        with optional("openai", required_by="OpenAICritic", extra="openai"):
            import openai  # noqa: F401, PLC0415 - an extra

    @property
    def usage(self) -> Usage:
        """The requests and tokens of this critic so far."""
        return self._usage.total

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        """Criticise many pictures, ``concurrency`` at a time."""
        # Kept for the batch, so that a picture is encoded once for both stages and all attempts.
        data_urls: dict[int, str] = {}
        generate = partial(self._generate, data_urls)
        return run_dialogue(self._conversation, images, prompts, generate=generate, prepare=self._resized)

    def probe(self) -> ProbeResult:
        """Show the model a few rectangles and find out how it writes boxes."""
        return probe_coordinates(partial(self._generate, {}), self._conversation.coordinates)

    @property
    def _conversation(self) -> Conversation:
        return self.conversation or Conversation()

    def _generate(self, data_urls: dict[int, str], requests: Sequence[ChatRequest]) -> list[ChatReply | Abstention]:
        connection = _Connection(self, self._usage)
        try:
            return map_threads(
                lambda request: self._complete(connection, request, data_urls), requests, max_workers=self.concurrency
            )
        finally:  # after an interruption, the requests that are not sent yet are cancelled
            connection.close()

    def _complete(
        self, connection: "_Connection", request: ChatRequest, data_urls: dict[int, str]
    ) -> ChatReply | Abstention:
        payload = self._payload(request, data_urls)
        schema = request.schema if self.structured and not self._schema_refused.is_set() else None
        structured_payload = payload
        if schema is not None:
            json_schema = {"name": "critique", "strict": True, "schema": schema}
            structured_payload = {**payload, "response_format": {"type": "json_schema", "json_schema": json_schema}}
        outcome = connection.client.complete(structured_payload)
        without_schema = self.structured and request.schema is not None and schema is None
        if schema is not None and isinstance(outcome, RequestFailure) and outcome.status in _SCHEMA_REFUSED_STATUS:
            unstructured = connection.client.complete(payload)
            if isinstance(unstructured, ChatReply):  # so the schema was what the server refused
                self._note_schema_refused(outcome.reason)
                outcome, without_schema = unstructured, True
        if isinstance(outcome, RequestFailure):
            self._usage.add(Usage(failures=1))
            return Abstention(outcome.reason)
        notes = ("the server refused the JSON schema, so the model was asked for free text",) if without_schema else ()
        return replace(outcome, notes=(*notes, *outcome.notes))

    def _payload(self, request: ChatRequest, data_urls: dict[int, str]) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [self._chat_message(message, data_urls) for message in request.messages],
            self.limit_parameter: self.max_new_tokens,
        }
        if self.temperature is not None:
            payload["temperature"] = self.temperature
        return payload

    def _chat_message(self, message: Message, data_urls: dict[int, str]) -> dict[str, Any]:
        if message.image is None:
            return {"role": message.role, "content": message.text}
        if id(message.image) not in data_urls:
            data_urls[id(message.image)] = self._data_url(message.image)
        image = {"type": "image_url", "image_url": {"url": data_urls[id(message.image)]}}
        return {"role": message.role, "content": [image, {"type": "text", "text": message.text}]}

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

    @cached_property
    def _usage(self) -> UsageCounter:
        return UsageCounter()

    @cached_property
    def _schema_refused(self) -> threading.Event:
        return threading.Event()

    def _note_schema_refused(self, reason: str) -> None:
        if not self._schema_refused.is_set():
            _LOG.warning(
                "%s refused the JSON schema; the model is asked for free text from now on: %s", self.base_url, reason
            )
        self._schema_refused.set()


class _Connection:
    """The connection of a critic to its server, for one batch of requests."""

    def __init__(self, critic: OpenAICritic, usage: UsageCounter) -> None:
        import openai  # noqa: PLC0415 - an extra

        self._key = critic.api_key or os.environ.get(_KEY_VARIABLE) or _NO_KEY
        self._openai = openai.OpenAI(base_url=critic.base_url, api_key=self._key, max_retries=0)
        self._extra_body, self._timeout_s = dict(critic.extra_body), critic.timeout_s
        self._gate = RetryGate()
        self.client = RetryingClient(
            self._send,
            self._gate,
            usage,
            max_attempts=critic.max_attempts,
            retry_deadline_s=critic.retry_deadline_s,
        )

    def close(self) -> None:
        """Cancel all requests."""
        self._gate.close()
        self._openai.close()

    def _send(self, payload: Mapping[str, Any]) -> HttpResponse | RequestFailure:
        import httpx2  # noqa: PLC0415 - openai sends with it, and does not wrap its errors while a body is read
        import openai  # noqa: PLC0415 - an extra

        timeout = RequestFailure(f"no whole answer within {self._timeout_s:g} s", retryable=True)
        # The timeout of the client is for each read, so a server that sends a byte now and then would never reach it:
        # the body is read in parts, with a deadline for all of it.
        deadline = time.monotonic() + self._timeout_s
        create = self._openai.chat.completions.with_streaming_response.create
        try:
            with create(**payload, extra_body=self._extra_body, timeout=self._timeout_s) as response:
                body = b""
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:
                        return timeout
                    if len(body) > _MAX_RESPONSE_BYTES:
                        return RequestFailure(f"the server's answer goes on after {_MAX_RESPONSE_BYTES:,} bytes")
                return HttpResponse(response.status_code, response.headers, body)
        except openai.APIStatusError as error:
            body = error.response.content
            if self._key != _NO_KEY:  # some servers quote the key in their error
                body = body.replace(self._key.encode(), b"***")
            return HttpResponse(error.status_code, error.response.headers, body)
        except (openai.APITimeoutError, httpx2.TimeoutException):
            return timeout
        except (openai.APIConnectionError, httpx2.RequestError) as error:
            cause = error.__cause__ or error
            return RequestFailure(f"the connection failed: {type(cause).__name__}: {cause}", retryable=True)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InvalidValueError(f"{url!r} is no address of a server: need one like 'http://127.0.0.1:8000/v1'.")
    if parts.password or parts.query:
        raise InvalidValueError("the base_url holds a password or a query, which reprs would show: use api_key.")


def _coordinates_by_name(model: str) -> Coordinates:
    for family, pattern in _FAMILY_PATTERNS.items():
        if re.search(pattern, model.lower()):
            return FAMILIES[family]
    raise InvalidValueError(
        f"the name {model!r} does not say how the model writes boxes. Pass conversation=Conversation(coordinates=...), "
        "with coordinates_for(family) for a known family (fitted to its processor), or what OpenAICritic.probe finds."
    )

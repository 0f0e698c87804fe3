"""A critic that asks any OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted one."""

import io
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL.Image import Image, Resampling

from artaug._internal.images import as_rgb, data_url
from artaug.critics.conversation import Conversation, Message
from artaug.critics.coordinates import FAMILIES, Coordinates
from artaug.critics.dialogue import Question, Reply, run_dialogue
from artaug.critics.probing import Probe, probe
from artaug.critics.server.backoff import Gate
from artaug.critics.server.client import Answered, Fault, RetryingClient, map_threads
from artaug.critics.server.usage import Meter, Usage
from artaug.critique import Abstention, Critic, Critique
from artaug.errors import InvalidValueError, MissingExtraError

_LOG = logging.getLogger(__name__)

_KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "none"  # servers of one's own take any
_LARGEST_ANSWER = 16 * 2**20
_REFUSES_A_SCHEMA = frozenset({400, 404, 415, 422, 501})
_NAMED = {  # families whose convention depends on nothing but the model, as their checkpoints are called
    "qwen2_vl": r"qwen[-_ ]?2[-_]vl\b",
    "qwen3_vl": r"qwen[-_ ]?3[-_]vl\b",
    "internvl": r"internvl",
    "gemma3": r"gemma[-_ ]?3[-_:]\d",
}


@dataclass(frozen=True, kw_only=True)
class OpenAICritic(Critic):
    """Asks a model behind an OpenAI-compatible server, several pictures at a time.

    Nothing is lost: a picture ends with a critique, or with an abstention that names the fault of the server or the
    network that was left after all tries. What may pass by itself (no connection, no answer in time, half an answer,
    status 408, 409, 425, 429, 500, 502, 503, 504, 529) is tried again, after the time the server asks for where it does,
    and all requests of the critic wait then.

    Raises:
        InvalidValueError: for a URL that is none or holds a password, a number out of range, or if no conversation is
            given and the model's name does not tell how it writes boxes.
        MissingExtraError: if openai is not installed.
    """

    base_url: str
    """Where the server is, such as ``"http://127.0.0.1:8000/v1"``."""
    model: str
    """What the server calls the model."""
    conversation: Conversation | None = None
    """What is said, and how the model writes boxes. None if its name tells: Qwen2-VL, Qwen3-VL, InternVL, Gemma 3."""
    structured: bool = True
    """Ask for JSON on the schema (``response_format``). Where the server refuses that, it is asked freely: a warning in
    the log says so once, and each critique's repairs do."""
    max_new_tokens: int = 1024
    """Tokens of a reply."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that; OpenAI's newer models want the second."""
    temperature: float | None = 0.0
    """Of sampling; None to leave it to the server, as OpenAI's reasoning models want."""
    extra_body: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """More of the request, for the server, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``."""
    max_side_px: int = 1280
    """Pictures are reduced to this length of the longer side before they are sent."""
    jpeg_quality: int | None = None
    """Pictures are sent as JPEG of this quality, 1 to 95; None for PNG, without loss."""
    api_key: str | None = field(default=None, repr=False)
    """The key; None for that in the environment variable ``OPENAI_API_KEY``, if there is one. It is never shown."""
    concurrency: int = field(default=8, repr=False)
    """Requests at a time, at most."""
    timeout_s: float = field(default=120.0, repr=False)
    """A request that is not answered whole within so many seconds has failed."""
    tries: int = field(default=5, repr=False)
    """Requests a question, at most."""
    patience_s: float = field(default=600.0, repr=False)
    """No further try is made for a question so many seconds after the first."""

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        least = {"max_new_tokens": 1, "max_side_px": 1, "concurrency": 1, "tries": 1, "timeout_s": 0, "patience_s": 0}
        if low := [
            f"{name}={getattr(self, name)}" for name, bound in least.items() if not getattr(self, name) >= bound
        ]:
            raise InvalidValueError(f"OpenAICritic({', '.join(low)}): need at least 1, and no time below 0.")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise InvalidValueError(f"OpenAICritic(jpeg_quality={self.jpeg_quality}): need 1 to 95, or None for PNG.")
        if self.conversation is None:
            object.__setattr__(self, "conversation", Conversation(coordinates=_coordinates_named(self.model)))
        try:
            import openai  # noqa: F401, PLC0415 - an extra
        except ImportError:
            raise MissingExtraError("OpenAICritic", package="openai", extra="openai") from None

    @property
    def usage(self) -> Usage:
        """What this critic has used until now."""
        return self._meter.total

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        """Criticise many pictures, ``concurrency`` at a time."""
        encoded: dict[int, str] = {}
        return run_dialogue(self._talk, images, prompts, ask=partial(self._ask, encoded), prepare=self._reduced)

    def probe(self) -> Probe:
        """Show the model a few rectangles and find out how it writes boxes."""
        return probe(partial(self._ask, {}), self._talk.coordinates)

    @property
    def _talk(self) -> Conversation:
        return self.conversation or Conversation()

    def _ask(self, encoded: dict[int, str], questions: Sequence[Question]) -> list[Reply | Abstention]:
        line = _Line(self, self._meter)
        try:
            return map_threads(
                lambda question: self._answer(line, question, encoded), questions, at_once=self.concurrency
            )
        finally:  # after an interruption, what has not been sent is not sent any more
            line.close()

    def _answer(self, line: "_Line", question: Question, encoded: dict[int, str]) -> Reply | Abstention:
        request = self._request(question, encoded)
        schema = question.schema if self.structured and not self._refuses_schemas.is_set() else None
        outcome = line.asking.reply(request if schema is None else {**request, "response_format": _on(schema)})
        unstructured = self.structured and question.schema is not None and schema is None
        if schema is not None and isinstance(outcome, Fault) and outcome.status in _REFUSES_A_SCHEMA:
            freely = line.asking.reply(request)
            if isinstance(freely, Reply):  # so it was the schema
                self._note_refusal(outcome.reason)
                outcome, unstructured = freely, True
        if isinstance(outcome, Fault):
            self._meter.add(Usage(faults=1))
            return Abstention(outcome.reason)
        asked_freely = ("the server refused the JSON schema, so the model was asked freely",) if unstructured else ()
        return replace(outcome, remarks=(*asked_freely, *outcome.remarks))

    def _request(self, question: Question, encoded: dict[int, str]) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [self._turn(message, encoded) for message in question.messages],
            self.limit: self.max_new_tokens,
        }
        if self.temperature is not None:
            request["temperature"] = self.temperature
        return request

    def _turn(self, message: Message, encoded: dict[int, str]) -> dict[str, Any]:
        if message.image is None:
            return {"role": message.role, "content": message.text}
        if id(message.image) not in encoded:
            encoded[id(message.image)] = self._encoded(message.image)
        shown = {"type": "image_url", "image_url": {"url": encoded[id(message.image)]}}
        return {"role": message.role, "content": [shown, {"type": "text", "text": message.text}]}

    def _reduced(self, image: Image) -> Image:
        image = as_rgb(image)
        shrink = self.max_side_px / max(image.size)
        if shrink >= 1:
            return image
        width, height = (max(1, round(side * shrink)) for side in image.size)
        return image.resize((width, height), Resampling.LANCZOS)

    def _encoded(self, image: Image) -> str:
        file = io.BytesIO()
        if self.jpeg_quality is None:
            image.save(file, "PNG", compress_level=3)
        else:
            image.save(file, "JPEG", quality=self.jpeg_quality, subsampling=0)
        kind = "png" if self.jpeg_quality is None else "jpeg"
        return data_url(file.getvalue(), kind)

    @cached_property
    def _meter(self) -> Meter:
        return Meter()

    @cached_property
    def _refuses_schemas(self) -> threading.Event:
        return threading.Event()

    def _note_refusal(self, reason: str) -> None:
        if not self._refuses_schemas.is_set():
            _LOG.warning("%s refused the JSON schema and is asked freely from now on: %s", self.base_url, reason)
        self._refuses_schemas.set()


class _Line:
    """The connection of a critic to its server, for one batch."""

    def __init__(self, critic: OpenAICritic, meter: Meter) -> None:
        import openai  # noqa: PLC0415 - an extra

        self._key = critic.api_key or os.environ.get(_KEY_VARIABLE) or _NO_KEY
        self._client = openai.OpenAI(base_url=critic.base_url, api_key=self._key, max_retries=0)
        self._extra, self._timeout_s = dict(critic.extra_body), critic.timeout_s
        self._gate = Gate()
        self.asking = RetryingClient(self._send, self._gate, meter, tries=critic.tries, patience_s=critic.patience_s)

    def close(self) -> None:
        """Break off whatever is on its way."""
        self._gate.close()
        self._client.close()

    def _send(self, request: Mapping[str, Any]) -> Answered | Fault:
        import httpx2  # noqa: PLC0415 - what openai sends with; its errors come through while a body is read
        import openai  # noqa: PLC0415 - an extra

        late = Fault(f"no whole answer within {self._timeout_s:g} s", again=True)
        ends, create = time.monotonic() + self._timeout_s, self._client.chat.completions.with_streaming_response.create
        try:
            with create(**request, extra_body=self._extra, timeout=self._timeout_s) as response:
                body = b""
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > ends:
                        return late
                    if len(body) > _LARGEST_ANSWER:
                        return Fault(f"the server's answer goes on after {_LARGEST_ANSWER:,} bytes")
                return Answered(response.status_code, response.headers, body)
        except openai.APIStatusError as refusal:
            return Answered(refusal.status_code, refusal.response.headers, self._without_key(refusal.response.content))
        except (openai.APITimeoutError, httpx2.TimeoutException):
            return late
        except (openai.APIConnectionError, httpx2.RequestError) as fault:
            why = fault.__cause__ or fault
            return Fault(f"the connection failed: {type(why).__name__}: {why}", again=True)

    def _without_key(self, body: bytes) -> bytes:
        return body if self._key == _NO_KEY else body.replace(self._key.encode(), b"***")


def _on(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "critique", "strict": True, "schema": schema}}


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InvalidValueError(f"{url!r} is no address of a server: need one like 'http://127.0.0.1:8000/v1'.")
    if parts.password or parts.query:
        raise InvalidValueError("the base_url holds a password or a query, which reprs would show: use api_key.")


def _coordinates_named(model: str) -> Coordinates:
    for family, pattern in _NAMED.items():
        if re.search(pattern, model.lower()):
            return FAMILIES[family]
    raise InvalidValueError(
        f"the name {model!r} does not tell how the model writes boxes. Pass conversation=Conversation(coordinates=...), "
        "with coordinates_for(family) for a known family (fitted to its processor), or what OpenAICritic.probe finds."
    )

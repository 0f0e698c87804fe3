"""The text in a chat completion, wherever the many servers that speak OpenAI's protocol put it, or why there is none."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from artaug._internal.text import shorten
from artaug._internal.transient import RETRYABLE_STATUS
from artaug.serving.chat import ChatReply
from artaug.serving.http import HttpResponse
from artaug.serving.logprobs import parse_logprobs
from artaug.serving.usage import Usage

_MAX_EXCERPT_CHARS = 200
CUT = "the reply was cut at the limit of tokens"
"""The note on such a reply."""
_CUT_REASONS = frozenset({"length", "max_tokens", "model_length"})
_FAILED_REASONS = frozenset({"error", "abort", "network_error", "insufficient_system_resource"})
_TEXT_PARTS = frozenset({None, "text", "output_text"})  # other parts of a list are reasoning, refusals, pictures
_REASONING_FIELDS = ("reasoning_content", "reasoning")
_STATUS_FIELDS = ("code", "status", "status_code")
_STATUS_OF_TYPE = {  # where an error has no status; the types of Anthropic's and OpenAI's references
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "api_error": 500,
    "server_error": 500,
    "overloaded_error": 529,
}


@dataclass(frozen=True)
class RequestFailure:
    """Why there is no reply."""

    reason: str
    retryable: bool = False
    """Whether the same request may succeed later."""
    retry_after_s: float | None = None
    """How long the server asks to wait; None if it does not say."""
    status: int | None = None
    """The HTTP status, if there was a response; of an error in a response with status 200, the one it states."""

    def judged(self) -> Self:
        """This failure, retryable if its status is."""
        return replace(self, retryable=self.status in RETRYABLE_STATUS)


@dataclass(frozen=True)
class Completion:
    """A reply, and what the server counted for it."""

    reply: ChatReply | RequestFailure
    """A failure if the model answered without text."""
    usage: Usage


def parse_completion(response: HttpResponse) -> Completion | RequestFailure:
    """Read a response with a status of success, which may state an error all the same."""
    content_type = response.headers.get("content-type", "of no type")
    try:
        document = json.loads(response.body)
    except (ValueError, RecursionError):
        truncated = "json" in content_type  # meant to be JSON, so a second attempt may get all of it
        reason = f"the server's answer, {content_type:.80}, is no JSON: {excerpt(response.body)}"
        return RequestFailure(reason, retryable=truncated, status=200)
    if isinstance(document, list) and len(document) == 1:
        document = document[0]  # as Google's servers wrap an error
    if isinstance(document, dict) and (failure := _stated_error(document)):
        return failure
    try:
        completion = _ChatCompletion.model_validate(document)
        choice = _Choice.model_validate(completion.choices[0]) if completion.choices else None
    except ValidationError as report:
        error = report.errors()[0]
        where = ".".join(map(str, error["loc"])) or "the whole"
        return RequestFailure(
            f"the server's answer is no chat completion ({where}: {error['msg']}): {excerpt(response.body)}"
        )
    if choice is None:
        return RequestFailure("the server's chat completion has no choices", retryable=True)
    if failure := _stated_error({"error": choice.error}) or _gave_up(choice):
        return failure
    reply, logprobs = _reply(choice), parse_logprobs(choice.logprobs)
    if logprobs and isinstance(
        reply, RequestFailure
    ):  # such as a first token without text, whose odds count all the same
        reply = ChatReply("", (reply.reason,))
    if isinstance(reply, ChatReply):
        reply = replace(reply, logprobs=logprobs)
    return Completion(reply, _usage(completion.usage))


def excerpt(body: bytes) -> str:
    """The beginning of a response, quoted, for a reason."""
    return repr(shorten(" ".join(body.decode("utf-8", errors="replace").split()), _MAX_EXCERPT_CHARS))


class _CompletionMessage(BaseModel):
    content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(BaseModel):
    message: _CompletionMessage | None = None
    delta: _CompletionMessage | None = None  # of a stream
    text: Any = None  # of a completion that is no chat
    logprobs: Any = None
    finish_reason: Any = None
    error: Any = None


class _ChatCompletion(BaseModel):
    choices: list[Any] | None  # only the first is looked at: millions of wrong ones would be as many errors
    usage: Any = None


def _stated_error(document: Mapping[str, Any]) -> RequestFailure | None:
    """The error that a response with status 200 states: gateways answer before they know how their own server does."""
    error = document if document.get("object") == "error" else document.get("error")
    if not error:
        return None
    fields = error if isinstance(error, dict) else {"message": error}
    status = next((number for name in _STATUS_FIELDS if (number := _http_error(fields.get(name)))), None)
    if status is None:
        status = _STATUS_OF_TYPE.get(str(fields.get("type") or fields.get("code")))
    message = fields.get("message") or _as_json(fields)
    stated = "without a status" if status is None else status
    failure = RequestFailure(
        f"the server answered 200 with an error, {stated}: {excerpt(str(message).encode(errors='replace'))}",
        retryable=True,
        status=status,
    )
    return failure if status is None else failure.judged()


def _gave_up(choice: _Choice) -> RequestFailure | None:
    if str(choice.finish_reason).lower() not in _FAILED_REASONS:
        return None
    return RequestFailure(f"the server gave up: its finish_reason is {choice.finish_reason!r}", retryable=True)


def _http_error(code: object) -> int | None:
    number = int(code) if isinstance(code, str) and code.isdecimal() and len(code) == 3 else code
    return number if isinstance(number, int) and 400 <= number < 600 else None


def _reply(choice: _Choice) -> ChatReply | RequestFailure:
    """The text of a choice: its content, or what servers put elsewhere by mistake."""
    message, finish_reason = (
        choice.message or choice.delta or _CompletionMessage(content=choice.text),
        str(choice.finish_reason),
    )
    cut = (CUT,) if finish_reason.lower() in _CUT_REASONS else ()
    text = _joined(message.content)
    if text.strip():
        return ChatReply(text, cut)
    if refusal := _refusal(message):
        return RequestFailure(f"the model refused: {shorten(refusal, _MAX_EXCERPT_CHARS)}")
    if arguments := next(_tool_arguments(message), ""):
        return ChatReply(arguments, ("read the reply from a tool call", *cut))
    reasoning = next((text for name in _REASONING_FIELDS if (text := _joined(getattr(message, name))).strip()), "")
    if cut:  # what is in the reasoning then is a draft
        thinking = ", while the model was still reasoning" if reasoning else ""
        return RequestFailure(
            f"{CUT} before it had any text{thinking}: raise max_new_tokens, or switch the reasoning off by extra_body"
        )
    if reasoning:
        return ChatReply(reasoning, ("read the reply from the reasoning, since there was no other text",))
    return RequestFailure(f"the reply has no text; its finish_reason is {shorten(finish_reason, 60)!r}")


def _joined(content: object) -> str:
    """The text of a message's content, which is a text, an object or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else _part_text(part) for part in content)
    if isinstance(content, dict):
        return _part_text(content) or ("" if "type" in content else _as_json(content))
    return ""


def _part_text(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
        return ""
    text = part.get("text")
    text = text.get("value") if isinstance(text, dict) else text
    return text if isinstance(text, str) else ""


def _refusal(message: _CompletionMessage) -> str:
    parts = message.content if isinstance(message.content, list) else []
    stated = [message.refusal, *(part.get("refusal") for part in parts if isinstance(part, dict))]
    return next((text for text in stated if isinstance(text, str) and text.strip()), "")


def _tool_arguments(message: _CompletionMessage) -> Iterator[str]:
    """The arguments of the calls of tools: some gateways ask for JSON on a schema by way of a tool."""
    calls = message.tool_calls if isinstance(message.tool_calls, list) else []
    functions = [*(call.get("function") for call in calls if isinstance(call, dict)), message.function_call]
    for function in functions:
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if text := arguments if isinstance(arguments, str) else _as_json(arguments) if arguments else "":
            yield text


def _as_json(document: object) -> str:
    try:
        return json.dumps(document)
    except RecursionError:
        return ""


def _usage(counts: object) -> Usage:
    """The tokens that the server counted; one that it did not count does not take the other with it."""
    fields = counts if isinstance(counts, dict) else {}
    numbers = [
        int(number) if isinstance(number := fields.get(name), int | float) and 0 <= number < 2**53 else None
        for name in ("prompt_tokens", "completion_tokens")
    ]
    return Usage(replies=1, input_tokens=numbers[0] or 0, output_tokens=numbers[1] or 0, uncounted=int(None in numbers))

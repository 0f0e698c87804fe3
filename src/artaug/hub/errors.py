"""What goes wrong on the way to the Hub, in artaug's words, and never with a token in them."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined] # of the HTTP library it uses
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # public, but not re-exported

from artaug._internal.text import shorten
from artaug.errors import HubError, InvalidValueError

_ADVICE = {
    401: "Log in with `hf auth login`, or pass a token that may do this.",
    403: "This token may not do that: use one with write access to this account, or another account.",
    404: "Check the name and the revision; a private repository needs a token that may read it.",
    409: "Someone else is changing this repository. Wait a moment, and try again.",
    412: "Someone else has committed meanwhile. Look at what is there now, and try again.",
    429: "The Hub asks for patience. Try again later.",
}


def checked_name(repo: str) -> str:
    """A repository's name, if it is one.

    Raises:
        InvalidValueError: if not.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as fault:
        raise InvalidValueError(f"{repo!r} is no name of a repository: {fault} Expected 'owner/name'.") from None
    if "/" not in repo:
        raise InvalidValueError(f"{repo!r} is no name of a repository. Expected 'owner/name'.")
    return repo


@contextmanager
def in_our_words(doing: str, api: HfApi, *, again: str = "Try again.") -> Iterator[None]:
    """Turn whatever the Hub's client raises into one error.

    The client's own exceptions hold the request and with it the token, which debuggers and error reporters print; so
    they are not kept as the cause.

    Args:
        doing: what was being done, for the error's text.
        api: knows the token that is not to be told.
        again: what to do where there is no better advice.

    Raises:
        HubError: for every refusal of the Hub, and if it could not be reached.
    """
    try:
        yield
    except (TransportError, OSError, EntryNotFoundError) as fault:
        raise HubError(f"{doing} failed: {_told(fault, api, again)}", status=_status(fault)) from None
    except RuntimeError as fault:  # how the client reports an upload that broke off
        cause = fault.__cause__
        if not isinstance(cause, TransportError | OSError):
            raise
        text = f"{_short(str(fault), api)} {_told(cause, api, again)}"
        raise HubError(f"{doing} failed: {text}", status=_status(cause)) from None


def _told(fault: Exception, api: HfApi, again: str) -> str:
    status = _status(fault)
    advice = again if status is None else _ADVICE.get(status, again)
    if isinstance(fault, GatedRepoError):
        advice = "Ask for access on its page first."
    return f"{_short(str(fault) or type(fault).__name__, api)} {advice}"


def _status(fault: Exception) -> int | None:
    return fault.response.status_code if isinstance(fault, HfHubHTTPError) else None


def _short(text: str, api: HfApi, *, limit: int = 400) -> str:
    """On one line, not too long, without the token should a server have sent it back."""
    token = api.token if isinstance(api.token, str) else get_token()
    text = " ".join((text.replace(token, "(token)") if token else text).split())
    text = shorten(text, limit)
    return text if text.endswith((".", "!", "?")) else f"{text}."

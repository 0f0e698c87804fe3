"""Errors of the Hub's client as `HubError`, without the token."""

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
    429: "Too many requests. Try again later.",
}


def check_repo_id(repo: str) -> str:
    """Return a repository's name if it has the form ``owner/name``.

    Raises:
        InvalidValueError: if it does not.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InvalidValueError(f"{repo!r} is no name of a repository: {error} Expected 'owner/name'.") from None
    if "/" not in repo:
        raise InvalidValueError(f"{repo!r} is no name of a repository. Expected 'owner/name'.")
    return repo


@contextmanager
def translate_errors(action: str, api: HfApi, *, default_advice: str = "Try again.") -> Iterator[None]:
    """Raise every error of the Hub's client as a `HubError`.

    The client's exceptions hold the request and with it the token, which debuggers and error reporters print. So they
    are not kept as the cause.

    Args:
        action: what was being done, for the error's text.
        api: its token is removed from the text.
        default_advice: what to do if the status has no advice of its own.

    Raises:
        HubError: for every refusal of the Hub, and if it could not be reached.
    """
    try:
        yield
    except (TransportError, OSError, EntryNotFoundError) as error:
        raise HubError(f"{action} failed: {_describe(error, api, default_advice)}", status=_status(error)) from None
    except RuntimeError as error:  # the client's error for an upload that broke off
        cause = error.__cause__
        if not isinstance(cause, TransportError | OSError):
            raise
        text = f"{single_line(str(error), api)} {_describe(cause, api, default_advice)}"
        raise HubError(f"{action} failed: {text}", status=_status(cause)) from None


def _describe(error: Exception, api: HfApi, default_advice: str) -> str:
    status = _status(error)
    advice = default_advice if status is None else _ADVICE.get(status, default_advice)
    if isinstance(error, GatedRepoError):
        advice = "Ask for access on its page first."
    return f"{single_line(str(error) or type(error).__name__, api)} {advice}"


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def single_line(text: str, api: HfApi, *, limit: int = 400) -> str:
    """A text on one line, shortened, without the token, which a server may have sent back."""
    token = api.token if isinstance(api.token, str) else get_token()
    text = " ".join((text.replace(token, "(token)") if token else text).split())
    text = shorten(text, limit)
    return text if text.endswith((".", "!", "?")) else f"{text}."

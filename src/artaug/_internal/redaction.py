"""What must never be written to a run's folder: keys, tokens and passwords, by their names and by how they look."""

import os
import re
from types import BuiltinFunctionType, FunctionType, MethodType

_ALWAYS = {
    *("secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd", "credential", "credentials"),
    *("auth", "authorization", "bearer", "cookie", "cookies", "apikey", "apikeys", "authtoken", "accesstoken"),
}
_AT_THE_END = {"key", "keys", "token"}
"""Of ``api_key`` or ``X-Auth-Token``, not of ``max_tokens`` or ``key_format``."""
_OWNERS_OF_TOKENS = {"api", "access", "refresh", "session", "hf"}
_LONGEST_MESSAGE = 2**20
"""Bytes of a message in which secrets are recognized by their looks: pixels look like anything, sooner or later."""
_SHORTEST = 8
"""Characters of a value that is taken for a secret by how it looks."""

_NAME = re.compile(r"([\w-]+)(?:['\"]?\s*[:=]|['\"],)\s*['\"]?")
"""Of ``api_key=...``, ``{'Authorization': '...'}`` and ``('X-Auth-Token', '...')``."""
_VALUE = re.compile(r"(?:(?:bearer|basic|token)\s+)?[^\s'\",}&#]{4,}", re.IGNORECASE)
_PASSWORD_OF_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
_KEYS = r"hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|r8_|nvapi-"
_KEY = re.compile(rf"\b(?:{_KEYS})[\w\-./+=]{{{_SHORTEST},}}")
_BY_LOOKS = re.compile(rf"\b(?:{_KEYS}|Bearer |Basic )[\w\-./+=]{{{_SHORTEST},}}")


def is_secret_name(name: str, value: object) -> bool:
    """Whether something of this name is a key, token or password; a number or a function is none, whatever its name.

    >>> from artaug._internal.redaction import is_secret_name
    >>> [is_secret_name(name, "abc") for name in ("api_key", "X-Auth-Token", "openaiApiKey", "max_tokens")]
    [True, True, True, False]
    """
    if isinstance(value, bool | int | float | type | FunctionType | BuiltinFunctionType | MethodType):
        return False
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    if not words:
        return False
    return (
        words[-1] in _AT_THE_END
        or not _ALWAYS.isdisjoint(words)
        or (words[-1] == "tokens" and not _OWNERS_OF_TOKENS.isdisjoint(words))
    )


def secret_in(data: bytes) -> str | None:
    """What of a message is a secret, in words that do not tell it; None if nothing is.

    Messages hold prompts, so that words of a language are none: not "Basic watercolors", and not the value of
    ``RAY_AUTH_MODE=disabled``.

    >>> from artaug._internal.redaction import secret_in
    >>> secret_in(b"OpenAICritic(api_key='sk-0123456789abcdef')")
    "what looks like a key, 'sk-01...'"
    """
    for name, value in os.environ.items():
        is_word = value.isalpha()
        if len(value) >= _SHORTEST and not is_word and is_secret_name(name, value) and value.encode() in data:
            return f"the value of the environment variable {name}"
    looks = _KEY.search(data.decode("latin-1")) if len(data) <= _LONGEST_MESSAGE else None
    return None if looks is None else f"what looks like a key, '{looks[0][:5]}...'"


def hide_secrets(text: str) -> str:
    """The text with stars for what looks like a secret, and for the secrets of this process's environment.

    >>> from artaug._internal.redaction import hide_secrets
    >>> hide_secrets("https://me:abc@host/v1?api_key=12345&n=2")
    'https://***@host/v1?api_key=***&n=2'
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret_name(name, value):
            text = text.replace(value, "***")
    text = _BY_LOOKS.sub("***", _PASSWORD_OF_URL.sub("***@", text))
    for found in reversed(list(_NAME.finditer(text))):  # from the end on, so that the places of the others stay
        shown = _VALUE.match(text, found.end())
        if shown is not None and is_secret_name(found[1], shown[0]):
            text = f"{text[: found.end()]}***{text[shown.end() :]}"
    return text

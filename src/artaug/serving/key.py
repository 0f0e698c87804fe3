"""A server's key: checked once, sent in one header, and shown nowhere, however a server quotes it."""

import html
import re
from base64 import b64encode
from functools import cached_property
from typing import final
from urllib.parse import quote

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError

_MASK = "***"
_MIN_SECRET_CHARS = 8
_MIN_PART_CHARS = 3


@checked
@final
class ApiKey:
    """A key, without the white space around it. It shows as ``***``, and a pickle of it holds no key.

    Keys of fewer than 8 characters, such as the ``"EMPTY"`` that local servers accept, are placeholders: they are not
    hidden in texts, and stay in pickles.

    Raises:
        InvalidValueError: if it has a character that no HTTP header may have; the key is not quoted.
    """

    def __init__(self, key: str) -> None:
        key = key.strip()
        if wrong := next(((place, letter) for place, letter in enumerate(key, 1) if not "!" <= letter <= "~"), None):
            raise InvalidValueError(
                f"the api_key of {len(key)} characters has U+{ord(wrong[1]):04X} in place {wrong[0]}, which no key has: "
                "need visible ASCII characters. Copy it again."
            )
        self._key: str | None = key

    def reveal(self) -> str:
        """The key; empty for none.

        Raises:
            InvalidValueError: if the key was pickled.
        """
        if self._key is None:
            raise InvalidValueError(
                "what asks this server was pickled, without its api_key, so that no file holds it. Set OPENAI_API_KEY in "
                "every process and leave api_key out, or give the copy its key: dataclasses.replace(copy, api_key=...)."
            )
        return self._key

    def redact(self, text: str) -> str:
        """The text with ``***`` for the key, as it is or as JSON, URLs, HTML, base64 and hexadecimal numbers write it."""
        return text if self._pattern is None else self._pattern.sub(_MASK, text)

    def redact_part(self, text: str) -> str:
        """The same for one token of a text, also where it is only a part of the key: the next one may be the rest."""
        part = text.strip().lower()
        is_part = self._is_secret and len(part) >= _MIN_PART_CHARS and part in (self._key or "").lower()
        return _MASK if is_part else self.redact(text)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        if self._key is None or not self._is_secret:
            return None
        written = "".join(map(_written, self._key))
        ways = [written, *map(re.escape, _encoded(self._key.encode()))]
        return re.compile("|".join(ways), re.IGNORECASE)  # a server may quote headers in one case

    @property
    def _is_secret(self) -> bool:
        return self._key is None or len(self._key) >= _MIN_SECRET_CHARS

    def __repr__(self) -> str:
        return _MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ApiKey) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __copy__(self) -> "ApiKey":
        return self  # it never changes; by way of a pickle the copy would lose the key

    def __deepcopy__(self, memo: dict[int, object]) -> "ApiKey":
        return self

    def __getstate__(self) -> dict[str, str | None]:
        return {"_key": None if self._is_secret else self._key}


def _written(letter: str) -> str:
    """A pattern for a character: itself or an escape of JSON, a URL or HTML, perhaps escaped once more. All is bounded."""
    code = f"{ord(letter):02x}"
    ways = [
        rf"\\{{0,8}}{re.escape(letter)}",
        rf"\\{{1,8}}(?:u\{{?0{{0,4}}{code}\}}?|x{code})",
        rf"%(?:25){{0,4}}{code}",
        rf"&(?:amp;){{0,4}}#(?:0{{0,4}}{ord(letter)}|x0{{0,4}}{code});",
    ]
    if (name := html.escape(letter)) != letter:
        ways.append(rf"&(?:amp;){{0,4}}(?:{name[1:-1]}|apos);")
    return f"(?:{'|'.join(ways)})"


def _encoded(key: bytes) -> list[str]:
    """The key inside base64, of any text that has it, and as hexadecimal digits."""
    cores = []
    for before in range(3):  # base64 writes three bytes as four characters, so there are three ways to align the key
        core = b64encode(bytes(before) + key).decode()
        first, last = -(-8 * before // 6), (8 * (before + len(key))) // 6  # of characters that no other bytes reach
        cores += [core[first:last], core[first:last].translate(str.maketrans("+/", "-_"))]
    percent = [quote(core, safe="") for core in cores]
    return list(dict.fromkeys([*cores, *percent, key.hex()]))

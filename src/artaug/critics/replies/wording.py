"""The words of a reply, made fit to be drawn and shown: no control characters, no tokens of chat templates, not endless."""

import re

from artaug._internal.text import shorten
from artaug.critics.replies.repairs import Repairs

_CHAT_TOKEN = re.compile(r"<\|[^<>|\s]{1,48}\|>|<\uff5c[^<>\uff5c\s]{1,48}\uff5c>|</?s>")
_UNKNOWN = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # control characters, but for the white ones
    "\u202a-\u202e\u2066-\u2069\ufeff"  # they turn the text around them, also in a report
    "\U000e0000-\U000e007f]"  # tags: letters that nobody sees
)


def fit(words: str, *, at_most: int, repairs: Repairs, number: int | None = None) -> str:
    """Give the words on one line, cleaned and cut to ``at_most`` characters."""
    if _HALF.search(words):
        joined = words.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # where both halves are there
        if joined.count(_UNKNOWN) > words.count(_UNKNOWN):
            repairs.mend("replaced half characters", number)
        words = joined
    for unwanted, said in ((_CHAT_TOKEN, "tokens of chat templates"), (_INVISIBLE, "invisible characters")):
        words, found = unwanted.subn(" ", words)
        if found:
            repairs.mend(f"left out {said}", number)
    words = " ".join(words.split())
    if len(words) > at_most:
        repairs.mend(f"cut texts to {at_most} characters", number)
        words = words[:at_most].rstrip()
    return words


def excerpt(reply: str, *, at_most: int = 60) -> str:
    """The beginning of a reply, to be quoted in a reason."""
    words = fit(reply[: 8 * at_most], at_most=at_most + 1, repairs=Repairs())
    return repr(shorten(words, at_most))

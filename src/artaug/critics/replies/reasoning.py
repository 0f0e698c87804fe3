"""The reasoning that a model writes before its answer, and the answer without it."""

import re

_TAG = re.compile(r"<(?P<ends>/?)(?:think|thinking|reasoning)>|\u25c1(?P<also_ends>/?)think\u25b7")


def without_reasoning(reply: str) -> str:
    """What a reply says beside the model's reasoning: nothing, if it was cut before that ended.

    >>> from artaug.critics.replies.reasoning import without_reasoning
    >>> without_reasoning("<think>A cone?</think>a red cone"), without_reasoning("<think>A cone? Or")
    ('a red cone', '')
    """
    start, end = 0, len(reply)
    for tag in _TAG.finditer(reply):
        if tag["ends"] or tag["also_ends"]:
            start, end = tag.end(), len(reply)
        else:
            end = min(end, tag.start())
    return reply[start:end]

"""Edits: a multimodal model writes what is to be changed in a picture, and an editing model is handed one edit at a time."""

import re
from dataclasses import dataclass
from typing import ClassVar, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.canvas import Canvas
from artaug.critique import Abstention, Critique, Suggestion
from artaug.errors import InvalidValueError
from artaug.geometry import Box
from artaug.plan import Plan, RegionPlanner
from artaug.recipes.chat import ChatCritic, without_bullet

_LONGEST_EDIT, _MOST_EDITS = 400, 8
_FEEDBACK = re.compile(r"^[\s#*_]{0,8}feedback[ \t*_]{0,4}(?::[\s*_]{0,4}|$)", re.IGNORECASE | re.MULTILINE)
_NONE = re.compile(
    r"^\W{0,4}(?:none(?! of)|nothing|n/a|(?:there (?:is|are) )?no (?:further |more |other )?"
    r"(?:edit|change|mistake|error|issue|problem|correction|improvement)s?)\b",
    re.IGNORECASE,
)
_REGENERATE = "<REGENERATE>"
_MESSAGE = f"""\
This picture was drawn from the prompt:
{{prompt}}

Analyze the prompt: every object, its number, attributes, place and relations. Analyze the picture in the same way. Compare them, \
and list what is wrong. Then write "Feedback:" and below it one edit in a line: atomic, imperative, about one object, and clear on \
its own. Write "Feedback: none" if nothing is wrong, and {_REGENERATE} in place of edits if no edits can save the picture."""


@checked
@final
@dataclass(frozen=True)
class ChatEdits(ChatCritic):
    """A critic that plans edits in words: each suggestion is one of them, for the whole picture; its summary is all it wrote.

    It abstains from a picture that no edits can save, and from one about which the reply has no feedback.
    """

    message: ClassVar[str] = _MESSAGE

    def read(self, text: str) -> Critique | Abstention:
        """The edits, none if nothing is wrong."""
        headings = list(_FEEDBACK.finditer(text))
        feedback = text[headings[-1].end() :] if headings else ""
        if _REGENERATE in (feedback or text):
            return Abstention(f"the picture cannot be saved by edits: {text[:200]!r}")
        edits = [edit for line in feedback.splitlines() if (edit := without_bullet(line))]
        if not edits:
            return Abstention(f"the reply has no feedback: {text[:200]!r}")
        if _NONE.match(edits[0]):
            return Critique(summary=text)
        usable = [edit for edit in edits if len(edit) <= _LONGEST_EDIT][:_MOST_EDITS]
        cut = (f"used {len(usable)} of {len(edits)} edits",) if len(usable) < len(edits) else ()
        return Critique(tuple(Suggestion(Box(0, 0, 1, 1), edit) for edit in usable), text, cut)


@checked
@final
@dataclass(frozen=True)
class EditPlanner(RegionPlanner):
    """Hands an edit to an editing model: the instruction is the prompt, and the picture is the canvas.

    >>> import artaug as aa
    >>> from artaug.recipes import EditPlanner
    >>> from PIL import Image
    >>> edit = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "make the cone red"),))
    >>> EditPlanner().plan_from(Image.new("RGB", (64, 64)), "a red cone", edit).prompt
    'make the cone red'
    """

    strength: float | None = None
    """See `artaug.Canvas.strength`; None for editing models."""

    def canvas_over(self, image: Image) -> Canvas:
        return Canvas(image, strength=self.strength)

    def plan(self, prompt: str, critique: Critique) -> Plan:
        """There is no edit without the picture.

        Raises:
            InvalidValueError: always; `plan_from` gets the picture.
        """
        raise InvalidValueError("EditPlanner.plan has no picture to edit. Call plan_from(image, prompt, critique).")

    def plan_from(self, image: Image, prompt: str, critique: Critique) -> Plan:
        if not critique.suggestions:
            return Plan(prompt)
        return Plan(critique.suggestions[0].prompt, canvas=self.canvas_over(image))

"""Thoughts and reflections: a language model writes before a picture is drawn, and of the picture, what is drawn next."""

import re
from dataclasses import dataclass
from typing import ClassVar, Self, final

from artaug._internal.annotations import checked
from artaug.critique import Abstention, Critique, Suggestion
from artaug.geometry import Box
from artaug.plan import Plan, Region, RegionPlanner
from artaug.recipes.chat import LONGEST_REPLY, Chat, ChatCritic, answer_of, replied, without_bullet
from artaug.serving.chat import escape_chat_tokens
from artaug.trajectories import Thought

_WHOLE = Box(0, 0, 1, 1)
_LONGEST_PROMPT = 2000
_NOTHING = "NOTHING TO IMPROVE"
_HEADING = re.compile(
    r"^[\s#*_\d.)-]{0,12}(improvements|steps|final prompt)[\s*_]{0,4}(?:[:\uff1a][\s*_]{0,4}(.*))?$", re.IGNORECASE
)
_THINK = """\
A picture is to be drawn from this prompt:
{prompt}

First think about it between <think> and </think>: what has to be in it, how it is composed and lit, which colors, materials and \
style fit. After </think>, write one full prompt for the drawing model, and nothing else."""
_REFLECT = f"""\
This picture was drawn from the prompt:
{{prompt}}

Say in a paragraph what it lacks against the prompt and as a picture. Then, under these headings:
Improvements: what has to change, in detail: composition, light, color, texture, placement, style.
Steps: how to get there, one step in a line.
Final prompt: one full prompt for the better picture, and nothing after it.
Write as if the better picture had not been drawn. If nothing has to change, reply with {_NOTHING} alone."""


@checked
@dataclass(frozen=True, kw_only=True)
class Reflection:
    r"""A reflection on a picture in its parts: what is missing, what has to change, how, and the prompt that says it all.

    >>> from artaug.recipes import Reflection
    >>> text = "It is dark.\n**Improvements**: light\n**Steps**:\n1. add a lamp\n**Final prompt**: a cone, lit by a lamp"
    >>> Reflection.parse(text).prompt
    'a cone, lit by a lamp'
    """

    shortcomings: str
    improvements: str
    steps: tuple[str, ...]
    prompt: str

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The parts of a text by its three headings; None if it ends in no final prompt."""
        parts: dict[str, list[str]] = {"": []}
        part = ""
        for line in text[:LONGEST_REPLY].splitlines():
            if (heading := _HEADING.match(line)) is not None:
                part = heading[1].lower()
                parts[part] = [heading[2] or ""]
            else:
                parts[part].append(line)
        words = {name: "\n".join(lines).strip() for name, lines in parts.items()}
        prompt = " ".join(words.get("final prompt", "").strip("*_`\"' \n").split())
        if not prompt or len(prompt) > _LONGEST_PROMPT:
            return None
        steps = map(without_bullet, words.get("steps", "").splitlines())
        return cls(
            shortcomings=words[""],
            improvements=words.get("improvements", ""),
            steps=tuple(filter(None, steps)),
            prompt=prompt,
        )


@checked
@final
@dataclass(frozen=True)
class ChatThought:
    """Asks a language model to think about a prompt before it is drawn: ``think`` for `irg` and `artaug.refine`."""

    chat: Chat
    """Such as a `ServedChat`."""

    def __call__(self, prompt: str) -> Thought:
        """The thought, and a plan with the prompt that follows it; the prompt as it is where none does.

        A server may keep the thought to itself, and reply with the prompt alone.
        """
        reply = replied(self.chat(_THINK.format(prompt=escape_chat_tokens(prompt))))[:LONGEST_REPLY]
        thought, _, _ = reply.rpartition("</think>")
        written = " ".join(answer_of(reply).split())
        usable = 0 < len(written) <= _LONGEST_PROMPT
        return Thought(text=thought.replace("<think>", "").strip(), plan=Plan(written if usable else prompt))


@checked
@final
@dataclass(frozen=True)
class ChatReflection(ChatCritic):
    """A critic that reflects in words: its one suggestion is the final prompt, for the whole picture; its summary is all it wrote."""

    message: ClassVar[str] = _REFLECT

    def read(self, text: str) -> Critique | Abstention:
        """The reflection; without a suggestion if nothing has to change."""
        reflection = Reflection.parse(text)
        if _NOTHING in (text if reflection is None else reflection.prompt).upper():
            return Critique()
        if reflection is None:
            return Abstention(f"the reply ends in no final prompt: {text[:120]!r}")
        return Critique((Suggestion(_WHOLE, reflection.prompt, reflection.improvements),), text)


@checked
@final
@dataclass(frozen=True, kw_only=True)
class ReflectionPlanner(RegionPlanner):
    """Draws again from the newest final prompt of a reflection.

    >>> import artaug as aa
    >>> from artaug.recipes import ReflectionPlanner
    >>> critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "a lit cone"),))
    >>> ReflectionPlanner().plan("a cone", critique).prompt
    'a lit cone'
    """

    contexts: bool = False
    """Keep the prompt, with the final prompt as a region that is the whole picture: both contexts, for `ContextGuidance`."""

    @property
    def makes_regions(self) -> bool:
        return self.contexts

    def plan(self, prompt: str, critique: Critique) -> Plan:
        if not critique.suggestions:
            return Plan(prompt)
        final = critique.suggestions[0].prompt
        return Plan(prompt, (Region(_WHOLE, final),)) if self.contexts else Plan(final)

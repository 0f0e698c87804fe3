"""Prompt rewriting: a language model or a function writes a prompt that the critic would like, and a LoRA learns it back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from artaug._internal.annotations import checked
from artaug._internal.contracts import check_result
from artaug.critique import Critique
from artaug.plan import Plan, RegionPlanner
from artaug.recipes.chat import Chat, answer_of, replied
from artaug.serving.chat import escape_chat_tokens

Rewrite: TypeAlias = Callable[[str, Critique], str]
"""From a prompt and the critique of its picture to a better prompt."""
_LONGEST = 1000
"""Characters of a prompt that a model wrote; the text encoders of today read less."""
_MESSAGE = """\
You write prompts for a text-to-image model. A picture was drawn from this prompt:
{prompt}

A critic said of the picture:
{critique}

Write the prompt again so that a new picture has what the critic asks for. Keep everything that the prompt asks for now, and add \
nothing else. Reply with the new prompt alone."""


@checked
@final
@dataclass(frozen=True)
class PromptRewriter(RegionPlanner):
    """A planner that rewrites the prompt from the critique; its plans have no regions.

    Given to `enhance`, it makes pairs of one seed: drawn from the prompt, and from the prompt as rewritten. The LoRA learns to
    draw the second from the first, so that the rewriting is not needed any more.

    *From papers:* a rewriter that writes what the model prefers (UF-FGTG, arXiv 2402.12760; Promptist, 2212.09611), which they train by
    the model's pictures. *Ours:* it reads a critic's words on the very picture, is not trained, and is learned back into the model.

    >>> import artaug as aa
    >>> from artaug.recipes import PromptRewriter
    >>> PromptRewriter(lambda prompt, critique: f"{prompt}, {critique.summary}").plan("a hill", aa.Critique(summary="vivid")).prompt
    'a hill, vivid'
    """

    rewrite: Rewrite
    """Where it returns nothing but white space, the prompt stays as it is, and is skipped."""

    def plan(self, prompt: str, critique: Critique) -> Plan:
        text = check_result("rewrite", "", self.rewrite(prompt, critique), of=str, inputs=repr(prompt))
        return Plan(" ".join(text.split()) or prompt)


@checked
@final
@dataclass(frozen=True)
class ChatRewriter:
    """Asks a language model to rewrite a prompt: a ``rewrite`` for `PromptRewriter`."""

    chat: Chat
    """Such as a `ServedChat`."""

    def __call__(self, prompt: str, critique: Critique) -> str:
        """The new prompt, or nothing where the reply is longer than any prompt: the model has answered something else."""
        lines = [
            *([critique.summary] if critique.summary else []),
            *(f"- {one.prompt}{f' ({one.reason})' if one.reason else ''}" for one in critique.suggestions),
        ]
        remarks = escape_chat_tokens("\n".join(lines) or "nothing")
        message = _MESSAGE.format(prompt=escape_chat_tokens(prompt), critique=remarks)
        answer = answer_of(replied(self.chat(message)))
        return answer if len(answer) <= _LONGEST else ""

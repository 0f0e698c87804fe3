"""IRGL: trajectories as the conversations that interleaved reasoning is trained on, in six modes, and back to trajectories."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument
from artaug._internal.images import as_rgb
from artaug.critique import Abstention, Critique, Suggestion
from artaug.errors import InvalidValueError
from artaug.geometry import Box
from artaug.plan import Plan
from artaug.recipes.reflections import Reflection
from artaug.trajectories import Trajectory, Turn

IrglMode: TypeAlias = Literal[
    "initial_thinking_understanding",
    "initial_thinking_generation",
    "initial_full",
    "improving_thinking_understanding",
    "improving_thinking_generation",
    "improving_full",
]
"""What of a trajectory a conversation teaches: to think of a first picture, to draw it, to reflect on it, to draw a better one."""
IrglConversation: TypeAlias = list[str | list[dict[str, Any]]]
_MODES: tuple[IrglMode, ...] = get_args(IrglMode)
_HOW_TO_THINK = "What should be thought of before this picture is drawn?"
_HOW_TO_IMPROVE = (
    "The second picture is better than the first one. What does the first one lack, and how is it improved?"
)
_LONGEST_IMAGE = 64 * 2**20
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)


@checked
def irgl_conversations(
    trajectory: Trajectory, modes: Sequence[IrglMode] = _MODES
) -> Iterator[tuple[IrglMode, IrglConversation]]:
    """A trajectory as the conversations of IRGL-300K (arXiv 2509.06945), each with the loss flags of its mode.

    A conversation is what the column ``conversation`` holds, as JSON: a user's turn is a string, the model's turn a list of parts,
    ``{"type": "text" or "image", "content", "need_loss", "need_vae", "need_vit"}``, with PNG in base64. Texts with a loss are learned by
    cross-entropy and pictures with a loss by flow matching; pictures that are only seen go through VAE and ViT.

    *The paper's:* the six modes, what has a loss in each, the flags. *Ours:* the words of the two questions; pictures that are only seen
    stand in a turn of the model, since a user's is a string; the target of the improving modes is the next turn, where the paper has a picture of another, better model.

    Args:
        trajectory: its first thought is T1, the critique of a picture in words T2. Each turn with a critique and the next one make the
            improving modes.
        modes: those that are wanted.

    Returns:
        Mode and conversation of all that the trajectory can fill: without a thought there are no initial modes, with one turn there
        are no improving ones.

    Raises:
        InvalidValueError: for an unknown mode.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> from artaug.recipes import irgl_conversations
    >>> turn = aa.Turn(plan=aa.Plan("a red cone"), image=Image.new("RGB", (8, 8)), thought="It is plain.")
    >>> [mode for mode, _ in irgl_conversations(aa.Trajectory(prompt="a cone", turns=(turn,)))]
    ['initial_thinking_understanding', 'initial_thinking_generation', 'initial_full']
    """
    check_argument("irgl_conversations", "trajectory", trajectory, Trajectory)
    if unknown := [mode for mode in modes if mode not in _MODES]:
        expected = f"some of {', '.join(map(repr, _MODES))}"
        raise argument_error("irgl_conversations", "modes", unknown[0], expected=expected)
    prompt, first = trajectory.prompt, trajectory.turns[0]
    thought = f"<think>{first.thought}</think>"
    if first.thought:
        yield from _wanted(
            modes,
            initial_thinking_understanding=[prompt, [_seen(first)], _HOW_TO_THINK, [_text(thought)]],
            initial_thinking_generation=[prompt, [_text(thought)]],
            initial_full=[prompt, [_text(thought), _drawn(first)]],
        )
    before = [_text(thought, need_loss=False)] if first.thought else []
    for one, following in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        if not (words := _words(one.critique)):
            continue
        yield from _wanted(
            modes,
            improving_thinking_understanding=[prompt, [_seen(one), _seen(following)], _HOW_TO_IMPROVE, [_text(words)]],
            improving_thinking_generation=[prompt, [*before, _seen(one), _text(words)]],
            improving_full=[prompt, [*before, _seen(one), _text(words), _drawn(following)]],
        )


@checked
def trajectory_from_irgl(conversation: object, *, seed: int | None = None) -> Trajectory:
    """The trajectory in a conversation, whose pairs a LoRA can learn from; the other way round than `irgl_conversations`.

    Args:
        conversation: decoded from JSON, such as that of mode ``improving_full``. Its pictures become turns; a text before the first one
            is the thought, and one after a picture its critique. Of a question nothing is read; a text after one that asks about
            pictures is what came before the last of them: its thought, or the critique of the one before it.
        seed: of the pictures, if it is known.

    Raises:
        InvalidValueError: for what is no such conversation, or one without a picture.

    >>> from artaug.recipes import trajectory_from_irgl
    >>> trajectory_from_irgl(["a cone", [{"type": "text", "content": "It is plain."}]])
    Traceback (most recent call last):
    artaug.InvalidValueError: the conversation about 'a cone' has no picture.
    """
    if isinstance(conversation, str) or not isinstance(conversation, Sequence) or not conversation:
        raise argument_error("trajectory_from_irgl", "conversation", conversation, expected="a list of turns")
    prompt, *rest = conversation
    if not isinstance(prompt, str) or not prompt.strip():
        raise argument_error("trajectory_from_irgl", "conversation[0]", prompt, expected="the prompt, a text")
    turns: list[Turn] = []
    thought, plan, is_asked = "", Plan(prompt), False
    for said in rest:
        if isinstance(said, str):
            is_asked = bool(turns)
            continue
        for part in _parts(said):
            if part["type"] == "image":
                turns.append(Turn(plan=plan, image=_decoded(part["content"]), thought="" if turns else thought))
                continue
            text = part["content"].replace("<think>", "").replace("</think>", "").strip()
            number = len(turns) - 1 - is_asked  # of the picture that it is about; -1 before the first
            if number < 0:
                thought = text
                turns = [replace(turn, thought=text) for turn in turns]
                continue
            reflection = Reflection.parse(text)
            final = () if reflection is None else (_suggested(reflection),)
            plan = Plan(prompt if reflection is None else reflection.prompt)
            turns[number] = replace(turns[number], critique=Critique(final, text))
            turns[number + 1 :] = [replace(turn, plan=plan) for turn in turns[number + 1 :]]
    if not turns:
        raise InvalidValueError(f"the conversation about {prompt[:80]!r} has no picture.")
    return Trajectory(prompt=prompt, turns=tuple(turns), seed=seed, stop_reason="the conversation ended")


def _wanted(modes: Sequence[str], **conversations: IrglConversation) -> Iterator[tuple[Any, IrglConversation]]:
    return ((mode, conversation) for mode, conversation in conversations.items() if mode in modes)


def _words(critique: Critique | Abstention | None) -> str:
    """A critique in words: what was written, or its suggestions one by one."""
    if not isinstance(critique, Critique):
        return ""
    listed = (f"- {one.prompt}{f' ({one.reason})' if one.reason else ''}" for one in critique.suggestions)
    return critique.summary or "\n".join(listed)


def _suggested(reflection: Reflection) -> Suggestion:
    return Suggestion(Box(0, 0, 1, 1), reflection.prompt, reflection.improvements)


def _text(content: str, *, need_loss: bool = True) -> dict[str, Any]:
    return {"type": "text", "content": content, "need_loss": need_loss, "need_vae": False, "need_vit": False}


def _seen(turn: Turn) -> dict[str, Any]:
    return {**_drawn(turn), "need_loss": False, "need_vae": True, "need_vit": True}


def _drawn(turn: Turn) -> dict[str, Any]:
    buffer = io.BytesIO()
    as_rgb(turn.image).save(buffer, "png")
    content = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image", "content": content, "need_loss": True, "need_vae": False, "need_vit": False}


def _parts(said: Any) -> Iterator[Mapping[str, str]]:  # noqa: ANN401 - JSON
    """The checked parts of one turn of the model."""
    for part in said if isinstance(said, list) else [said]:
        fine = isinstance(part, Mapping) and part.get("type") in ("text", "image")
        if not fine or not isinstance(part.get("content"), str):
            expected = 'parts {"type": "text" or "image", "content": a text}'
            raise argument_error("trajectory_from_irgl", "conversation", part, expected=expected)
        yield part


def _decoded(content: str) -> Image.Image:
    try:
        if len(content) > _LONGEST_IMAGE:
            raise ValueError("it is longer than 64 MB")
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            return as_rgb(image)
    except _UNREADABLE as error:
        raise InvalidValueError(f"a picture of the conversation cannot be read: {error}") from None

"""A synthesizer of two models: one draws from noise, and is trained; the other one edits the pictures on canvases."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self, final

import numpy as np
from PIL.Image import Image
from torch import nn

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug._internal.images import as_rgb
from artaug.canvas import Canvas
from artaug.diffusion.synthesizer import DiffusersSynthesizer
from artaug.errors import InvalidValueError
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.synthesis import Synthesizer, draw
from artaug.training.model import DiffusionModel


@checked
@final
@dataclass(frozen=True, kw_only=True)
class EditingSynthesizer(Synthesizer):
    """Draws plans without a canvas with one model, and those with a canvas with another one, such as FLUX.1 Kontext.

    What is trained, and what a LoRA is put on, is the model that draws: it learns what the editor makes of its pictures.

    Raises:
        InvalidValueError: if one of the two is no such synthesizer, or they draw different sizes.
        ModelError: if the base only edits.
    """

    base: DiffusersSynthesizer
    """Draws plans without a canvas."""
    editor: Synthesizer
    """Draws plans with a canvas."""

    def __post_init__(self) -> None:
        check_argument("EditingSynthesizer", "base", self.base, DiffusersSynthesizer)
        check_argument("EditingSynthesizer", "editor", self.editor, Synthesizer)
        if self.base.picture_size != self.editor.picture_size:
            raise InvalidValueError(
                f"EditingSynthesizer: the base draws {self.base.picture_size} pixels and the editor {self.editor.picture_size}, "
                "and the two pictures of a pair are of one size. Set both to one width and height."
            )
        self.base.check_plan(Plan("a picture"))

    @property
    def draws_regions(self) -> bool:
        return self.base.draws_regions

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.base.picture_size

    @property
    def models(self) -> Sequence[nn.Module]:
        return [*self.base.models, *self.editor.models]

    @property
    def fingerprint(self) -> str:
        """See `DiffusersSynthesizer.fingerprint`, of the base."""
        return self.base.fingerprint

    def canvas_steps(self, canvas: Canvas) -> int:
        return self.editor.canvas_steps(canvas)

    def check_plan(self, plan: Plan) -> None:
        (self.base if plan.canvas is None else self.editor).check_plan(plan)

    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        drawn: dict[int, Image] = {}
        for synthesizer, edits in ((self.base, False), (self.editor, True)):
            members = [index for index, plan in enumerate(plans) if (plan.canvas is not None) == edits]
            if members:
                images = synthesizer.synthesize_batch(
                    [plans[index] for index in members], seeds=[seeds[index] for index in members]
                )
                drawn |= zip(members, images, strict=True)
        return [drawn[index] for index in range(len(plans))]

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        return replace(self, base=self.base.with_lora(lora, scale=scale))

    def training(self) -> AbstractContextManager[DiffusionModel]:
        """The model of the base, for a ``with`` block; see `DiffusersSynthesizer.training`."""
        return self.base.training()


@checked
def measure_shift(
    editor: Synthesizer, picture: Image, *, prompt: str = "Keep the picture exactly as it is.", seed: int = 0
) -> tuple[int, int]:
    """How far an edit that is to change nothing shifts a picture: what a LoRA would learn from such pairs with everything else.

    By phase correlation (Kuglin and Hines 1975) of the two pictures in grey.

    Args:
        editor: draws from a canvas without a strength.
        picture: as large as what it draws, with details all over.
        prompt: that asks for no change.
        seed: of the edit.

    Returns:
        Pixels to the right and down. (0, 0) is what pairs need.

    Raises:
        ModelError: if the editor cannot draw from the picture.
    """
    (edited,) = draw(editor, [Plan(prompt, canvas=Canvas(picture))], seeds=[seed])
    before, after = (np.asarray(as_rgb(image).convert("L"), float) for image in (picture, edited))
    spectrum = np.fft.fft2(after - after.mean()) * np.conj(np.fft.fft2(before - before.mean()))
    correlation = np.fft.ifft2(spectrum / np.maximum(np.abs(spectrum), 1e-9)).real
    height, width = before.shape
    down, right = (int(place) for place in np.unravel_index(correlation.argmax(), correlation.shape))
    return (right + width // 2) % width - width // 2, (down + height // 2) % height - height // 2

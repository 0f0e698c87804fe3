"""The attention maps of phrases at latents that a guide tries, and the gradient of a loss of them: what recipes move latents by."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

from artaug.errors import GuideError
from artaug.plan import Plan
from artaug.regional import AttentionProbe, AttentiveDenoiser, GuidedRun, Predict
from artaug.regional.attention_losses import sharpen
from artaug.regional.attention_probe import phrases_of

PlanPhrases: TypeAlias = Sequence[str] | Callable[[Plan], Sequence[str]]
"""Parts of the plans' prompts, or a function that gives those of each plan; a picture without any is not moved."""

MapLoss: TypeAlias = Callable[[int, Tensor, tuple[int, int]], Tensor]
"""From the number of a picture, its maps (1, phrases, image tokens) and their grid to its loss, shape (1,)."""

_PUBLISHED_TOKENS = 16 * 16
"""The maps of Stable Diffusion 1 in which both papers found what is where: 16 x 16 tokens at 512 x 512 pixels."""


@dataclass(frozen=True, eq=False)
class PhraseMaps:
    """Where phrases are in one drawing, and in which layers they are read."""

    words: Sequence[range]
    """For each picture the tokens that compete: from the first word on, without the last token."""
    phrases: Sequence[Sequence[Sequence[int]]]
    """For each picture, the tokens of each phrase."""
    layers: Sequence[int]
    """Their maps are averaged."""
    sharpness: float | None = None
    """What maps are multiplied by before a second softmax over the tokens that compete, see `sharpen`; None for none."""

    @classmethod
    def of(
        cls, run: GuidedRun, phrases: PlanPhrases, *, layers: Sequence[int] | None, sharpness: float | None = None
    ) -> Self:
        """Find phrases in the prompts of a drawing.

        Raises:
            GuideError: for a phrase that its picture's prompt does not hold, or a model whose attention cannot be read.
        """
        if not isinstance(run.denoiser, AttentiveDenoiser) or not run.token_slices:
            raise GuideError(f"the attention of a {type(run.denoiser.module).__name__} cannot be read for phrases.")
        of_pictures, words = [], []
        for plan, own in zip(run.plans, run.token_slices, strict=True):
            texts = list(phrases_of(phrases, plan) if callable(phrases) else phrases)
            *found, whole = map(tuple, run.phrase_tokens(plan.prompt, [*texts, plan.prompt]))
            if absent := [text for text, tokens in zip(texts, found, strict=True) if not tokens]:
                raise GuideError(
                    f"the phrases {absent} are not in the prompt {plan.prompt!r} as the model reads it. Expected whole words of "
                    "it; give a function of the plan where prompts differ."
                )
            words.append(range(min(whole, default=own.start), max(own.stop - 1, max(whole, default=0) + 1)))
            of_pictures.append(found)
        return cls(words, of_pictures, _layers(run.denoiser) if layers is None else layers, sharpness)

    def loss_and_gradient(self, loss: MapLoss, latents: Tensor, predict: Predict) -> tuple[Tensor, Tensor]:
        """The loss of each picture, 0 for one without phrases, and its gradient, which goes to its own latents alone."""
        received: list[Tensor] = []
        wanted = latents.detach().requires_grad_()
        tokens = range(min(words.start for words in self.words), max(words.stop for words in self.words))
        predict(
            wanted,
            AttentionProbe(
                phrases=tokens, receive=lambda maps: received.append(maps.mean()), layers=self.layers, over="prompt"
            ),
        )
        (maps,) = received
        grid = (maps.shape[2], maps.shape[3])
        losses = []
        for number, (words, phrases) in enumerate(zip(self.words, self.phrases, strict=True)):
            if not phrases:
                losses.append(maps.new_zeros(1))
                continue
            own = maps[number : number + 1, words.start - tokens.start : words.stop - tokens.start].flatten(2)
            if self.sharpness is not None:
                own = sharpen(own, scale=self.sharpness)
            of_phrases = [own[:, [token - words.start for token in phrase]].sum(dim=1) for phrase in phrases]
            losses.append(loss(number, torch.stack(of_phrases, dim=1), grid))
        values = torch.cat(losses)
        if not values.requires_grad:  # no picture has phrases
            return values, torch.zeros_like(latents)
        (gradient,) = torch.autograd.grad(values.sum(), wanted)
        return values.detach(), gradient


def _layers(denoiser: AttentiveDenoiser) -> list[int]:
    """Those whose maps are nearest in size to the published ones: all of them where all are of one size."""
    sizes = {site.block: math.prod(site.grid or denoiser.token_grid) for site in denoiser.sites if site.kind != "text"}
    nearest = min(sizes.values(), key=lambda size: abs(math.log(size / _PUBLISHED_TOKENS)))
    return [block for block, size in sizes.items() if size == nearest]


def per_picture(values: Tensor, latents: Tensor) -> Tensor:
    """One value for each picture, shaped to multiply its latents."""
    return values.to(latents).reshape(-1, *[1] * (latents.ndim - 1))

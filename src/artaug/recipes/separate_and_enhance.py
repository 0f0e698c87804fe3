"""Separate-and-Enhance: fine-tuning of the text's keys until no two things share attention, and none is without."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument, check_items
from artaug._internal.prompts import check_disjoint, check_prompts
from artaug.errors import InvalidValueError
from artaug.plan import Plan
from artaug.recipes.draws import RecipeFolder
from artaug.regional.attention_losses import enhance_loss, separate_loss
from artaug.regional.attention_probe import AttentionMaps
from artaug.run.checking import as_trainable
from artaug.synthesis import Synthesizer
from artaug.training import AttentionObjective, DifferentialLoRATrainer, TrainingPrompt, TrainingResult

TEXT_KEYS = r"attn2\.to_k|add_k_proj"
"""The layers that make keys of text: of a UNet's cross-attention, and of the joint attention of MMDiTs with a projection for
text. A stream of text and picture together (FLUX's single blocks, Z-Image) has no keys of its own for text."""
_TOKENS = 16 * 16
_LATENT_STD = 0.18215


@checked
@dataclass(frozen=True, kw_only=True)
class SeparateAndEnhance:
    """The loss of Separate-and-Enhance, for `AttentionObjective` with ``heads=True``.

    >>> import artaug as aa
    >>> from artaug.recipes import SeparateAndEnhance
    >>> aa.AttentionObjective(phrases=["cat", "dog"], attention_loss=SeparateAndEnhance(), heads=True).heads
    True
    """

    separate: float = 1.0
    """Weight of the worst overlap of two phrases, over heads and image tokens."""
    enhance: float = 0.5
    """Weight of how far the most neglected phrase is from a peak of 1."""

    def __call__(self, maps: AttentionMaps, _plans: Sequence[Plan]) -> Tensor:
        """The loss of each row, shape (rows,), in the maps of the layers whose grid is nearest to 16 by 16 tokens."""
        grids = sorted({layer.grid for layer in maps.layers})
        grid = min(grids, key=lambda grid: abs(math.log(math.prod(grid) / _TOKENS)))
        of_grid = torch.stack([layer.maps for layer in maps.layers if layer.grid == grid]).mean(dim=0)
        loss = self.enhance * enhance_loss(of_grid, grid)
        if of_grid.shape[1] == 1:
            return loss
        overlaps = [separate_loss(of_grid[:, list(pair)]) for pair in combinations(range(of_grid.shape[1]), 2)]
        return loss + self.separate * torch.stack(overlaps).amax(dim=0)


@dataclass(frozen=True)
class _Things:
    """What each prompt has, by the prompt; nothing for those that are to stay as they are."""

    by_prompt: Mapping[str, Sequence[str]]

    def __call__(self, plan: Plan) -> Sequence[str]:
        return self.by_prompt.get(plan.prompt, ())


@checked
def sepen(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Mapping[str, Sequence[str]],
    *,
    synthesizer: Synthesizer,
    trainer: DifferentialLoRATrainer,
    preserved: Sequence[str] = (),
    loss: SeparateAndEnhance = SeparateAndEnhance(),
    preserve: float = 1.0,
    targets: str = TEXT_KEYS,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Teach a model to draw all things of a prompt, by its attention alone (Separate-and-Enhance, arXiv 2312.06712).

    For one prompt, at test time: train on it, and draw it with the LoRA. For many: prompts of the same kind, and prompts of one thing
    each that are to stay as they are. No picture is drawn or needed for it.

    *The paper's:* both losses and their weights, maps of 16 by 16 tokens with heads apart, noise in the place of latents, keys of
    cross-attention alone (with values as well the model collapses; queries do next to nothing), and a norm term on prompts of
    one thing, in training on many prompts. Its settings: AdamW with a weight decay of 0.01, clipped at 1, batches of 4, a constant rate: 8e-6
    for 200 steps of one prompt; 4e-6 for 10,000 steps of many. *Ours:* an adapter in place of the weights (`FullRank` is the same);
    one step for both kinds of prompts, which the paper takes in turns; the worst of all pairs where a prompt has more than two
    things; MMDiTs, whose maps are normalized over the prompt. The released code reads half of a batch, and other tokens than those of its
    nouns; this reads all of both.

    Args:
        prompts: what to learn, and the things in each, two or more, as they are in its words: ``{"a cat and a dog": ["cat", "dog"]}``.
        synthesizer: gives its model to the trainer, at the size that it draws.
        trainer: learns; ``objective`` and ``targets`` replace its own.
        preserved: prompts whose predictions stay as they are; as many as prompts is a good number.
        loss: the weights of its two parts.
        preserve: weight of the norm term, of ``preserved``. The paper's code has 1 by default, and 0.5 in its large training.
        targets: of the trainer.
        seed: of the training.
        folder: keeps the training: the same call on the same folder goes on where it stopped.
        progress: show a progress bar.

    Raises:
        PromptError: if there are no prompts, one is blank, or one is also preserved.
        InvalidValueError: if an argument is of another type or out of its range, or a prompt does not hold its things.

    Example:
        >>> import artaug as aa
        >>> from artaug import playground
        >>> from artaug.recipes import sepen
        >>> result = sepen(
        ...     {"a red cone on the left and a blue ball on the right": ["red cone", "blue ball"]},
        ...     synthesizer=playground.synthesizer(),
        ...     trainer=aa.DifferentialLoRATrainer(adapter=aa.FullRank(), steps=2, batch_size=1),
        ...     progress=False,
        ... )
        >>> len(result.losses)
        2
    """
    _check(prompts, synthesizer, trainer, preserved, loss)
    objective = AttentionObjective(
        phrases=_Things({prompt: tuple(things) for prompt, things in prompts.items()}),
        attention_loss=loss,
        preserve=preserve if preserved else 0.0,
        latent_std=_LATENT_STD,
        heads=True,
        over="prompt",
    )
    samples = [TrainingPrompt(prompt=prompt, size=synthesizer.picture_size) for prompt in [*prompts, *preserved]]
    return replace(trainer, objective=objective, targets=targets).train(
        samples,
        as_trainable(synthesizer),
        seed=seed,
        checkpoints=RecipeFolder(folder).checkpoints(1),
        progress=progress,
    )


def _check(
    prompts: Mapping[str, Sequence[str]],
    synthesizer: Synthesizer,
    trainer: DifferentialLoRATrainer,
    preserved: Sequence[str],
    loss: SeparateAndEnhance,
) -> None:
    """Refuse what can be known to be wrong before the first step."""
    if not isinstance(prompts, Mapping):
        raise argument_error("sepen", "prompts", prompts, expected="a dict of prompts with the things in each")
    check_prompts(list(prompts))
    for prompt, things in prompts.items():
        check_items("sepen", f"prompts[{prompt!r}]", things, str)
        if len(things) < 2:
            raise InvalidValueError(
                f"sepen: the prompt {prompt!r} has {len(things)} thing(s), and two or more are kept apart. Give prompts of one "
                "thing as preserved."
            )
    check_items("sepen", "preserved", preserved, str)
    check_disjoint(
        preserved, list(prompts), owner="sepen(preserved=...)", are="to be learned", why="One cannot change and stay."
    )
    for name, value, of in (
        ("synthesizer", synthesizer, Synthesizer),
        ("trainer", trainer, DifferentialLoRATrainer),
        ("loss", loss, SeparateAndEnhance),
    ):
        check_argument("sepen", name, value, of)

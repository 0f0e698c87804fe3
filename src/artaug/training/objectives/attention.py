"""A loss of attention maps, in training: alone, or beside another objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_items
from artaug._internal.contracts import contract_error
from artaug._internal.text import short_repr
from artaug.errors import InvalidValueError, ModelError
from artaug.plan import Plan
from artaug.regional.attention_probe import AttentionMaps, AttentionProbe
from artaug.regional.denoiser import Conditioning
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.objectives.base import Companion, Objective, PromptBatch, Student, StudentWrapper, compute_loss
from artaug.training.objectives.losses import check_range, mean_squared_errors

AttentionLoss: TypeAlias = Callable[[AttentionMaps, Sequence[Plan]], Tensor]
"""Of maps, and of what each row of them shows (`artaug.training.PromptBatch.plans`): a value for each row, shape (rows,). All
rows have equally many phrases."""


@checked
@final
@dataclass(frozen=True, kw_only=True)
class AttentionObjective(Objective):
    """A loss of the attention that image tokens pay to phrases of the prompt, through the student, with gradient.

    In a UNet the maps are those of cross-attention, in an MMDiT those of joint attention; see `AttentionProbe`, which reads
    them, and ``artaug.regional.attention_losses`` for published losses. The loss of a batch of n rows is::

        objective(batch) + weight / n * sum over rows with phrases of attention_loss
                         + preserve / n * sum over rows without of mean (student - teacher)^2

    Without ``objective``, no picture is read: pairs are noised as they are (`artaug.training.PromptBatch.noisy`), and `TrainingPrompt`, which have none,
    are noise at every level. With one, its own predictions are read, no further one is made, and their losses of attention are averaged.

    Raises:
        InvalidValueError: for a field of another type or out of its range.

    >>> import artaug as aa
    >>> from artaug.regional.attention_losses import separate_loss
    >>> apart = aa.AttentionObjective(
    ...     phrases=["red cone", "blue ball"], attention_loss=lambda maps, plans: separate_loss(maps.mean().flatten(2))
    ... )
    >>> apart.reads_pictures
    False
    """

    phrases: Sequence[str] | Callable[[Plan], Sequence[str]]
    """Parts of the prompts, or a function of what a pair shows (`artaug.training.PromptBatch.plans`) that gives its own, possibly none. A prompt that
    does not hold its phrases is refused before the training."""
    attention_loss: AttentionLoss
    """Of the maps of rows with phrases."""
    objective: Objective | None = None
    """What else is minimized, by the same predictions."""
    weight: float = 1.0
    """Of the loss of attention."""
    preserve: float = 0.0
    """Of the distance from the teacher's predictions in rows without phrases: what is to stay as it is (the norm term of
    Separate-and-Enhance). Costs a prediction of the teacher. With an ``objective``, which learns from all rows, it is 0."""
    latent_std: float = 1.0
    """The standard deviation of the latents in the place of pictures, see `artaug.training.PromptBatch.noisy`."""
    layers: Sequence[int] | None = None
    """As of `AttentionProbe`."""
    heads: bool = False
    """As of `AttentionProbe`."""
    over: Literal["sequence", "prompt"] = "sequence"
    """As of `AttentionProbe`."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if self.objective is not None and type(self.objective).training_plan is not Objective.training_plan:
            raise InvalidValueError(
                f"AttentionObjective(objective={self.objective}): expected an objective with a loss alone, without a training plan "
                "of its own."
            )
        for name in ("weight", "preserve", "latent_std"):
            check_range(self, name, least=0)
        if self.objective is not None and self.preserve:
            raise InvalidValueError(
                f"AttentionObjective(preserve={self.preserve}, objective={self.objective!r}): the objective says what is learned "
                "from pairs without phrases. Leave preserve out; an ImagePair.unchanged is kept as it is by PairedDifference."
            )
        if not callable(self.phrases):
            check_items("AttentionObjective", "phrases", self.phrases, str)
        probe = self._probe([])  # which checks its own fields
        object.__setattr__(self, "layers", probe.layers)  # a list as a tuple
        if not callable(self.phrases):
            object.__setattr__(self, "phrases", tuple(self.phrases))

    @property
    def reads_pictures(self) -> bool:
        return self.objective is not None and self.objective.reads_pictures

    @property
    def reads_own_noise(self) -> bool:
        return self.objective is not None and self.objective.reads_own_noise

    @property
    def extra_noise(self) -> int:
        return 0 if self.objective is None else self.objective.extra_noise

    @property
    def negative_prompt(self) -> str | None:
        return None if self.objective is None else self.objective.negative_prompt

    @property
    def companion(self) -> Companion | None:
        return None if self.objective is None else self.objective.companion

    @property
    def decodes(self) -> bool:
        return self.objective is not None and self.objective.decodes

    def phrases_of(self, plan: Plan) -> Sequence[str]:
        if not callable(self.phrases):
            return self.phrases
        phrases = self.phrases(plan)
        check_items("AttentionObjective", "phrases of a plan", phrases, str)
        if not phrases and self.objective is None and not self.preserve:
            raise InvalidValueError(
                f"AttentionObjective(phrases=...) gives no phrases of {plan.prompt!r}, so nothing would be learned from it. Leave "
                "the prompt out, or set preserve."
            )
        return phrases

    def check(self, noise_schedule: NoiseSchedule) -> None:
        if self.objective is not None:
            self.objective.check(noise_schedule)

    def loss(self, model: Student, batch: PromptBatch) -> Tensor:
        if len(batch.plans) != len(batch.sigmas):
            raise ModelError(
                f"a batch of {len(batch.sigmas)} rows has {len(batch.plans)} plans, so the phrases of its prompts are not known. "
                "Expected one for each row, as in a batch that a trainer has made."
            )
        is_read = [bool(self.phrases_of(plan)) for plan in batch.plans]
        received: list[AttentionMaps] = []
        student = _ProbedStudent(model, self._probe(received), batch.plans) if any(is_read) else model
        if self.objective is not None:
            loss = compute_loss(self.objective.loss, student, batch)
        else:
            noisy = batch.noisy(model.noise_schedule, latent_std=self.latent_std)
            prediction = student.predict(noisy, batch.sigmas, batch.conditioning)
            loss = torch.zeros((), device=prediction.device)
            if self.preserve:  # whatever the rows: in a sharded model all processes make the same predictions
                teacher = model.teacher_predict(noisy, batch.sigmas, batch.conditioning)
                errors = mean_squared_errors(prediction, teacher)  # (batch,)
                loss = loss + self.preserve * errors[[not read for read in is_read]].sum() / len(errors)
        for maps in received:
            loss = loss + self.weight * self._attention_losses(maps, batch.plans) / (len(received) * len(batch.sigmas))
        return loss

    def _attention_losses(self, maps: AttentionMaps, plans: Sequence[Plan]) -> Tensor:
        """The sum over rows, which are computed together where they have equally many phrases."""
        total = torch.zeros((), device=maps.layers[0].maps.device)
        for count in sorted({len(phrases) for phrases in maps.phrases} - {0}):
            rows = [row for row, phrases in enumerate(maps.phrases) if len(phrases) == count]
            values: object = self.attention_loss(_of_rows(maps, rows, count), [plans[row] for row in rows])
            if not isinstance(values, Tensor) or values.shape != (len(rows),):
                received = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
                raise contract_error(
                    "AttentionObjective",
                    "attention_loss",
                    received=received,
                    inputs=f"maps of {len(rows)} rows with {count} phrases",
                    expected=f"a value for each row, shape ({len(rows)},)",
                )
            total = total + values.sum()
        return total

    def _probe(self, received: list[AttentionMaps]) -> AttentionProbe:
        phrases = self.phrases_of if callable(self.phrases) else self.phrases
        return AttentionProbe(
            phrases=phrases, receive=received.append, layers=self.layers, heads=self.heads, over=self.over
        )


def _of_rows(maps: AttentionMaps, rows: Sequence[int], count: int) -> AttentionMaps:
    """The maps of some rows, which have ``count`` phrases."""
    return AttentionMaps(
        maps.call,
        tuple(maps.phrases[row] for row in rows),
        tuple(replace(layer, maps=layer.maps[list(rows), :count]) for layer in maps.layers),
    )


@dataclass(frozen=True, eq=False)
class _ProbedStudent(StudentWrapper):
    """A student whose predictions are probed."""

    probe: AttentionProbe
    plans: Sequence[Plan]

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        if scale != 1:
            raise ModelError(
                f"the objective predicts at {scale:g} times the update, and attention is read at 1. Give AttentionObjective another "
                "objective."
            )
        return self.predict_guided(noisy, sigmas, conditioning, guide=self.probe, plans=self.plans)

"""The trainer of words: embedding rows of the text encoders (textual inversion), alone or with a LoRA beside them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count, check_finite_number
from artaug._internal.digests import digest
from artaug._internal.fingerprints import module_fingerprint
from artaug._internal.text import short_repr
from artaug.errors import InvalidValueError, ModelError, NothingToLearnError, TokensError, TrainingDivergedError
from artaug.identity import identity_of
from artaug.lora.lora import LoRA
from artaug.regional.denoiser import Conditioning
from artaug.synthesis import picture_seeds
from artaug.tokens import InstalledTokens, Tokens
from artaug.training.adapters import AdapterTensors, PlainLoRA
from artaug.training.batches import EncodedPairs, StepBatch, init_generator, with_distribution
from artaug.training.config import ATTENTION_AND_MLP, TrainingConfig
from artaug.training.distributed import World
from artaug.training.encoding import find_phrases
from artaug.training.injection import inject_adapter
from artaug.training.learners import AdapterStudent, Roles
from artaug.training.loss_scale import computes_in_float16
from artaug.training.model import DiffusionModel, ReadsTokens, Trainable
from artaug.training.noise_schedule import Latents, Sigmas
from artaug.training.objectives import Loss, Objective, SupervisedFineTuning, compute_loss
from artaug.training.objectives.base import StudentWrapper
from artaug.training.optimizers import AdamW, Optimizer, Schedule
from artaug.training.progress import ProgressLog, StepEvent
from artaug.training.samples import TrainingSample, check_needs, check_samples, sample_digest
from artaug.training.state import Checkpoints, TrainingState

_ROWS = "tokens"
"""Where a checkpoint has the rows, among the layers of a LoRA."""


@checked
@dataclass(frozen=True, kw_only=True)
class TokenTrainingResult:
    """The result of a training of words."""

    tokens: Tokens
    lora: LoRA | None
    """What was learned beside them, if the trainer has a ``rank``."""
    losses: tuple[float, ...] = field(repr=False)
    """The loss of every step."""
    seconds: float
    """Wall-clock time, of all its runs if it was resumed."""


@checked
@dataclass(frozen=True, kw_only=True)
class TokenTrainer:
    """Learns the embedding rows of words (textual inversion, arXiv 2208.01618), and with a ``rank`` a LoRA beside them.

    Text encoders and denoiser are frozen; the gradient reaches the rows through them, by any `Objective`. The same seed gives the
    same rows, bit for bit on a CPU, also if the training was killed and resumed. An objective's teacher is the model with the rows as
    they were at the start, without the LoRA.

    Raises:
        InvalidValueError: for a value out of its range.

    >>> import artaug as aa
    >>> aa.TokenTrainer(steps=100).norm_pull
    0.1
    """

    objective: Objective = field(default_factory=SupervisedFineTuning)
    """By default the loss of textual inversion: predict what the noisy picture was made of."""
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 5e-3
    """Of the rows; high, since there are so few of them."""
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = Schedule.CONSTANT
    warmup: float = 0.0
    """Part of the steps in which the learning rate rises linearly, in [0, 1]."""
    norm_pull: float = 0.1
    """After each step, a row is multiplied by ``(m / |row|) ** norm_pull`` with the mean norm ``m`` of the vocabulary's rows, in [0, 1]:
    rows that grow are read as nothing but themselves. diffusers' scripts of pivotal tuning pull the standard deviation so, by 0.1;
    its plain script of textual inversion does not: 0."""
    max_grad_norm: float = 1.0
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level to train at."""
    logit_normal: bool = False
    """As of `artaug.training.TrainingConfig`."""
    own_noise: bool = False
    """As of `artaug.training.TrainingConfig`."""
    rank: int | None = None
    """Of a LoRA that learns beside the rows; None for none."""
    targets: str = ATTENTION_AND_MLP
    """Of the LoRA: regular expression, searched for in the paths of linear layers."""
    lora_learning_rate: float = 1e-4
    """Of the LoRA."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.rank is not None:
            check_count(name, "rank", self.rank)
        check_finite_number(name, "norm_pull", self.norm_pull)
        if not 0 <= self.norm_pull <= 1:
            raise InvalidValueError(f"{name}(norm_pull={self.norm_pull!r}): need a number in [0, 1].")
        replace(self._config, learning_rate=self.lora_learning_rate)  # which checks all its fields

    @property
    def _config(self) -> TrainingConfig:
        """The settings of the rows, as batches and learning rates are made from them."""
        return TrainingConfig(
            rank=self.rank or 1,
            steps=self.steps,
            batch_size=self.batch_size,
            echo=1,
            learning_rate=self.learning_rate,
            targets=self.targets,
            objective=self.objective,
            optimizer=self.optimizer,
            schedule=self.schedule,
            warmup=self.warmup,
            max_grad_norm=self.max_grad_norm,
            sigma_range=self.sigma_range,
            logit_normal=self.logit_normal,
            own_noise=self.own_noise,
        )

    def train(
        self,
        pairs: Sequence[TrainingSample],
        synthesizer: Trainable,
        *,
        tokens: Tokens,
        seed: int,
        checkpoints: Checkpoints | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        progress: bool = True,
    ) -> TokenTrainingResult:
        """Learn words from the pictures after of pairs, or from whatever the objective reads. The model is as before afterwards.

        Args:
            pairs: whose prompts use the words; as of `artaug.DifferentialLoRATrainer.train`.
            synthesizer: lends the model. Its LoRAs, and words that it has already, stay as they are.
            tokens: the words, and the rows to begin with: `artaug.diffusion.DiffusersSynthesizer.new_tokens`.
            seed: decides the order of the pairs, the noise, and the start of the LoRA.
            checkpoints: where to write the state of the training; if its own checkpoints are there, it goes on from the newest.
            on_step: called after every step; an exception it raises ends the training.
            progress: show a progress bar.

        Raises:
            NothingToLearnError: if there is no pair.
            TokensError: if a word occurs in no prompt, the model knows it already, or rows are as wide as none of its embeddings.
            InvalidValueError: if the objective has several stages or groups, or lacks what it reads of the pairs; in several processes.
            ModelError: if the model cannot learn words, computes in float16, or cannot minimize the objective.
            LoRAMismatchError: if ``targets`` selects no layer.
            StorageError: if a checkpoint cannot be written or belongs to another training.
            TrainingDivergedError: if a loss or its gradient is not finite; that step is not taken.
        """
        check_samples(pairs)
        if not pairs:
            raise NothingToLearnError("received 0 pairs, and training needs at least one.")
        check_argument("train", "synthesizer", synthesizer, Trainable)
        check_argument("train", "tokens", tokens, Tokens)
        check_argument("train", "checkpoints", checkpoints, Checkpoints, optional=True)
        check_needs(pairs, self.objective, own_noise=self.own_noise)
        if unused := [word for word in tokens.words if not any(word in pair.prompt for pair in pairs)]:
            raise TokensError(
                f"the words {unused} occur in none of the {len(pairs)} prompts (first: {pairs[0].prompt!r}), so nothing would be "
                "learned of them. Write them into the prompts, or leave them out: tokens.only(...)."
            )
        loss = self._loss(len(pairs))
        (batch_seed,) = picture_seeds(seed, 1)
        with synthesizer.training() as model:
            readable = _as_reader(model)
            with readable.installed(tokens) as installed, self._student(model, batch_seed) as student:
                self.objective.check(model.noise_schedule)
                with_distribution(model.noise_schedule, self._config)
                find_phrases(model, pairs, self.objective)
                fingerprint: Mapping[str, str] = {}  # without checkpoints, nothing is compared
                if checkpoints is not None:
                    weights = f"{module_fingerprint(model.module)} {synthesizer.fingerprint}"
                    fingerprint = {**self._fingerprint(pairs, tokens, seed), "model": weights}
                state = None if checkpoints is None else checkpoints.latest(run_fingerprint=fingerprint)
                with torch.no_grad():  # before a checkpoint is restored: this is what the teacher reads
                    encoded = EncodedPairs.encode(
                        model, pairs, micro_batch_size=self.batch_size, objective=self.objective
                    )
                learning = _Learning(
                    self._config, self.lora_learning_rate, self.norm_pull, readable, installed, student
                )
                state = state or TrainingState()
                learning.restore(state)
                with ProgressLog(self.steps, on_step, initial=state.step, seconds=state.seconds, show=progress) as log:
                    steps = range(state.step + 1, self.steps + 1)
                    indices = [step - 1 for step in steps]
                    batches = encoded.batches(model, range(len(pairs)), self._config, seed=batch_seed, indices=indices)
                    for step, batch in zip(steps, batches, strict=True):
                        event = learning.step(batch, loss, number=step)
                        state = replace(state, step=step, losses=(*state.losses, event.loss))
                        log.log_step(
                            step,
                            loss=event.loss,
                            gradient_norm=event.gradient_norm,
                            learning_rate=event.learning_rate,
                            pairs=self.batch_size,
                        )
                        if checkpoints is not None and (step % checkpoints.every == 0 or step == self.steps):
                            state = learning.saved(replace(state, seconds=log.seconds))
                            checkpoints.write(state, run_fingerprint=fingerprint)
                    return TokenTrainingResult(
                        tokens=installed.tokens(),
                        lora=None if self.rank is None else student.to_lora(),
                        losses=state.losses,
                        seconds=log.seconds,
                    )

    def _loss(self, pairs: int) -> Loss:
        """The loss of the objective's only stage."""
        plan = self.objective.training_plan(pairs)
        if len(plan.groups) > 1 or len(plan.stages) > 1:
            raise InvalidValueError(
                f"{self.objective!r} trains in {len(plan.groups)} groups of {len(plan.stages)} stages, each with a LoRA of its own, "
                "and words are learned in one go. Expected an objective with a loss alone."
            )
        if plan.stages[0].companion is not None:
            raise InvalidValueError(
                f"{self.objective!r} brings a companion, which learns beside a LoRA, and {type(self).__name__} trains none for it. "
                "Expected an objective without one."
            )
        if World.current().size > 1:
            raise InvalidValueError(
                f"{type(self).__name__} learns in one process, and there are {World.current().size}. Start it without accelerate launch."
            )
        return plan.stages[0].loss

    @contextmanager
    def _student(self, model: DiffusionModel, seed: int) -> Iterator[AdapterStudent]:
        if computes_in_float16(model.module, model.device):
            raise ModelError(
                "rows are learned through a model of bfloat16 or float32, and this one computes in float16."
            )
        if self.rank is None:
            yield AdapterStudent(model=model, adapter=PlainLoRA(), wrapped={}, trained={}, roles=Roles({}, {}, {}))
            return
        with inject_adapter(model, rank=self.rank, targets=self.targets, generator=init_generator(seed, 0)) as student:
            yield student

    def _fingerprint(self, pairs: Sequence[TrainingSample], tokens: Tokens, seed: int) -> dict[str, str]:
        """What decides the result beside the model, by name: a training is resumed only if all of it is the same."""
        reads_seeds = self.own_noise or self.objective.reads_own_noise
        return {
            **identity_of(self, "trainer"),
            "seed": str(seed),
            "tokens": tokens.digest,
            "pairs": digest(
                *(sample_digest(pair) for pair in pairs), *(str(pair.seed) for pair in pairs if reads_seeds)
            ),
        }


@dataclass(frozen=True)
class _StepNumbers:
    """What is reported of a step."""

    loss: float
    gradient_norm: float
    learning_rate: float


class _Learning:
    """The rows and the LoRA, and the optimizer of each."""

    def __init__(
        self,
        config: TrainingConfig,
        lora_learning_rate: float,
        norm_pull: float,
        reader: ReadsTokens,
        installed: InstalledTokens,
        student: AdapterStudent,
    ) -> None:
        self._config, self._norm_pull = config, norm_pull
        self._reader, self._installed, self._student = reader, installed, student
        rows = list(installed)
        for parameter in rows:
            parameter.requires_grad_()
        self._parameters: list[nn.Parameter] = [*rows, *student.parameters()]
        self._rates = {_ROWS: config.learning_rate, "lora": lora_learning_rate}
        parameters: dict[str, list[nn.Parameter]] = {_ROWS: rows, "lora": student.parameters()}
        self._optimizers = {
            name: config.optimizer.build(parameters[name], learning_rate=self._rates[name])
            for name in self._rates
            if parameters[name]
        }

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Go on from a state; one without steps is where training begins."""
        if not state.step:
            return
        layers = dict(state.adapter)
        for encoder, rows in layers.pop(_ROWS).items():
            self._installed.parameters[encoder].copy_(rows)
        self._student.load(layers)
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state.optimizer[name])

    def saved(self, state: TrainingState) -> TrainingState:
        """The state with everything that `restore` needs."""
        rows = {name: rows.detach().cpu().clone() for name, rows in self._installed.parameters.items()}
        adapter: dict[str, AdapterTensors] = {_ROWS: rows, **self._student.tensors()}
        optimizers = {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        return replace(state, adapter=adapter, optimizer=optimizers)

    def step(self, batch: StepBatch, loss: Loss, *, number: int) -> _StepNumbers:
        """Take one step: gradient, clipping, both optimizers, the pull to the norm of the vocabulary."""
        factor = self._config.learning_rate_at(number, steps=self._config.steps) / self._config.learning_rate
        for name, optimizer in self._optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = factor * self._rates[name]
        student = self._student.with_model(batch.model)
        (micro_batch,) = batch.micro_batches
        with torch.enable_grad(), student.steering.until_backward():
            learned = self._reader.encode_differentiably([plan.prompt for plan in micro_batch.plans])
            if not any(column.requires_grad for column in learned.values()):
                raise ModelError(
                    f"{type(self._reader).__name__}.encode_differentiably returned no tensor with gradient: the rows of the words "
                    "do not reach the denoiser. Expected it to encode with the text encoders that the words are installed in."
                )
            token_student = _TokenStudent(student, learned, micro_batch.conditioning)
            value = compute_loss(loss, token_student, replace(micro_batch, conditioning=learned))
            value.backward()
        loss_value = value.item()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm).item()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            raise TrainingDivergedError(number, loss_value, gradient_norm=norm)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self._pull()
        return _StepNumbers(loss_value, norm, factor * self._config.learning_rate)

    @torch.no_grad()
    def _pull(self) -> None:
        for encoder, rows in self._installed.parameters.items():
            if self._norm_pull:
                norms = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
                rows.mul_((self._installed.mean_norms[encoder] / norms) ** self._norm_pull)


@dataclass(frozen=True, eq=False)
class _TokenStudent(StudentWrapper):
    """A student that reads the words as they are, and whose teacher reads them as they were."""

    learned: Conditioning
    """The prompts of the batch, encoded with the rows as they are."""
    initial: Conditioning
    """Encoded with the rows that training began with."""

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        if scale != 1:
            raise ModelError(
                f"the objective predicts at {scale:g} times what is learned, and the rows of a word have no scale. Train the words with "
                "another objective."
            )
        return self.student.predict(noisy, sigmas, conditioning)

    def teacher_predict(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, with_gradient: bool = False
    ) -> Latents:
        initial = self.initial if conditioning is self.learned else conditioning
        return self.student.teacher_predict(noisy, sigmas, initial, with_gradient=with_gradient)


def _as_reader(model: DiffusionModel) -> ReadsTokens:
    if isinstance(model, ReadsTokens):
        return model
    raise ModelError(
        f"{type(model).__name__} cannot learn words: expected `installed` and `encode_differentiably`, as every artaug.diffusion.Family has."
    )

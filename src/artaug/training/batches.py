"""Batches of encoded pairs with noise: fresh, or what each pair was drawn from.

A batch is a function of the seed and its index alone: batch 10 is the same whether nine came before it or a training was
resumed there, and whether one process works on it or several split it.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from artaug._internal.contracts import contract_error
from artaug.errors import ModelError, StorageError
from artaug.pairs import ImagePair
from artaug.regional.denoiser import Conditioning
from artaug.training.config import TrainingConfig
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.encoding import (
    TEXT_PREFIX,
    EncodedPair,
    encode_pairs,
    encode_prompts_alone,
    encode_text,
    find_phrases,
)
from artaug.training.model import DiffusionModel, Predictor
from artaug.training.noise_schedule import FlowMatching, NoiseSchedule
from artaug.training.objectives import Objective, PairBatch, PromptBatch
from artaug.training.samples import TrainingPrompt, TrainingSample

_log = logging.getLogger(__name__)
_ORDER, _NOISE, _INIT, _COMPANION = range(4)
"""The independent random streams of a training: order of the pairs, noise and its levels, initial factors, and a companion's."""
_REWARDS = (0.0, 1.0)
"""Of a pair that has none, among others that have some: after is good, and before is not."""


@dataclass(frozen=True, eq=False)
class SizeBucket:
    """Pairs of one size, or prompts without pictures of one size."""

    size: tuple[int, int]
    """Width and height in pixels."""
    pairs: Mapping[int, EncodedPair]
    """By the index of the pair."""
    latent_shape: torch.Size | None = None
    """The shape of the latents that prompts stand for; None of pairs, which have latents."""


@dataclass(frozen=True, eq=False)
class StepBatch:
    """The pairs of one step for one process, in micro batches."""

    model: Predictor
    """Set to the size of these pairs."""
    micro_batches: Sequence[PromptBatch]
    """All of them `PairBatch`, or, of prompts without pictures, none."""
    for_companion: Sequence["StepBatch"] = ()
    """The same pairs with other noise and levels, one batch for each update of a companion."""


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """All pairs of a training, encoded, by size."""

    buckets: Sequence[SizeBucket]
    negative: Mapping[str, Tensor] | None = None
    """One row of the objective's negative prompt, encoded, if it has one."""
    encode_again: Callable[[], object] | None = None
    """Encodes what is missing in the latent cache; called when a file there turns out to be damaged or gone."""

    @classmethod
    def encode(
        cls,
        model: DiffusionModel,
        pairs: Sequence[TrainingSample],
        *,
        micro_batch_size: int,
        objective: Objective | None = None,
        cache: Path | None = None,
        world: World = SINGLE_PROCESS,
    ) -> "EncodedPairs":
        """Encode pairs, at most ``micro_batch_size`` at a time, and prompts without pictures; see `encode_pairs`.

        ``objective`` says which phrases' tokens belong to them; None for none.
        """
        buckets, kinds = [], [(pair.size, isinstance(pair, TrainingPrompt)) for pair in pairs]
        phrase_tokens = [None] * len(pairs) if objective is None else find_phrases(model, pairs, objective)
        rewarded = any(isinstance(pair, ImagePair) and pair.rewards is not None for pair in pairs)
        for size, are_prompts in sorted(set(kinds)):
            indices = [index for index, kind in enumerate(kinds) if kind == (size, are_prompts)]
            sized = model.at_size(*size)
            if are_prompts:
                prompts = [pair for index in indices if isinstance(pair := pairs[index], TrainingPrompt)]
                encoded = encode_prompts_alone(sized, prompts, size=size, cache=cache, world=world)
            else:
                pictured = [pair for index in indices if isinstance(pair := pairs[index], ImagePair)]
                encoded = encode_pairs(
                    sized, pictured, size=size, micro_batch_size=micro_batch_size, cache=cache, world=world
                )
            rows = {
                index: replace(
                    row,
                    seed=pairs[index].seed,
                    phrase_tokens=phrase_tokens[index],
                    rewards=_rewards(pairs[index]) if rewarded else None,
                )
                for index, row in zip(indices, encoded, strict=True)
            }
            # Masks are laid out as latents are, and need no encoder.
            shape = sized.encode_masks(torch.zeros(1, size[1], size[0])).shape[1:] if are_prompts else None
            buckets.append(SizeBucket(size, rows, shape))
        negative_prompt = None if objective is None else objective.negative_prompt
        return cls(buckets, None if negative_prompt is None else encode_text(model, negative_prompt))

    def batches(
        self,
        model: DiffusionModel,
        pairs: Sequence[int],
        config: TrainingConfig,
        *,
        seed: int,
        indices: Sequence[int],
        companion_updates: int = 0,
        world: World = SINGLE_PROCESS,
    ) -> Iterator[StepBatch]:
        """Draw batches by their indices. Every pair of a size comes once before any comes again.

        Noise levels are new every time, and so is the noise unless each pair has its own. Each batch has pairs of one size;
        sizes come in proportion to their pairs.

        Args:
            model: the one that encoded the pairs.
            pairs: indices of the pairs to draw from.
            config: batch and micro batch size, the range and distribution of noise levels, and whose noise it is.
            seed: decides order and noise.
            indices: of the batches. The same index is the same batch, noise included, whatever came before it.
            companion_updates: batches of other noise that each has for a companion; they change nothing in the batch itself.
            world: the processes that split each batch; each loads the pairs of its own rows only.

        Raises:
            StorageError: if a pair cannot be loaded, and ``encode_again`` is not set or has not helped.
            ContractError: if a pair's own noise is not of the shape of its latents.
        """
        size = config.batch_size
        queues = [(bucket, [index for index in pairs if index in bucket.pairs]) for bucket in self.buckets]
        queues = [(bucket, members) for bucket, members in queues if members]
        turns = list(islice(_interleave([len(members) for _, members in queues]), max(indices, default=-1) + 1))

        def own_pairs(index: int) -> dict[int, EncodedPair]:
            """The pairs of this process in a batch, by their rows in it."""
            queue, count = turns[index]  # the batch is number ``count`` of its queue
            bucket, members = queues[queue]
            return {
                row: bucket.pairs[_draw(members, count * size + row, seed=(seed, queue))]
                for row in world.split(range(size))
            }

        for index, loaded in zip(indices, _read_ahead(map(own_pairs, indices)), strict=True):
            bucket, _ = queues[turns[index][0]]
            sized = model.at_size(*bucket.size)
            generator = _generator(seed, _NOISE, index)
            encoded = {row: self._intact(pair, content) for row, (pair, content) in loaded.items()}
            rows = list(encoded)
            shape = bucket.latent_shape or encoded[rows[0]]["before"].shape
            width = config.micro_batch_size or size
            step_batches = [
                StepBatch(
                    sized,
                    [
                        _collate(
                            sized,
                            [loaded[row][0] for row in chunk],
                            [encoded[row] for row in chunk],
                            shape=shape,
                            drawn=drawn.rows(chunk),
                            negative=self.negative,
                            with_own_noise=config.objective.reads_own_noise,
                        )
                        for chunk in (rows[start : start + width] for start in range(0, len(rows), width))
                    ],
                )
                for drawn in (_draw_noise(sized, config, shape, generator) for _ in range(1 + companion_updates))
            ]
            yield replace(step_batches[0], for_companion=step_batches[1:])

    def _intact(self, pair: EncodedPair, content: dict[str, Tensor] | StorageError) -> dict[str, Tensor]:
        """What was loaded; if files were damaged, encode them again: a training may have run for days by now."""
        if not isinstance(content, StorageError):
            return content
        if self.encode_again is None:
            raise content
        _log.warning("%s Now it is encoded again from the pictures.", content)
        pair.discard_damaged()
        self.encode_again()
        return pair.load()


@dataclass(frozen=True, eq=False)
class _DrawnNoise:
    """What is drawn for the rows of a batch."""

    sigmas: Tensor
    noise: Tensor | None
    """None where each row has its own."""
    extra: tuple[Tensor, ...]

    def rows(self, rows: Sequence[int]) -> "_DrawnNoise":
        noise = None if self.noise is None else self.noise[rows]
        return _DrawnNoise(self.sigmas[rows], noise, tuple(extra[rows] for extra in self.extra))


def _draw_noise(
    model: DiffusionModel, config: TrainingConfig, shape: torch.Size, generator: torch.Generator
) -> _DrawnNoise:
    """Every process draws for the whole batch, and then takes its rows: the split changes no number."""
    noise_schedule = with_distribution(model.noise_schedule, config)
    sigmas = noise_schedule.sample_sigmas(config.batch_size, generator, sigma_range=config.sigma_range)
    shape = torch.Size((config.batch_size, *shape))
    noise = None if config.own_noise else torch.randn(shape, generator=generator)
    return _DrawnNoise(
        sigmas, noise, tuple(torch.randn(shape, generator=generator) for _ in range(config.objective.extra_noise))
    )


_Loaded: TypeAlias = dict[int, tuple[EncodedPair, dict[str, Tensor] | StorageError]]


def _read_ahead(batches: Iterable[Mapping[int, EncodedPair]]) -> Iterator[_Loaded]:
    """Load batches, each while the one before it is used, so that disk and digests cost a step nothing."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="artaug-batches") as reader:
        pending: deque[Future[_Loaded]] = deque()
        for batch in batches:
            pending.append(reader.submit(_load, batch))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _load(batch: Mapping[int, EncodedPair]) -> _Loaded:
    """Pairs with what is in their files, or the error: only the thread that trains can encode them again."""
    loaded: _Loaded = {}
    for row, pair in batch.items():
        try:
            loaded[row] = (pair, pair.load())
        except StorageError as error:
            loaded[row] = (pair, error)
    return loaded


def init_generator(seed: int, stage: int, *, of_companion: bool = False) -> torch.Generator:
    """The generator that draws the initial factors of a stage, or the initial parameters of its companion."""
    return _generator(seed, _COMPANION if of_companion else _INIT, stage)


def _interleave(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Endless turns of several queues in proportion to their lengths: which queue, and how many turns it had before.

    The next is the queue that is furthest behind its share: least (turns + 1/2) / length, as Sainte-Lague apportions
    seats. A queue of length n thus gets n of every sum(lengths) turns, evenly spread.
    """
    counts = [0] * len(lengths)
    while True:
        queue = min(range(len(lengths)), key=lambda index: ((counts[index] + 0.5) / lengths[index], index))
        yield queue, counts[queue]
        counts[queue] += 1


def _draw(members: Sequence[int], n: int, *, seed: tuple[int, int]) -> int:
    """Draw ``n`` of an endless sequence in which all members come, shuffled, before any comes again."""
    epoch, position = divmod(n, len(members))
    return members[_permutation(len(members), (*seed, epoch))[position]]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: tuple[int, ...]) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(seed[0], _ORDER, *seed[1:])).tolist()
    return order


def _generator(*words: int) -> torch.Generator:
    """A generator for these words: SeedSequence hashes them, so that streams of near words are unrelated."""
    (state,) = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def with_distribution(noise_schedule: NoiseSchedule, config: TrainingConfig) -> NoiseSchedule:
    """The schedule that draws levels as ``config`` says.

    Raises:
        ModelError: for ``logit_normal`` and a model that is no flow model.
    """
    if not config.logit_normal:
        return noise_schedule
    if not isinstance(noise_schedule, FlowMatching):
        raise ModelError(
            f"logit_normal is for flow models, and this one has {type(noise_schedule).__name__}, whose noise levels are "
            "those of its timesteps. Leave it off."
        )
    return replace(noise_schedule, logit_normal=True)


def _rewards(sample: TrainingSample) -> tuple[float, float]:
    return (sample.rewards if isinstance(sample, ImagePair) else None) or _REWARDS


def _collate(
    model: DiffusionModel,
    pairs: Sequence[EncodedPair],
    contents: Sequence[Mapping[str, Tensor]],
    *,
    shape: torch.Size,
    drawn: _DrawnNoise,
    negative: Mapping[str, Tensor] | None,
    with_own_noise: bool,
) -> PromptBatch:
    """A micro batch of pairs, and what is in their files; where no noise is drawn, each has its own."""
    device, noise = model.device, drawn.noise
    conditioning = {
        name.removeprefix(TEXT_PREFIX): _stack_texts([row[name] for row in contents]).to(device)
        for name in contents[0]
        if name.startswith(TEXT_PREFIX)
    }
    phrase_tokens = tuple(pair.phrase_tokens for pair in pairs if pair.phrase_tokens is not None)
    batch = PromptBatch(
        conditioning=conditioning,
        noise=_own_noise(model, pairs, conditioning, shape) if noise is None else noise.to(device),
        sigmas=drawn.sigmas.to(device),
        extra_noise=tuple(extra.to(device) for extra in drawn.extra),
        negative=None
        if negative is None
        else {name: text.to(device).expand(len(pairs), *text.shape) for name, text in negative.items()},
        plans=tuple(pair.plan for pair in pairs),
        phrase_tokens=phrase_tokens or None,
        own_noise=_own_noise(model, pairs, conditioning, shape) if with_own_noise else None,
        region_mask=_stack_masks(contents).to(device) if any("region_mask" in row for row in contents) else None,
    )
    if "before" not in contents[0]:
        return batch
    rewards = [pair.rewards for pair in pairs if pair.rewards is not None]
    before, after = (torch.stack([row[side] for row in contents]).to(device).float() for side in ("before", "after"))
    return PairBatch(
        **{item.name: getattr(batch, item.name) for item in fields(batch)},
        before=before,
        after=after,
        rewards=torch.tensor(rewards, device=device) if rewards else None,
    )


def _own_noise(
    model: DiffusionModel, pairs: Sequence[EncodedPair], conditioning: Conditioning, shape: torch.Size
) -> Tensor:
    """What pairs were drawn from; their seeds have passed `artaug.training.samples.check_needs`."""
    noise = model.initial_noise([int(pair.seed) for pair in pairs if pair.seed is not None], conditioning)
    if noise.shape != (len(pairs), *shape):
        raise contract_error(
            type(model).__name__,
            "initial_noise",
            received=f"a tensor of shape {tuple(noise.shape)}",
            inputs=f"{len(pairs)} seed{'s' * (len(pairs) != 1)}",
            expected=f"the shape of the latents, {(len(pairs), *shape)}",
        )
    return noise.to(model.device).float()


def _stack_masks(pairs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Region masks; a plan without regions counts as one that covers the picture."""
    everywhere = next(torch.ones_like(pair["region_mask"]) for pair in pairs if "region_mask" in pair)
    return torch.stack([pair.get("region_mask", everywhere) for pair in pairs]).float()


def _stack_texts(texts: Sequence[Tensor]) -> Tensor:
    """Encoded prompts padded at the end with zeros to the longest; a model's own attention mask is zero there, too."""
    longest = max(len(text) for text in texts) if texts[0].ndim else 0
    return torch.stack([pad(text, (0, 0) * (text.ndim - 1) + (0, longest - len(text))) for text in texts])

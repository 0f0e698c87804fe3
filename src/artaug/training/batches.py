"""Encoded pairs as a trainer holds them, drawn in batches with fresh noise.

A batch follows from the seed and its number alone: the tenth is the same whether nine came before it or a training was
resumed there, and whether one process works on it or several share it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from artaug.errors import ModelError
from artaug.pairs import ImagePair
from artaug.training.config import TrainingConfig
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.encoding import TEXT, Row, encode_pairs
from artaug.training.model import DiffusionModel, Predictor
from artaug.training.noise_schedule import FlowMatching, NoiseSchedule
from artaug.training.objectives import PairBatch

_ORDER, _NOISE, START = range(3)
"""What chance decides in a training; each draws from a generator of its own."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Pairs of one size."""

    size: tuple[int, int]
    """Width and height in pixels."""
    rows: Mapping[int, Row]
    """By the number of the pair."""


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One step's work for one process."""

    model: Predictor
    """Set to the size of these pairs."""
    batches: Sequence[PairBatch]
    """At most so many pairs each as the process works on at a time."""


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """All pairs of a training, by size."""

    buckets: Sequence[Bucket]

    @classmethod
    def encode(
        cls,
        model: DiffusionModel,
        pairs: Sequence[ImagePair],
        *,
        micro_batch_size: int,
        cache: Path | None = None,
        processes: World = SINGLE_PROCESS,
    ) -> "EncodedPairs":
        """Encode pairs, at most ``micro_batch_size`` at a time; see `encoded_rows`."""
        buckets = []
        for width, height in sorted({pair.before.size for pair in pairs}):
            sized = model.at_size(width, height)
            members = [number for number, pair in enumerate(pairs) if pair.before.size == (width, height)]
            some = [pairs[number] for number in members]
            rows = encode_pairs(sized, some, micro_batch_size=micro_batch_size, cache=cache, processes=processes)
            buckets.append(Bucket((width, height), dict(zip(members, rows, strict=True))))
        return cls(buckets)

    def turns(
        self,
        model: DiffusionModel,
        members: Sequence[int],
        config: TrainingConfig,
        *,
        seed: int,
        numbers: Sequence[int],
        processes: World = SINGLE_PROCESS,
    ) -> Iterator[StepBatch]:
        """Draw batches: by their numbers, every member once before any of its size comes again, always with new noise.

        Each batch has pairs of one size; sizes take turns as often as they have members.

        Args:
            model: what they were encoded by.
            members: numbers of the pairs to draw from.
            config: how large batches are, and which noise levels they have.
            seed: decides order and noise.
            numbers: which to give. The same number is the same batch, noise included, whatever came before it.
            processes: who shares the batch.
        """
        size, device = config.batch_size, model.device
        queues = [(bucket, [one for one in members if one in bucket.rows]) for bucket in self.buckets]
        queues = [queue for queue in queues if queue[1]]
        places = list(islice(_taking_turns([len(mine) for _, mine in queues]), max(numbers, default=-1) + 1))
        for number in numbers:
            place, count = places[number]
            bucket, mine = queues[place]
            sized = model.at_size(*bucket.size)
            order = (_nth(mine, at, seed=(seed, place)) for at in range(count * size, (count + 1) * size))
            noise_of = _generator(seed, _NOISE, number)
            sigmas = _spread(sized.noise_schedule, config).sample_sigmas(size, noise_of, sigma_range=config.sigma_range)
            rows = [bucket.rows[one] for one in order]
            noise = torch.randn((size, *rows[0]["before"].shape), generator=noise_of)
            share = list(processes.share(range(size)))
            micro_batch_size = config.micro_batch_size or size
            parts = [share[at : at + micro_batch_size] for at in range(0, len(share), micro_batch_size)]
            yield StepBatch(
                sized, [_batch([rows[at] for at in part], noise[part], sigmas[part], device) for part in parts]
            )


def init_generator(seed: int, stage: int) -> torch.Generator:
    """What draws the factors a stage begins with."""
    return _generator(seed, START, stage)


def _taking_turns(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Which queue is next, for ever, and how often it has been: whichever is furthest behind its share."""
    counts = [0] * len(lengths)
    while True:
        place = min(range(len(lengths)), key=lambda at: ((counts[at] + 0.5) / lengths[at], at))
        yield place, counts[place]
        counts[place] += 1


def _nth(members: Sequence[int], place: int, *, seed: tuple[int, int]) -> int:
    """What is at a place of an endless queue in which all members come, shuffled, before all come again."""
    epoch, at = divmod(place, len(members))
    return members[_shuffled(len(members), (*seed, epoch))[at]]


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: tuple[int, ...]) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(seed[0], _ORDER, *seed[1:])).tolist()
    return order


def _generator(*words: int) -> torch.Generator:
    (state,) = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def _spread(noise_schedule: NoiseSchedule, config: TrainingConfig) -> NoiseSchedule:
    if not config.logit_normal:
        return noise_schedule
    if not isinstance(noise_schedule, FlowMatching):
        raise ModelError(
            f"logit_normal is for flow models, and this one has {type(noise_schedule).__name__}, whose noise levels are steps of "
            "a schedule. Leave it off."
        )
    return replace(noise_schedule, logit_normal=True)


def _batch(rows: Sequence[Row], noise: Tensor, sigmas: Tensor, device: torch.device) -> PairBatch:
    texts = [name for name in rows[0] if name.startswith(TEXT)]
    regional = any("inside" in row for row in rows)
    return PairBatch(
        before=torch.stack([row["before"] for row in rows]).to(device).float(),
        after=torch.stack([row["after"] for row in rows]).to(device).float(),
        region_mask=_inside(rows).to(device) if regional else None,
        conditioning={name.removeprefix(TEXT): _filled_up([row[name] for row in rows]).to(device) for name in texts},
        noise=noise.to(device),
        sigmas=sigmas.to(device),
    )


def _inside(rows: Sequence[Row]) -> Tensor:
    """How much of every latent lies in regions: all of it for a plan without any."""
    whole = next(torch.ones_like(row["inside"]) for row in rows if "inside" in row)
    return torch.stack([row.get("inside", whole) for row in rows]).float()


def _filled_up(texts: Sequence[Tensor]) -> Tensor:
    """Prompts of unlike length with zeros behind the shorter ones, as a model's own mask of zeros leaves them out."""
    longest = max(len(text) for text in texts) if texts[0].ndim else 0
    return torch.stack([pad(text, (0, 0) * (text.ndim - 1) + (0, longest - len(text))) for text in texts])

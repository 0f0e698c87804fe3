"""The seam that draws pictures from plans, and the seeds of a run's pictures."""

from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL.Image import Image

from artaug._internal.annotations import Seam
from artaug._internal.arguments import check_count
from artaug._internal.calls import call_part, describe_inputs
from artaug._internal.contracts import check_batch
from artaug._internal.lanes import Lane
from artaug._internal.memory import FittingBatches
from artaug.canvas import Canvas
from artaug.errors import GuideError, InvalidValueError, ModelError
from artaug.image_files import ImageFile, ImageFolder
from artaug.lora.lora import LoRA
from artaug.plan import Plan

if TYPE_CHECKING:
    from torch import nn

_TOO_LARGE = (
    "Offload the pipeline (enable_model_cpu_offload), draw smaller pictures, load the model in lower precision or quantized, or "
    "free what else is on the device; fewer steps need as much memory."
)


@dataclass(frozen=True)
class Undrawn:
    """Stands for a picture that could not be drawn: a run skips its prompt, with the reason.

    What a synthesizer raises ends a run. This is for what would happen again each time, such as a plan that kills the process
    that draws it.
    """

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise InvalidValueError(
                "an Undrawn needs a reason: reports show it as the reason why a prompt was skipped."
            )


class Synthesizer(Seam):
    """Draws pictures from plans. The same plan and seed give the same picture, whatever was drawn before."""

    @property
    def draws_regions(self) -> bool:
        """Whether it draws plans with regions; a run with a planner that makes regions asks before it begins."""
        return True

    def canvas_steps(self, canvas: Canvas) -> int:
        """How many of its steps it draws when it starts from this canvas. A plan whose canvas it refuses is not drawn.

        Override it in a synthesizer that reads the canvas of a plan, at least 1 for each that it can draw from.

        Raises:
            ModelError: if it cannot draw from it; of one that does not override this, always.
        """
        raise ModelError(
            f"{type(self).__name__} draws from noise alone, and {canvas!r} would be ignored: it does not override canvas_steps."
        )

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that it cannot draw. A run asks before it begins, with plans like those that it will draw.

        Override it where more can be wrong than regions that nothing reads and a canvas that `canvas_steps` refuses.

        Raises:
            GuideError: for regions, if it does not draw them.
            ModelError: for a canvas that it cannot draw from.
        """
        if plan.regions and not self.draws_regions:
            raise GuideError(f"this {type(self).__name__} draws no regions, and the plan of {plan.prompt!r} has some.")
        if plan.canvas is not None:
            self.canvas_steps(plan.canvas)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height in pixels of what it draws, for the stand-ins of a check before a run; 64 by 64 if not said."""
        return 64, 64

    @property
    def models(self) -> "Sequence[nn.Module]":
        """What it computes with on a device, for `OneAtATime`, which moves these; whatever is not named stays where it is."""
        return ()

    @property
    def max_concurrency(self) -> int:
        """How many calls a run may make at the same time, each in a thread of its own.

        0, of one that computes in this process: the run's own thread makes them, one after the other.
        """
        return 0

    @abstractmethod
    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        """Draw one picture."""

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        """Draw many pictures, one for each plan and seed. Override it where a batch is faster than a loop."""
        return [self.synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]

    def synthesize_each(
        self, plans: Sequence[Plan], *, seeds: Sequence[int], folder: ImageFolder | None = None
    ) -> "Sequence[Image | ImageFile | Undrawn]":
        """Draw many pictures, and say of those that cannot be drawn why not: what a run calls.

        Override it where pictures are drawn elsewhere, and can be stored from there in the folder, if there is one. A picture
        that is not in it is stored by whoever called.
        """
        return self.synthesize_batch(plans, seeds=seeds)

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        """A synthesizer that draws with ``lora`` on top, with the same weights in memory; this one is not changed.

        Raises:
            ModelError: if this synthesizer cannot take a LoRA.
            LoRAMismatchError: if the LoRA names layers the model does not have.
        """
        raise ModelError(f"{type(self).__name__} cannot draw with a LoRA: it does not override with_lora.")


@dataclass(frozen=True, eq=False)
class DrawingCall:
    """What one call of a synthesizer drew. The size of a call changes how a model rounds: a store records it, to draw again."""

    members: tuple[int, ...]
    """The indices of its plans among all that were to be drawn."""
    images: tuple[Image | ImageFile | Undrawn, ...]
    """A picture for each of them."""


def draw(synthesizer: Synthesizer, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
    """Draw pictures, in one call of the synthesizer if they fit into memory; without plans, it is not called.

    See `draw_in_calls`, which gives the same pictures call by call, for what it raises.
    """
    calls = draw_in_calls(synthesizer, plans, seeds=seeds, batches=FittingBatches(max(len(plans), 1)))
    images = (_checked(synthesizer, image) for call in calls for image in call.images)
    return [image.load() if isinstance(image, ImageFile) else image for image in images]


def draw_batches(
    synthesizer: Synthesizer, batches: Iterable[tuple[Sequence[Plan], Sequence[int]]]
) -> Generator[list[Image], None, None]:
    """Draw several batches of plans with their seeds, and yield the pictures of each, in their order.

    Where a synthesizer draws elsewhere, as many calls as it takes at the same time are under way, and as many wait. See
    `draw` for what it raises.
    """
    concurrency = synthesizer.max_concurrency
    if not concurrency:
        yield from (draw(synthesizer, plans, seeds=seeds) for plans, seeds in batches)
        return
    under_way: deque[Future[list[Image]]] = deque()
    with Lane(concurrency, name="draw") as lane:
        try:
            for plans, seeds in batches:
                under_way.append(lane.submit(partial(draw, synthesizer, plans, seeds=seeds)))
                if len(under_way) == 2 * concurrency:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for waiting in under_way:
                waiting.cancel()


def draw_files(
    synthesizer: Synthesizer, plans: Sequence[Plan], *, seeds: Sequence[int], folder: ImageFolder
) -> list[ImageFile]:
    """Draw pictures into a folder, as `draw` does."""
    batches = FittingBatches(max(len(plans), 1))
    calls = draw_in_calls(synthesizer, plans, seeds=seeds, batches=batches, folder=folder)
    return folder.add_all(_checked(synthesizer, file) for call in calls for file in call.images)


def _checked(synthesizer: Synthesizer, image: Image | ImageFile | Undrawn) -> Image | ImageFile:
    if isinstance(image, Undrawn):
        raise ModelError(f"{type(synthesizer).__name__} could not draw a picture: {image.reason}")
    return image


def draw_call(
    synthesizer: Synthesizer, plans: Sequence[Plan], seeds: Sequence[int], folder: ImageFolder | None
) -> list[Image | ImageFile | Undrawn]:
    """Make one call of a synthesizer, and check what it returned.

    Raises:
        ContractError: see `draw_in_calls`.
    """
    draws_each = _draws_each(synthesizer)
    allowed: tuple[type[Image | ImageFile | Undrawn], ...] = (Image, ImageFile, Undrawn) if draws_each else (Image,)
    drawn: list[Image | ImageFile | Undrawn] = check_batch(
        type(synthesizer).__name__,
        "synthesize_each" if draws_each else "synthesize_batch",
        synthesizer.synthesize_each(plans, seeds=seeds, folder=folder),
        of=allowed,
        count=len(plans),
        per="plan",
        prompts=[plan.prompt for plan in plans],
    )
    if folder is None:
        return drawn
    stored = iter(folder.add_all([picture for picture in drawn if not isinstance(picture, Undrawn)]))
    return [picture if isinstance(picture, Undrawn) else next(stored) for picture in drawn]


def _draws_each(synthesizer: Synthesizer) -> bool:
    return type(synthesizer).synthesize_each is not Synthesizer.synthesize_each


def draw_in_calls(
    synthesizer: Synthesizer,
    plans: Sequence[Plan],
    *,
    seeds: Sequence[int],
    batches: FittingBatches,
    folder: ImageFolder | None = None,
) -> Iterator[DrawingCall]:
    """Draw pictures and check that there is one for each plan: the pictures of each call of the synthesizer, as they come.

    Every call of a synthesizer goes through this function. Where memory runs out, ``batches.largest`` is halved and what was
    not drawn is drawn again; pass the same ``batches`` to go on with calls of that size. A synthesizer without a
    `Synthesizer.synthesize_batch` of its own draws picture by picture. What passes by itself, such as a timeout, is tried
    again for ten minutes. With a ``folder``, the pictures are files of it.

    Raises:
        ModelError: if a plan has a canvas that the synthesizer cannot draw from; then nothing is drawn.
        PartError: if the synthesizer raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: if it returned too few or too many pictures, or something that is not a PIL image.
        MemoryError, RuntimeError: the synthesizer's own, if not even one picture fits into memory.
    """
    owner = type(synthesizer).__name__
    starting = [(plan, plan.canvas) for plan in plans if plan.canvas is not None]
    kinds = {
        (held.size, held.strength, held.mask is None, len(held.references), bool(plan.regions)): plan
        for plan, held in starting
    }
    for plan in kinds.values():  # pixels do not count
        synthesizer.check_plan(plan)

    def call(members: Sequence[int]) -> list[Image | ImageFile | Undrawn]:
        part, part_seeds = [plans[index] for index in members], [seeds[index] for index in members]
        inputs = describe_inputs("plan", [plan.prompt for plan in part])
        return call_part(lambda: draw_call(synthesizer, part, part_seeds, folder), owner=owner, inputs=inputs)

    if not _draws_each(synthesizer) and type(synthesizer).synthesize_batch is Synthesizer.synthesize_batch:
        batches = FittingBatches(1)
    for members, images in batches.run(call, range(len(plans)), owner=owner, item="picture", remedy=_TOO_LARGE):
        yield DrawingCall(tuple(members), tuple(images))


_PICTURES, _HELD_OUT, _ATTEMPTS = range(3)
"""The independent streams of seeds of a run: of its pictures by their place, of what is only measured, and of attempts."""
_SEED_BITS = 53
"""Of a picture's seed: readers of JSON in other languages hold whole numbers of so many bits exactly."""


def picture_seeds(seed: int, count: int) -> list[int]:
    """Seeds for ``count`` pictures: the same for the same ``seed``, unrelated to those of any other, and different.

    >>> from artaug.synthesis import picture_seeds
    >>> picture_seeds(0, 3) == picture_seeds(0, 5)[:3]
    True
    """
    check_count("picture_seeds", "seed", seed, least=0)
    return [_derive_seed(seed, _PICTURES, index) for index in range(count)]


def attempt_seed(seed: int, *, round_number: int, prompt_index: int, candidate: int = 0) -> int:
    """The seed of one picture of a run, which depends on nothing but its key.

    More prompts, rounds or candidates leave the seeds of all others as they are.

    Args:
        seed: of the run.
        round_number: counted from 1.
        prompt_index: the place of the prompt in the run's list, from 0.
        candidate: from 0, see `BestOf`.

    >>> from artaug.synthesis import attempt_seed
    >>> attempt_seed(0, round_number=1, prompt_index=7) == attempt_seed(0, round_number=2, prompt_index=7)
    False
    """
    check_count("attempt_seed", "seed", seed, least=0)
    return _derive_seed(seed, _ATTEMPTS, round_number, prompt_index, candidate)


def held_out_seed(seed: int) -> int:
    """A seed for pictures that are only measured, unrelated to those that a run with ``seed`` learns from.

    `picture_seeds` of one seed are the same words wherever they are used: a model would be judged on the very noise that
    it was trained on.

    >>> from artaug.synthesis import held_out_seed, picture_seeds
    >>> set(picture_seeds(held_out_seed(0), 1000)).isdisjoint(picture_seeds(0, 1000))
    True
    """
    check_count("held_out_seed", "seed", seed, least=0)
    return _derive_seed(seed, _HELD_OUT)


def _derive_seed(seed: int, *key: int) -> int:
    (word,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return int(word) >> (64 - _SEED_BITS)

"""The parts of a run that compute on a cluster: each is an object of its seam, and stands where any other may."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar, final

import ray
from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.canvas import Canvas
from artaug.critique import Abstention, Answer, Critic
from artaug.errors import WorkerDiedError
from artaug.identity import identity_of
from artaug.image_files import ImageFile, ImageFolder
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.scale.pictures import Pixels, send_pictures
from artaug.scale.pool import ReplicaPool
from artaug.scale.work import Criticise, Draw, Score, SentLoRA, UseSynthesizer
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer, Undrawn

T = TypeVar("T")

_MORE_THAN_ONCE = "the process that worked on it died each time"


@checked
@final
@dataclass(frozen=True, repr=False, eq=False)
class RemoteSynthesizer(Synthesizer):
    """A synthesizer whose model is on the workers of a cluster, one copy for each; see `RayCluster.synthesizer`.

    A run draws one call on each worker at the same time. With a store, workers write the pictures, and send their names. A
    LoRA is sent once, the model never; trainings take place on a worker, with the copy that is there.

    A call whose worker died is made again on another one. Is that lost too, each of its plans is drawn alone, and the
    one at which a worker dies again is skipped, with the reason.
    """

    pool: ReplicaPool
    loras: tuple[SentLoRA, ...] = ()

    def __repr__(self) -> str:
        """What it is on how many workers."""
        name = self.pool.description.facts["name"]
        lora = f" with {len(self.loras)} LoRA" if self.loras else ""
        return f"<{name}{lora} on {self.pool.workers}>"

    @property
    def draws_regions(self) -> bool:
        return bool(self.pool.description.facts["draws_regions"])

    def canvas_steps(self, canvas: Canvas) -> int:
        steps: int = self.pool.call(UseSynthesizer(self.loras, partial(_canvas_steps, canvas)))
        return steps

    def check_plan(self, plan: Plan) -> None:
        self.pool.call(UseSynthesizer(self.loras, partial(_check_plan, plan)))

    @property
    def picture_size(self) -> tuple[int, int]:
        width, height = self.pool.description.facts["picture_size"]
        return width, height

    @property
    def max_concurrency(self) -> int:
        return self.pool.replicas

    @property
    def loads(self) -> int:
        """How often the model has been loaded: once for each worker, and once more for each that died."""
        return self.pool.loads

    @property
    def identity_items(self) -> Mapping[str, str]:
        """What the workers have built, so that a run goes on on a cluster that one machine began, and the other way round."""
        tuning = {f".lora {number}": f"{lora.digest} * {lora.scale}" for number, lora in enumerate(self.loras)}
        return {**self.pool.description.identity, **tuning}

    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        drawn = self._draw(plans, seeds, folder=None)
        for plan, picture in zip(plans, drawn, strict=True):
            if isinstance(picture, Undrawn):
                raise WorkerDiedError(f"{plan.prompt!r} was not drawn: {picture.reason}")
        return [picture.load() for picture in drawn if isinstance(picture, Pixels)]

    def synthesize_each(
        self, plans: Sequence[Plan], *, seeds: Sequence[int], folder: ImageFolder | None = None
    ) -> list[Image | ImageFile | Undrawn]:
        drawn = self._draw(plans, seeds, folder=folder)
        return [picture.load() if isinstance(picture, Pixels) else picture for picture in drawn]

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        sent = SentLoRA(identity_of(lora, "")[""], scale, ray.put(lora))
        made = replace(self, loras=(*self.loras, sent))
        self.pool.call(UseSynthesizer(made.loras, _nothing))  # so that a LoRA that does not fit says so now
        return made

    def use(self, function: Callable[[Any, Callable[[object], None]], T], *, on_report: Callable[[Any], object]) -> T:
        """Call a function on a worker, of the synthesizer that is there and of a function that reports to this process.

        Args:
            function: pickled with its code; its result comes back.
            on_report: called in this thread; what it raises ends the call.
        """
        result: T = self.pool.stream(UseSynthesizer(self.loras, function), on_report=on_report)
        return result

    def _draw(
        self, plans: Sequence[Plan], seeds: Sequence[int], *, folder: ImageFolder | None
    ) -> list[ImageFile | Pixels | Undrawn]:
        drawn: list[ImageFile | Pixels | Undrawn]
        try:
            drawn = self.pool.call(Draw(self.loras, plans, seeds, folder))
        except WorkerDiedError:
            return [self._draw_alone(plan, seed, folder) for plan, seed in zip(plans, seeds, strict=True)]
        return drawn

    def _draw_alone(self, plan: Plan, seed: int, folder: ImageFolder | None) -> ImageFile | Pixels | Undrawn:
        try:
            (picture,) = self.pool.call(Draw(self.loras, [plan], [seed], folder), retries=0)
        except WorkerDiedError as error:
            return Undrawn(f"{_MORE_THAN_ONCE}, the last time with this picture alone: {error}")
        made: ImageFile | Pixels | Undrawn = picture
        return made


@checked
@final
@dataclass(frozen=True, repr=False, eq=False)
class RemoteCritic(Critic):
    """A critic whose model is on the workers of a cluster; see `RayCluster.critic`.

    A picture at which a worker dies three times, the last time alone, gets an `Abstention`.
    """

    pool: ReplicaPool

    def __repr__(self) -> str:
        """What it is on how many workers."""
        return f"<{self.pool.description.facts['name']} on {self.pool.workers}>"

    @property
    def max_concurrency(self) -> int:
        return self.pool.replicas

    @property
    def identity_items(self) -> Mapping[str, str]:
        """What the workers have built."""
        return self.pool.description.identity

    def critique(self, image: Image, prompt: str) -> Answer:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Answer]:
        if not prompts:
            return []
        pictures = send_pictures(images)
        answers: list[Answer]
        try:
            answers = self.pool.call(Criticise(pictures, prompts))
        except WorkerDiedError:
            answers = []
            for picture, prompt in zip(pictures, prompts, strict=True):
                try:
                    answers += self.pool.call(Criticise([picture], [prompt]), retries=0)
                except WorkerDiedError as error:
                    answers.append(Abstention(f"{_MORE_THAN_ONCE}, the last time with this picture alone: {error}"))
        return answers


@checked
@final
@dataclass(frozen=True, repr=False, eq=False)
class RemoteScorer(Scorer):
    """A scorer whose model is on the workers of a cluster; see `RayCluster.scorer`. Several runs may share it."""

    pool: ReplicaPool

    def __repr__(self) -> str:
        """What it is on how many workers."""
        return f"<{self.name} on {self.pool.workers}>"

    @property
    def name(self) -> str:
        return str(self.pool.description.facts["name"])

    @property
    def depends_on(self) -> frozenset[str]:
        names: frozenset[str] = self.pool.description.facts["depends_on"]
        return names

    @property
    def identity_items(self) -> Mapping[str, str]:
        """What the workers have built."""
        return self.pool.description.identity

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        scores: list[float] = self.pool.call(Score(send_pictures(images), prompts)) if prompts else []
        return scores


def _check_plan(plan: Plan, synthesizer: Synthesizer, _report: Callable[[object], None]) -> None:
    synthesizer.check_plan(plan)


def _canvas_steps(canvas: Canvas, synthesizer: Synthesizer, _report: Callable[[object], None]) -> int:
    return synthesizer.canvas_steps(canvas)


def _nothing(synthesizer: object, report: Callable[[object], None]) -> None:
    """What a worker does that only has to have a LoRA."""

"""A synthesizer that keeps what it drew: held-out pictures of a run, and those of comparisons that are made again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self, final

from PIL.Image import Image
from torch import nn

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug._internal.digests import digest
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.values import value
from artaug.canvas import Canvas
from artaug.errors import StorageError
from artaug.identity import identity_of
from artaug.image_files import ImageFolder, image_digest
from artaug.lora.lora import LoRA
from artaug.plan import Plan, plan_digest
from artaug.synthesis import Synthesizer, draw_files

_log = logging.getLogger(__name__)


@value
class DrawnRecord:
    """The digests of the pictures of one call of a synthesizer."""

    images: tuple[str, ...]


@checked
@final
@dataclass(frozen=True)
class CachedSynthesizer(Synthesizer):
    """Keeps the pictures of every call of a synthesizer in a folder, so that the same call reads them.

    A call is the same if the synthesizer is made of the same (settings, weights, LoRAs; the device does not count) and draws
    the same plans with the same seeds together. Several processes may share the folder.

    Raises:
        InvalidValueError: for something else than a synthesizer, or one that nothing but its address distinguishes.

    >>> import artaug as aa, tempfile
    >>> from artaug.testing import SwatchSynthesizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     synthesizer = aa.CachedSynthesizer(SwatchSynthesizer(), folder=folder)
    ...     first, again = (synthesizer.synthesize(aa.Plan("a harbour"), seed=0) for _ in range(2))
    >>> first == again
    True
    """

    synthesizer: Synthesizer
    _: KW_ONLY
    folder: str | Path
    """Of the records of calls; made when the first one is written."""
    images: ImageFolder | None = None
    """Of the pictures; None for ``images`` in ``folder``."""

    def __post_init__(self) -> None:
        check_argument("CachedSynthesizer", "synthesizer", self.synthesizer, Synthesizer)
        self._key  # noqa: B018 - refuses now what has none

    @property
    def draws_regions(self) -> bool:
        return self.synthesizer.draws_regions

    def canvas_steps(self, canvas: Canvas) -> int:
        return self.synthesizer.canvas_steps(canvas)

    def check_plan(self, plan: Plan) -> None:
        self.synthesizer.check_plan(plan)

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.synthesizer.picture_size

    @property
    def identity(self) -> Mapping[str, object]:
        """What it draws, wherever that is kept."""
        return {"synthesizer": self.synthesizer}

    @property
    def models(self) -> Sequence[nn.Module]:
        return self.synthesizer.models

    @property
    def max_concurrency(self) -> int:
        return self.synthesizer.max_concurrency

    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        """Read the pictures of this call, or draw and keep them.

        Raises:
            StorageError: if they cannot be written. What is damaged is drawn again.
        """
        if not plans:
            return []
        images = self.images or ImageFolder(Path(self.folder) / "images")
        path = Path(self.folder) / f"{digest(self._key, *map(self._plan_key, plans), *map(str, seeds))[:32]}.json"
        try:
            record = read_segment(path, DrawnRecord, what="record of a drawing", remedy="It is made again.")
            return [images.get(name).load() for name in record.images]
        except FileNotFoundError:
            pass
        except StorageError as error:
            _log.warning("pictures that were drawn before are drawn again: %s", error)
        files = draw_files(self.synthesizer, plans, seeds=seeds, folder=images)
        record = DrawnRecord(tuple(map(image_digest, files)))
        write_segment(path, record, what="the record of a drawing", remedy="Make the same call again to go on.")
        return [file.load() for file in files]

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        return replace(self, synthesizer=self.synthesizer.with_lora(lora, scale=scale))

    def _plan_key(self, plan: Plan) -> str:
        """What tells plans apart. A strength becomes steps by each pipeline's own rule, so the number of steps counts, too."""
        steps = "" if plan.canvas is None else f" {self.canvas_steps(plan.canvas)} steps"
        return f"{plan_digest(plan)}{steps}"

    @cached_property
    def _key(self) -> str:
        parts = identity_of(self.synthesizer, "synthesizer")
        return digest(*(f"{name}={text}" for name, text in sorted(parts.items()) if name != "synthesizer.device"))

"""A judge whose answers are kept: questions to a multimodal model are most of what a comparison costs after its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, final

from PIL.Image import Image
from pydantic import Field
from torch import nn

import artaug as aa
from artaug._internal.digests import digest
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.values import value
from artaug.image_files import image_digest


@value
class _Kept:
    """One answer, in one order."""

    prompt: str
    answer: Annotated[float, Field(ge=0, le=1)]


@final
@dataclass(frozen=True)
class KeptJudge(aa.PairwiseJudge):
    """Keeps a judge's answers in a folder, so that a comparison that was stopped, or has one more candidate, asks none again.

    An answer is that of a judge (by its ``repr``) about two pictures (by their pixels) in one order, and a prompt. Abstentions
    are not kept.
    """

    judge: aa.PairwiseJudge
    folder: Path = field(repr=False)

    @property
    def name(self) -> str:
        return self.judge.name

    @property
    def depends_on(self) -> frozenset[str]:
        return self.judge.depends_on

    @property
    def models(self) -> Sequence[nn.Module]:
        return self.judge.models

    def prefer(self, first: Image, second: Image, prompt: str) -> float | aa.Abstention:
        return self.prefer_batch([first], [second], [prompt])[0]

    def prefer_batch(
        self, first: Sequence[Image], second: Sequence[Image], prompts: Sequence[str]
    ) -> list[float | aa.Abstention]:
        questions = list(zip(first, second, prompts, strict=True))
        paths = [self._path(*question) for question in questions]
        known: dict[Path, float | aa.Abstention] = {}
        for path in paths:
            if path.exists():
                known[path] = read_segment(path, _Kept, what="answer of a judge", remedy="Delete it.").answer
        missing = {path: question for path, question in zip(paths, questions, strict=True) if path not in known}
        if missing:
            shown, other, texts = zip(*missing.values(), strict=True)
            answers = self.judge.prefer_batch(shown, other, texts)
            for path, prompt, answer in zip(missing, texts, answers, strict=True):
                if not isinstance(answer, aa.Abstention):
                    write_segment(path, _Kept(prompt, answer), what="a judge's answer", remedy="Make room.")
                known[path] = answer
        return [known[path] for path in paths]

    def _path(self, first: Image, second: Image, prompt: str) -> Path:
        name = digest(repr(self.judge), prompt, image_digest(first), image_digest(second))
        return self.folder / name[:2] / f"{name[2:]}.json"

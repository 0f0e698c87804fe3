"""The paper's guide: predict once for the plan's prompt and once for every region's, and average the predictions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from artaug.errors import GuideError, NonFiniteError
from artaug.lora.lora import LoRA
from artaug.regional.claim import exclusive
from artaug.regional.coverage import token_weights
from artaug.regional.denoiser import Denoiser, EncodedPrompt, ForwardKwargs, Output, bind_forward_args
from artaug.regional.guide import EncodedRegion, Guide
from artaug.regional.token_lora import lora_of


@dataclass(frozen=True, kw_only=True)
class OutputMix(Guide):
    """Mixes the denoiser's outputs, as ArtAug does (arXiv 2412.12888).

    At every step the prediction for the plan's prompt P and those for the region prompts P_i are averaged, token by
    token, with the regions' weights s_i and their masks M_i (area-averaged, feathered):

        v = (v(P) + sum_i s_i M_i v(P_i)) / (1 + sum_i s_i M_i)

    The paper's setting is weight 1 and feather 0, which is what a `Region` has unless told otherwise: inside one region
    its prompt and the plan's count half each, outside all regions nothing changes.

    It costs one more forward pass per region and step. These run in sub-batches no larger than the batch itself, so
    memory stays that of plain drawing. With classifier-free guidance the branch of the plan's prompt is mixed, and that
    of the negative prompt where a region has a negative prompt of its own.

    A region that names a LoRA wears it while its own prediction is made.

    >>> import artaug as aa
    >>> aa.OutputMix()
    OutputMix()
    """

    loras: Mapping[str, LoRA] = field(default_factory=dict, repr=False, hash=False)
    """What a region may wear (`Region.lora`), by name."""

    @contextmanager
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> Iterator[None]:
        parts = tuple(
            part
            for row, of_row in enumerate(regions)
            for one in of_row
            for part in _parts(row, one, denoiser.grid, lora_of(one.region, self.loras))
        )
        with exclusive(denoiser.module, self):
            if not parts:
                yield
                return
            handle = denoiser.module.register_forward_hook(_Mixing(denoiser, parts, len(regions)), with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


@dataclass(frozen=True, eq=False)
class _Part:
    """One prompt of one region of one picture of the batch."""

    branch: Literal["cond", "uncond"]
    picture: int
    text: EncodedPrompt | None
    """None for the one its row has: a LoRA counts in both branches, or guidance would multiply it."""
    weights: Tensor
    """Shape (rows, columns) of a prediction."""
    prompt: str
    wears: str | None
    lora: LoRA | None


def _parts(picture: int, one: EncodedRegion, grid: tuple[int, int], lora: LoRA | None) -> Iterator[_Part]:
    weights = token_weights(one.region, grid)
    yield _Part("cond", picture, one.prompt, weights, one.region.prompt, one.region.lora, lora)
    if one.negative_prompt is not None or lora is not None:
        said = "the negative prompt" if one.negative_prompt is None else f"not {one.region.negative_prompt}"
        yield _Part("uncond", picture, one.negative_prompt, weights, said, one.region.lora, lora)


def _asked_alike(placed: tuple[int, _Part]) -> tuple[str, bool]:
    return placed[1].wears or "", placed[1].text is None


class _Mixing:
    """The forward hook of one run: replaces a prediction for the plans' prompts by the mixed one."""

    def __init__(self, denoiser: Denoiser, parts: Sequence[_Part], batch: int) -> None:
        self._denoiser = denoiser
        self._parts = parts
        self._batch = batch
        self._steps = 0
        self._asking = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> Output:
        # Asking for a region's prediction calls the denoiser again, so that every other hook on it has its say.
        if self._asking:
            return None
        kwargs = bind_forward_args(module, args, kwargs)
        branches = self._denoiser.branches(kwargs)
        for rows in (branches.cond, branches.uncond):
            if len(rows) not in (0, self._batch):
                raise GuideError(f"regions of {self._batch} pictures cannot steer a batch of {len(rows)}.")
        placed = [(rows[part.picture], part) for part in self._parts if (rows := getattr(branches, part.branch))]
        if not placed:
            return None
        self._steps += bool(branches.cond)
        prediction = self._denoiser.prediction(output)
        self._check(prediction, "the plan's prompt")
        self._asking = True
        try:
            return self._denoiser.with_prediction(output, self._mixed(prediction, kwargs, placed))
        finally:
            self._asking = False

    def _mixed(self, prediction: Tensor, kwargs: ForwardKwargs, placed: Sequence[tuple[int, _Part]]) -> Tensor:
        """The paper's equation; rows without a region stay the very numbers they were."""
        wide = torch.promote_types(prediction.dtype, torch.float32)
        sums = {row: prediction[row].to(wide) for row, _ in placed}
        totals = {row: torch.ones((), device=prediction.device, dtype=wide) for row in sums}
        for some in self._sub_batches(placed):
            for (row, part), regional in zip(some, self._asked(some, kwargs), strict=True):
                weights = self._denoiser.broadcast_weights(part.weights).to(prediction.device, wide)
                sums[row] = sums[row] + weights * regional
                totals[row] = totals[row] + weights
        mixed = prediction.clone()
        for row, total in sums.items():
            mixed[row] = (total / totals[row]).to(prediction.dtype)
        return mixed

    def _sub_batches(self, placed: Sequence[tuple[int, _Part]]) -> Iterator[Sequence[tuple[int, _Part]]]:
        """Parts that wear the same and bring a prompt or none, no more at a time than the batch has pictures."""
        for _, alike in groupby(sorted(placed, key=_asked_alike), key=_asked_alike):
            parts = list(alike)
            yield from (parts[start : start + self._batch] for start in range(0, len(parts), self._batch))

    def _asked(self, placed: Sequence[tuple[int, _Part]], kwargs: ForwardKwargs) -> Tensor:
        """The denoiser's prediction for each row under each part's own prompt."""
        rows, texts = [row for row, _ in placed], [part.text for _, part in placed if part.text is not None]
        if texts:
            kwargs = self._denoiser.with_prompt_embeds(kwargs, rows, texts)
        lora = placed[0][1].lora
        with nullcontext() if lora is None else lora.applied_to(self._denoiser.module):
            prediction = self._denoiser.prediction(self._denoiser.module(**kwargs))
        if not texts:
            prediction = prediction[rows]
        self._check(prediction, f"the region prompt(s) {[part.prompt for _, part in placed]}")
        return prediction

    def _check(self, prediction: Tensor, prompt: str) -> None:
        if not prediction.isfinite().all():
            raise NonFiniteError(
                f"the denoiser predicted NaN or infinity for {prompt} at step {self._steps}. "
                "Check the weights, and the LoRA worn; a float16 model may need bfloat16."
            )

"""The paper's guide: predict once for the plan's prompt and once for every region's, and average the predictions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.modules import outside_graphs
from artaug.errors import GuideError, NonFiniteError
from artaug.lora.applied import check_called
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.regional.coverage import token_weights
from artaug.regional.denoiser import EncodedPrompt, ForwardKwargs, Output
from artaug.regional.guide import Guide
from artaug.regional.guided_run import EncodedRegion, GuidedRun
from artaug.regional.token_lora import check_loras, find_lora


@checked
@final
@dataclass(frozen=True, kw_only=True)
class OutputMix(Guide):
    """Mixes the denoiser's outputs, as ArtAug does (arXiv 2412.12888).

    At every step the prediction for the plan's prompt P and those for the region prompts P_i are averaged, token by
    token, with the regions' weights s_i and their masks M_i (area-averaged, feathered):

        v = (v(P) + sum_i s_i M_i v(P_i)) / (1 + sum_i s_i M_i)

    The paper's setting is weight 1 and feather 0, the defaults of a `Region`: inside one region its prompt and the
    plan's count half each, outside all regions nothing changes.

    It costs one more forward pass per region and step. These run in sub-batches no larger than the batch itself, so
    memory stays that of plain drawing. With classifier-free guidance the branch of the plan's prompt is mixed, and that
    of the negative prompt where a region has a negative prompt of its own.

    The LoRA that a region names is applied while the region's own prediction is made.

    >>> import artaug as aa
    >>> aa.OutputMix()
    OutputMix()
    """

    runs_compiled: ClassVar[bool] = True

    loras: Mapping[str, LoRA] = field(default_factory=dict, repr=False, hash=False)
    """The LoRAs that regions may name (`Region.lora`)."""

    def __post_init__(self) -> None:
        check_loras("OutputMix", self.loras)

    def declines(self, plans: Sequence[Plan]) -> bool:
        return not any(plan.regions for plan in plans)

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        terms = tuple(
            term
            for picture, picture_regions in enumerate(run.regions)
            for encoded in picture_regions
            for term in _region_terms(picture, encoded, run.denoiser.grid, find_lora(encoded.region, self.loras))
        )
        if not terms:
            yield
            return
        mix = _MixHook(run, terms)
        handle = run.denoiser.module.register_forward_hook(outside_graphs(mix.after_forward))
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Term:
    """One term of the paper's sum: one prompt of one region of one picture of the batch."""

    branch: Literal["cond", "uncond"]
    picture: int
    prompt: EncodedPrompt | None
    """None for the prompt that the row has: a LoRA in one branch only would be multiplied by the guidance scale."""
    weights: Tensor
    """s_i M_i, shape (rows, columns) of a prediction."""
    description: str
    """The prompt's text, for error messages."""
    lora_name: str | None
    lora: LoRA | None


@dataclass(frozen=True, eq=False)
class _RowTerm:
    """A term in one call: the row of the batch that it belongs to."""

    row: int
    term: _Term

    @property
    def kind(self) -> tuple[str, bool]:
        """Terms of one kind can be predicted in one batch: with the same LoRA, and all with a prompt or all without."""
        return self.term.lora_name or "", self.term.prompt is None


def _region_terms(picture: int, encoded: EncodedRegion, grid: tuple[int, int], lora: LoRA | None) -> Iterator[_Term]:
    region = encoded.region
    weights = token_weights(region, grid)
    yield _Term("cond", picture, encoded.prompt, weights, region.prompt, region.lora, lora)
    if encoded.negative_prompt is not None or lora is not None:
        negative = "the negative prompt" if encoded.negative_prompt is None else f"not {region.negative_prompt}"
        yield _Term("uncond", picture, encoded.negative_prompt, weights, negative, region.lora, lora)


class _MixHook:
    """The forward hook of one run: replaces the denoiser's prediction by the mixed one."""

    def __init__(self, run: GuidedRun, terms: Sequence[_Term]) -> None:
        self._run = run
        self._denoiser = run.denoiser
        self._terms = terms
        self._batch_size = len(run.regions)
        self._step = 0
        self._called_loras: set[str | None] = set()
        """Names of LoRAs whose layers are known to be called."""

    def after_forward(self, _module: nn.Module, _args: tuple[Any, ...], output: Output) -> Output:
        call = self._run.call
        if call is None:  # the prediction of a term, below, or another guide's own
            return None
        branches = call.branches
        rows = {"cond": branches.cond, "uncond": branches.uncond}
        for batch_rows in rows.values():
            if len(batch_rows) not in (0, self._batch_size):
                raise GuideError(f"regions of {self._batch_size} pictures cannot steer a batch of {len(batch_rows)}.")
        row_terms = [_RowTerm(rows[term.branch][term.picture], term) for term in self._terms if rows[term.branch]]
        if not row_terms:
            return None
        self._step += bool(branches.cond)
        prediction = self._denoiser.prediction(output)
        self._check_finite(prediction, "the plan's prompt")
        with self._run.aside():
            return self._denoiser.with_prediction(output, self._mix(prediction, call.kwargs, row_terms))

    def _mix(self, prediction: Tensor, kwargs: ForwardKwargs, row_terms: Sequence[_RowTerm]) -> Tensor:
        """The paper's equation; rows without a region keep their prediction bit for bit."""
        # At least float32: a half-precision sum over many regions would lose what their weights say.
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        numerators = {item.row: prediction[item.row].to(dtype) for item in row_terms}
        denominators = {row: torch.ones((), device=prediction.device, dtype=dtype) for row in numerators}
        for batch in self._sub_batches(row_terms):
            for item, regional in zip(batch, self._predict(batch, kwargs), strict=True):
                weights = self._denoiser.broadcast_weights(item.term.weights).to(prediction.device, dtype)
                numerators[item.row] = numerators[item.row] + weights * regional
                denominators[item.row] = denominators[item.row] + weights
        mixed = prediction.clone()
        for row, numerator in numerators.items():
            mixed[row] = (numerator / denominators[row]).to(prediction.dtype)
        return mixed

    def _sub_batches(self, row_terms: Sequence[_RowTerm]) -> Iterator[Sequence[_RowTerm]]:
        """Terms of one kind, no more at a time than the batch has pictures."""
        for _, group in groupby(sorted(row_terms, key=lambda item: item.kind), key=lambda item: item.kind):
            items = list(group)
            yield from (items[start : start + self._batch_size] for start in range(0, len(items), self._batch_size))

    def _predict(self, batch: Sequence[_RowTerm], kwargs: ForwardKwargs) -> Tensor:
        """The denoiser's prediction of each row under each term's own prompt."""
        rows = [item.row for item in batch]
        prompts = [prompt for item in batch if (prompt := item.term.prompt) is not None]
        if prompts:
            kwargs = self._denoiser.with_prompt_embeds(kwargs, rows, prompts)
        lora = batch[0].term.lora
        with nullcontext() if lora is None else lora.applied_to(self._denoiser.module):
            # The module itself is called, not its forward, so that every other hook on it runs as well.
            prediction = self._denoiser.prediction(self._denoiser.module(**kwargs))
            if lora is not None and batch[0].term.lora_name not in self._called_loras:
                check_called(self._denoiser.module)
                self._called_loras.add(batch[0].term.lora_name)
        if not prompts:
            prediction = prediction[rows]
        self._check_finite(prediction, f"the region prompt(s) {[item.term.description for item in batch]}")
        return prediction

    def _check_finite(self, prediction: Tensor, prompt: str) -> None:
        if not prediction.isfinite().all():
            raise NonFiniteError(
                f"the denoiser predicted NaN or infinity for {prompt} at step {self._step}. "
                "Check the weights and the LoRAs; a float16 model may need bfloat16."
            )

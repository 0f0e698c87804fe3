"""The paper's guide: predict once for the plan's prompt and once for every region's, and average the predictions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from artaug.errors import GuideError, NonFiniteError
from artaug.regional.claim import claimed
from artaug.regional.guide import Denoiser, EncodedRegion, Guide
from artaug.regional.layout import token_weights


@dataclass(frozen=True, kw_only=True)
class OutputMix(Guide):
    """Mixes the denoiser's outputs, as ArtAug does (arXiv 2412.12888).

    At every step the prediction for the plan's prompt P and those for the region prompts P_i are averaged, token by
    token, with the regions' weights s_i and their masks M_i (area-averaged, feathered):

        v = (v(P) + sum_i s_i M_i v(P_i)) / (1 + sum_i s_i M_i)

    The paper's setting is weight 1 and feather 0, which is what a `Region` has unless told otherwise: inside one region
    its prompt and the plan's count half each, outside all regions nothing changes.

    It costs one more forward pass per region and step. These run in sub-batches no larger than the batch itself, so
    memory stays that of plain drawing. With classifier-free guidance only the branch of the plan's prompt is mixed.

    >>> import artaug as aa
    >>> aa.OutputMix()
    OutputMix()
    """

    @contextmanager
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> Iterator[None]:
        parts = tuple(
            _Part(row, one, token_weights(one.region, denoiser.grid))
            for row, of_row in enumerate(regions)
            for one in of_row
        )
        with claimed(denoiser.module, self):
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
    """One region of one picture of the batch."""

    row: int
    encoded: EncodedRegion
    weights: Tensor
    """Shape (rows, columns) of image tokens."""


class _Mixing:
    """The forward hook of one run: replaces a prediction for the plans' prompts by the mixed one."""

    def __init__(self, denoiser: Denoiser, parts: Sequence[_Part], batch: int) -> None:
        self._denoiser = denoiser
        self._parts = parts
        self._batch = batch
        self._steps = 0
        self._asking = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any], output: object) -> object:
        # Asking for a region's prediction calls the denoiser again, so that every other hook on it has its say.
        if self._asking or not self._denoiser.is_guided(call):
            return None
        if args:
            raise GuideError(
                f"{type(module).__name__} was called with {len(args)} positional arguments: need keywords."
            )
        self._steps += 1
        prediction = _prediction_of(output)
        self._check(prediction, "the plan's prompt")
        self._asking = True
        try:
            return _with_prediction(output, self._mixed(prediction, call))
        finally:
            self._asking = False

    def _mixed(self, prediction: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The paper's equation; rows without a region stay the very numbers they were."""
        if prediction.shape[0] != self._batch:
            raise GuideError(f"regions of {self._batch} pictures cannot steer a batch of {prediction.shape[0]}.")
        wide = torch.promote_types(prediction.dtype, torch.float32)
        rows = sorted({part.row for part in self._parts})
        sums = {row: prediction[row].to(wide) for row in rows}
        totals = {row: torch.ones(prediction.shape[1], 1, device=prediction.device, dtype=wide) for row in rows}
        for start in range(0, len(self._parts), self._batch):
            parts = self._parts[start : start + self._batch]
            for part, regional in zip(parts, self._asked(parts, call), strict=True):
                weights = part.weights.reshape(-1, 1).to(totals[part.row])
                sums[part.row] = sums[part.row] + weights * regional
                totals[part.row] = totals[part.row] + weights
        mixed = prediction.clone()
        for row in rows:
            mixed[row] = (sums[row] / totals[row]).to(prediction.dtype)
        return mixed

    def _asked(self, parts: Sequence[_Part], call: Mapping[str, Any]) -> Tensor:
        """The denoiser's prediction for each part's row under that part's own prompt."""
        encoded = [part.encoded.conditioning for part in parts]
        conditioning = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
        call = self._denoiser.recondition(call, [part.row for part in parts], conditioning)
        prediction = _prediction_of(self._denoiser.module(**call))
        self._check(prediction, f"the region prompt(s) {[part.encoded.region.prompt for part in parts]}")
        return prediction

    def _check(self, prediction: Tensor, prompt: str) -> None:
        if not prediction.isfinite().all():
            raise NonFiniteError(
                f"the denoiser predicted NaN or infinity for {prompt} at step {self._steps}. "
                "Check the weights, and the LoRA worn; a float16 model may need bfloat16."
            )


def _prediction_of(output: object) -> Tensor:
    """The prediction in a denoiser's output: a tensor, a tuple that begins with it, or diffusers' output object."""
    if isinstance(output, Tensor):
        return output
    prediction: Tensor = output[0]  # type: ignore[index]
    return prediction


def _with_prediction(output: object, prediction: Tensor) -> object:
    """The same kind of output with another prediction in it."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    first = dataclasses.fields(output)[0].name  # type: ignore[arg-type]
    return dataclasses.replace(output, **{first: prediction})  # type: ignore[type-var]

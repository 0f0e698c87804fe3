"""Guidance by several contexts, as IRG draws its second turn: with and without the reflection, with and without the picture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_finite_number
from artaug._internal.modules import outside_graphs
from artaug.errors import GuideError
from artaug.plan import Plan
from artaug.regional import Guide, GuidedRun
from artaug.regional.coverage import token_weights
from artaug.regional.denoiser import AttentiveDenoiser, Output

_EPSILON = 1e-8


@checked
def serial_guidance(
    full: Tensor,
    without_text: Tensor,
    without_image: Tensor | None = None,
    *,
    text_scale: float = 4.0,
    image_scale: float = 2.0,
    least_norm: float = 0.0,
    channel_dim: int = -1,
) -> Tensor:
    """Combine the predictions of three contexts, the text first and then the picture (IRG, turn 2).

    With ``v`` the prediction in the whole context, ``v_text`` that without the reflection and ``v_image`` that without the picture::

        u   = v_text + text_scale (v - v_text)
        u   = u clamp(|v| / (|u| + 1e-8), least_norm, 1)      norms over channels, at each place
        out = v_image + image_scale (u - v_image)

    In the paper's code the scales of turn 2 are 4.0 and 2.0, its digests say 2.0 for both; and the picture's scale acts there only where
    the text's is above 1. Here each acts by itself.

    Args:
        full: any shape.
        without_text: of the same shape.
        without_image: of the same shape; None for a model that sees no picture: then ``u`` is the result.
        text_scale: 1 for none.
        image_scale: 1 for none.
        least_norm: the least factor of the renormalization, in [0, 1].
        channel_dim: over which norms are taken; -1 for tokens, 1 for latents of shape (batch, channels, height, width).

    >>> import torch
    >>> from artaug.recipes import serial_guidance
    >>> full, plain = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    >>> serial_guidance(full, plain, text_scale=2.0)  # (3, 5), at the length of (3, 4)
    tensor([[2.5725, 4.2875]])
    """
    text: Tensor = without_text + text_scale * (full - without_text)
    lengths = [torch.linalg.vector_norm(one, dim=channel_dim, keepdim=True) for one in (full, text)]
    text = text * (lengths[0] / (lengths[1] + _EPSILON)).clamp(least_norm, 1.0)
    if without_image is not None:
        text = without_image + image_scale * (text - without_image)
    return text


@checked
@final
@dataclass(frozen=True, kw_only=True)
class ContextGuidance(Guide):
    """Guides a picture from the context of its plan's prompt towards that of a region's, as guidance by the lack of a text does.

    Within a region's area the prediction is `serial_guidance` of the region's prompt as the whole context against the plan's prompt
    as the one without it; a `ReflectionPlanner` with ``contexts`` makes such plans. It costs one more forward pass a region and step.
    Unlike `OutputMix`, which averages, it goes beyond the region's prompt with a scale above 1. With classifier-free guidance, the
    branch of the prompt is guided.

    *The paper's:* the order of the combination, the renormalization, the interval. *Ours:* two contexts of text. What a picture
    adds as a context is part of `serial_guidance` only: that takes a model that reads the picture beside the prompt.

    Raises:
        InvalidValueError: for a scale that is not finite, or an interval that is not within [0, 1].

    >>> from artaug.recipes import ContextGuidance
    >>> ContextGuidance(text_scale=4.0).interval
    (0.0, 1.0)
    """

    text_scale: float = 4.0
    """1 draws from the region's prompt alone, and 0 from the plan's."""
    least_norm: float = 0.0
    """See `serial_guidance`."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels at which it acts, above the first and up to the second; at others the scale is 1. In the paper's first turn,
    which has plain guidance, that is (0.4, 1], in the second (0, 1]."""

    def __post_init__(self) -> None:
        check_finite_number("ContextGuidance", "text_scale", self.text_scale)
        check_finite_number("ContextGuidance", "least_norm", self.least_norm)
        low, high = self.interval
        if not 0 <= low < high <= 1 or not 0 <= self.least_norm <= 1:
            name = "least_norm" if 0 <= low < high <= 1 else "interval"
            raise argument_error("ContextGuidance", name, getattr(self, name), expected="numbers in [0, 1], rising")

    def declines(self, plans: Sequence[Plan]) -> bool:
        return not any(plan.regions for plan in plans)

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        denoiser = run.denoiser

        def after_forward(_module: nn.Module, _args: tuple[Any, ...], output: Output) -> Output:
            call = run.call
            if call is None or not call.branches.cond:  # a guide's own prediction, or the branch of the negative prompt
                return None
            scale = self.text_scale if self._acts(run) else 1.0
            guided = denoiser.prediction(output).clone()
            with run.aside():
                for row, regions in zip(call.branches.cond, run.regions, strict=True):
                    base = guided[row].clone()
                    for encoded in regions:
                        kwargs = denoiser.with_prompt_embeds(call.kwargs, [row], [encoded.prompt])
                        full = denoiser.prediction(denoiser.module(**kwargs))[0]
                        weights = denoiser.broadcast_weights(token_weights(encoded.region, denoiser.grid)).to(base)
                        axis = -1 if weights.ndim == base.ndim else 0  # (tokens, channels), or channels first
                        text = serial_guidance(
                            full, base, text_scale=scale, least_norm=self.least_norm, channel_dim=axis
                        )
                        guided[row] = guided[row] + weights.clamp(max=1) * (text - guided[row])
            return denoiser.with_prediction(output, guided)

        handle = denoiser.module.register_forward_hook(outside_graphs(after_forward))
        try:
            yield
        finally:
            handle.remove()

    def _acts(self, run: GuidedRun) -> bool:
        if self.interval == (0.0, 1.0) or run.call is None:
            return True
        if not isinstance(run.denoiser, AttentiveDenoiser):
            raise GuideError(
                f"{type(run.denoiser).__name__} does not say its noise level, so the interval {self.interval} cannot be kept. "
                "Leave it at (0, 1)."
            )
        return self.interval[0] < run.denoiser.noise_level(run.call.kwargs) <= self.interval[1]

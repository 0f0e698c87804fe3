"""The proof that what is trained has an effect: layers that get no gradient in the first steps are named."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn

_log = logging.getLogger(__name__)
_STEPS = 25
"""Steps with a gradient until layers without one are named. A factor that starts at zero passes no gradient to the other
one, but gets its own in the first step; more steps are for layers that act at some noise levels only."""
_NAMED = 12


class UnusedLayerCheck:
    """Watches the gradients of all layers in training until each had one, usually for one step."""

    def __init__(self) -> None:
        self._unused: list[str] | None = None
        self._layers = 0
        self._steps = 0

    def observe(self, trained: Mapping[str, Mapping[str, nn.Parameter]], *, gradient_norm: float) -> None:
        """Look at the gradients of a step, and after enough steps name the layers that never had one.

        Args:
            trained: the parameters by layer, with the step's gradients.
            gradient_norm: their norm; a step at 0, as of pairs without a change, says nothing of layers.
        """
        if self._unused is None:
            self._unused, self._layers = list(trained), len(trained)
        if not self._unused or gradient_norm == 0:
            return
        self._steps += 1
        used = _layers_with_gradient({name: trained[name] for name in self._unused})
        self._unused = [name for name in self._unused if name not in used]
        if self._steps == _STEPS:
            self.finish()

    def finish(self) -> None:
        """Name the layers that had no gradient, unless that was done."""
        if self._unused and self._steps:
            names, more = ", ".join(self._unused[:_NAMED]), len(self._unused) - _NAMED
            _log.warning(
                "%d of %d layers in training got no gradient in the first %d steps, so the LoRA does not change them: %s. Usual "
                "reasons: the model calls fused projections in their place (call unfuse_qkv_projections()); they are text "
                "layers of the last block of SD3 or Qwen-Image, whose output is dropped; attention has a single token there. "
                "Leave them out of targets, or draw pairs in which they take part.",
                *(len(self._unused), self._layers, self._steps, names + (f" and {more} more" if more > 0 else "")),
            )
        self._unused = []


def _layers_with_gradient(trained: Mapping[str, Mapping[str, nn.Parameter]]) -> set[str]:
    """The layers of which some parameter has a gradient that is not zero: one exchange with the device."""
    owners, gradients = [], []
    for name, parameters in trained.items():
        for parameter in parameters.values():
            if parameter.grad is not None:
                owners.append(name)
                gradients.append(parameter.grad)
    if not gradients:
        return set()
    # The largest absolute value: the square of a small gradient may be zero.
    norms = torch._foreach_norm(gradients, math.inf)  # noqa: SLF001 - as torch.nn.utils does
    largest = torch.stack([norm.to(gradients[0].device) for norm in norms])
    return {name for name, value in zip(owners, largest.tolist(), strict=True) if value != 0}

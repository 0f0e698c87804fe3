"""A LoRA on a model while it is trained: put on, used as student and teacher, read off, and gone without trace.

PEFT wraps the layers, so quantised ones work too; it is imported when training begins, and not before.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from artaug.errors import LoRAMismatchError, ModelError
from artaug.lora import LoRA, LowRank
from artaug.training.model import Conditioning, Predictor
from artaug.training.noising import Latents, Levels, Noising
from artaug.training.quantised import check_gradients, set_to_learn
from artaug.training.scaling import scaled_in_backward

_NAME = "artaug"


class LoRALayer(Protocol):
    """What is used of PEFT's wrapper of a layer, typed here since importing PEFT waits until training begins."""

    def enable_adapters(self, enabled: bool) -> None:
        """Let the wrapper add its update, or be the plain layer."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter at a path inside the wrapper."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter count so many times what its alpha and rank say."""


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A frozen model with one LoRA in training: the `Student` of every objective."""

    model: Predictor
    wrapped: Mapping[str, LoRALayer]
    """PEFT's LoRA layers by the path of the layer they wrap."""

    @property
    def noising(self) -> Noising:
        """How the model's pictures are noised, and what it predicts."""
        return self.model.noising

    def predict(self, noisy: Latents, sigmas: Levels, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """The prediction with the LoRA, ``scale`` times: float32, with gradient."""
        self.wear(scale)
        try:
            prediction = self.model.predict(noisy, sigmas, conditioning).float()
        finally:
            self.wear(1.0)
        return scaled_in_backward(prediction, self.wear, scale)

    def wear(self, scale: float) -> None:
        """Let the LoRA count ``scale`` times until told otherwise."""
        for layer in self.wrapped.values():
            layer.set_scale(_NAME, scale)

    def teacher(self, noisy: Latents, sigmas: Levels, conditioning: Conditioning) -> Latents:
        """The prediction without the LoRA: float32, without gradient."""
        for layer in self.wrapped.values():
            layer.enable_adapters(enabled=False)
        try:
            with torch.no_grad():
                return self.model.predict(noisy, sigmas, conditioning).float()
        finally:
            for layer in self.wrapped.values():
                layer.enable_adapters(enabled=True)

    def parameters(self) -> list[nn.Parameter]:
        """The LoRA's float32 factors, in the order of the model's layers."""
        return [factor for layer in self.wrapped.values() for factor in _factors(layer)]

    def layers(self) -> dict[str, LowRank]:
        """The factors as they are now, by layer: float32 copies on the CPU."""
        factors = {name: _factors(layer) for name, layer in self.wrapped.items()}
        return {name: LowRank(_detached(down), _detached(up)) for name, (down, up) in factors.items()}

    def lora(self) -> LoRA:
        """What has been learned, as a value of its own."""
        return LoRA(self.layers())

    @torch.no_grad()
    def put(self, layers: Mapping[str, LowRank]) -> None:
        """Set the factors to what `layers` gave."""
        for name, layer in self.wrapped.items():
            down, up = _factors(layer)
            down.copy_(layers[name].down)
            up.copy_(layers[name].up)

    def on(self, model: Predictor) -> "AdaptedModel":
        """The same student, for pictures of another size: ``model`` has the same denoiser."""
        return self if model is self.model else replace(self, model=model)


@contextmanager
def adapted(model: Predictor, *, rank: int, targets: str, generator: torch.Generator) -> Iterator[AdaptedModel]:
    """Give ``model`` a fresh LoRA inside the ``with`` block, and leave it exactly as it was after it.

    The update starts at zero: ``down`` is Kaiming-uniform from ``generator``, ``up`` is zero, and alpha equals the rank.

    Raises:
        LoRAMismatchError: if ``targets`` selects no linear layer.
        ModelError: if the model carries PEFT adapters already, or is quantised in a way that passes no true gradient.
    """
    module = model.module
    if present := module.__dict__.get("peft_config"):
        raise ModelError(
            f"{type(module).__name__} carries PEFT adapters already ({', '.join(present)}). "
            "Unload them, and give LoRAs to the synthesizer with with_lora."
        )
    layers = targeted_layers(module, targets)
    with left_as_found(module, layers):
        module.eval()  # dropout would tell student and teacher apart
        set_to_learn(module)
        check_gradients(module, layers)
        _wrap(module, layers, rank)
        wrapped = {name: cast("LoRALayer", module.get_submodule(name)) for name in layers}
        _initialise(wrapped, generator)
        yield AdaptedModel(model, wrapped)


def targeted_layers(module: nn.Module, targets: str) -> dict[str, nn.Module]:
    """The linear layers of ``module`` in whose path the regular expression ``targets`` is found.

    Raises:
        LoRAMismatchError: if there is none, naming one that could have been meant.
    """
    linear = {name: one for name, one in module.named_modules() if name and hasattr(one, "in_features")}
    chosen = {name: one for name, one in linear.items() if re.search(targets, name)}
    if not chosen:
        middle = list(linear)[len(linear) // 2] if linear else "(no linear layer)"
        raise LoRAMismatchError(
            f"the targets {targets!r} select none of the {len(linear)} linear layers of {type(module).__name__}; "
            f"names there look like {middle!r}."
        )
    return chosen


@contextmanager
def left_as_found(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put back the very layers, flags and attributes that were there, whatever happens in between."""
    training = [(one, one.training) for one in module.modules()]
    trainable = [(one, one.requires_grad) for one in module.parameters()]
    try:
        yield
    finally:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
        module.__dict__.pop("peft_config", None)
        for one, flag in training:
            one.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _wrap(module: nn.Module, layers: Mapping[str, nn.Module], rank: int) -> None:
    from peft import LoraConfig  # noqa: PLC0415 - loads transformers
    from peft.tuners.lora import LoraModel  # noqa: PLC0415

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="|".join(re.escape(name) for name in layers),  # a string is matched against the whole path
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT draws from the global generator, and we overwrite what it drew; it warns of merging, which we never do.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without", category=UserWarning)
        LoraModel(module, config, _NAME)


def _initialise(wrapped: Mapping[str, LoRALayer], generator: torch.Generator) -> None:
    for layer in wrapped.values():
        down, up = _factors(layer)
        bound = 1 / math.sqrt(down.shape[1])  # Kaiming-uniform with a = sqrt(5), as PEFT and nn.Linear do
        drawn = (2 * torch.rand(down.shape, generator=generator) - 1) * bound
        down.data, up.data = drawn.to(down.device), torch.zeros(up.shape, device=up.device)


def _factors(layer: LoRALayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.get_parameter(f"lora_A.{_NAME}.weight"), layer.get_parameter(f"lora_B.{_NAME}.weight")


def _detached(factor: nn.Parameter) -> Tensor:
    return factor.detach().cpu().clone()

"""A LoRA on a model while it is trained: put on, used as student and teacher, read off, and gone without trace.

PEFT wraps the layers, so quantized ones work too; it is imported when training begins, and not before.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from artaug.errors import ContractError, LoRAMismatchError, ModelError
from artaug.lora.lora import LoRA
from artaug.training.adapters import Adapter, AdapterTensors, LayerWeights, PlainLoRA
from artaug.training.model import Conditioning, Predictor
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.quantized import check_dequantizable, check_gradients, prepare_for_training
from artaug.training.scaling import backward_at_scale
from artaug.training.teacher_cache import TeacherCache

_NAME = "artaug"
_PLAIN = PlainLoRA()


class LoRALayer(Protocol):
    """What is used of PEFT's wrapper of a layer, typed here since importing PEFT waits until training begins."""

    lora_A: nn.ModuleDict  # noqa: N815 - PEFT's name
    lora_B: nn.ModuleDict  # noqa: N815 - likewise
    lora_magnitude_vector: nn.ModuleDict
    cast_input_dtype_enabled: bool

    def enable_adapters(self, enabled: bool) -> None:
        """Let the wrapper add its update, or be the plain layer."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter count so many times what its alpha and rank say."""

    def get_base_layer(self) -> nn.Module:
        """The layer that is wrapped."""


@dataclass(frozen=True, eq=False)
class AdapterStudent:
    """A frozen model with one adapter in training: the `Student` of every objective."""

    model: Predictor
    adapter: Adapter
    wrapped: Mapping[str, LoRALayer]
    """PEFT's LoRA layers by the path of the layer they wrap."""
    trained: Mapping[str, Mapping[str, nn.Parameter]]
    """What is learned, by layer and part: float32."""
    teacher_cache: TeacherCache | None = None
    """What the teacher has said, if batches come again."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How the model's pictures are noised, and what it predicts."""
        return self.model.noise_schedule

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """The prediction with the update, ``scale`` times: float32, with gradient.

        Raises:
            ModelError: for a scale that the adapter has no meaning for.
        """
        if scale != 1 and self.adapter.use_dora:
            raise ModelError(
                f"the objective asks for {scale:g} times the update, and {type(self.adapter).__name__} turns weights "
                "instead of adding to them: there is no such thing. Train a PlainLoRA or a LoKr."
            )
        self.wear(scale)
        try:
            prediction = self.model.predict(noisy, sigmas, conditioning).float()
        finally:
            self.wear(1.0)
        return backward_at_scale(prediction, self.wear, scale)

    def wear(self, scale: float) -> None:
        """Let the update count ``scale`` times until told otherwise."""
        for layer in self.wrapped.values():
            layer.set_scale(_NAME, scale)

    def teacher_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The prediction without it: float32, without gradient."""
        if self.teacher_cache is None:
            return self._taught(noisy, sigmas, conditioning).float()
        asked = {"noisy": noisy, "sigmas": sigmas, **{f"text.{name}": one for name, one in conditioning.items()}}
        return self.teacher_cache.get_or_compute(asked, lambda: self._taught(noisy, sigmas, conditioning)).float()

    @torch.no_grad()
    def _taught(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        for layer in self.wrapped.values():
            layer.enable_adapters(enabled=False)
        try:
            return self.model.predict(noisy, sigmas, conditioning)
        finally:
            for layer in self.wrapped.values():
                layer.enable_adapters(enabled=True)

    def parameters(self) -> list[nn.Parameter]:
        """All that is learned, in the order of the model's layers."""
        return [part for parts in self.trained.values() for part in parts.values()]

    def layers(self) -> dict[str, AdapterTensors]:
        """What is learned as it is now, by layer: float32 copies on the CPU."""
        return self.filled(self.parameters())

    def filled(self, values: Iterable[Tensor]) -> dict[str, AdapterTensors]:
        """Copies of tensors in the order of `parameters`, by layer, on the CPU."""
        given = iter(values)
        return {
            name: {part: next(given).detach().cpu().clone() for part in parts} for name, parts in self.trained.items()
        }

    def lora(self, layers: Mapping[str, AdapterTensors] | None = None) -> LoRA:
        """What has been learned, or what `layers` gave, as a LoRA."""
        return self.adapter.lora(self.layers() if layers is None else layers, self.weights)

    @torch.no_grad()
    def put(self, layers: Mapping[str, AdapterTensors]) -> None:
        """Set all that is learned to what `layers` gave."""
        for name, parts in self.trained.items():
            for part, parameter in parts.items():
                parameter.copy_(layers[name][part])

    def on(self, model: Predictor) -> "AdapterStudent":
        """The same student, for pictures of another size: ``model`` has the same denoiser."""
        return self if model is self.model else replace(self, model=model)

    @torch.no_grad()
    def weights(self, name: str) -> LayerWeights:
        """What a frozen layer multiplies with. LoRAs it wears are hooks: they are found by asking the layer."""
        from peft.utils.integrations import dequantize_module_weight  # noqa: PLC0415 - loads transformers

        layer: Any = self.wrapped[name].get_base_layer()
        stored: Tensor = dequantize_module_weight(layer)
        asked = torch.eye(layer.in_features, device=stored.device, dtype=stored.dtype)
        used: Tensor = layer(asked) - layer(torch.zeros_like(asked[:1]))
        return LayerWeights(stored.float(), used.float().T)


@contextmanager
def inject_adapter(
    model: Predictor,
    *,
    rank: int,
    targets: str,
    generator: torch.Generator,
    adapter: Adapter = _PLAIN,
    teacher_cache: TeacherCache | None = None,
) -> Iterator[AdapterStudent]:
    """Give ``model`` a fresh adapter inside the ``with`` block, and leave it exactly as it was after it.

    Its update starts at zero.

    Raises:
        LoRAMismatchError: if ``targets`` selects no linear layer.
        ModelError: if the model carries PEFT adapters already, is quantized in a way that passes no true gradient, or has
            weights that the adapter cannot read.
    """
    module, device = model.module, model.device  # which a pipeline looks for through all its parts: once
    layers = trainable_layers(module, targets, adapter, device)
    with restored_on_exit(module, layers):
        module.eval()  # dropout would tell student and teacher apart
        prepare_for_training(module)
        check_gradients(module, layers)
        _wrap(module, layers, rank, use_dora=adapter.use_dora)
        wrapped = {name: cast("LoRALayer", module.get_submodule(name)) for name in layers}
        trained = {name: _begun(layer, adapter, rank, generator, device) for name, layer in wrapped.items()}
        yield AdapterStudent(model, adapter, wrapped, trained, teacher_cache)


def trainable_layers(module: nn.Module, targets: str, adapter: Adapter, device: torch.device) -> dict[str, nn.Module]:
    """The layers that are to learn, if they can.

    Raises:
        LoRAMismatchError: if ``targets`` selects no linear layer.
        ModelError: if the model carries PEFT adapters already, or has weights that the adapter cannot read.
    """
    if present := module.__dict__.get("peft_config"):
        raise ModelError(
            f"{type(module).__name__} carries PEFT adapters already ({', '.join(present)}). "
            "Unload them, and give LoRAs to the synthesizer with with_lora."
        )
    layers = find_target_layers(module, targets)
    if adapter.use_dora:
        check_dequantizable(layers, device)
    return layers


def find_target_layers(module: nn.Module, targets: str) -> dict[str, nn.Module]:
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
def restored_on_exit(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
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


def _wrap(module: nn.Module, layers: Mapping[str, nn.Module], rank: int, *, use_dora: bool) -> None:
    from peft import LoraConfig  # noqa: PLC0415 - loads transformers
    from peft.tuners.lora import LoraModel  # noqa: PLC0415

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="|".join(re.escape(name) for name in layers),  # a string is matched against the whole path
        init_lora_weights=False,
        use_dora=use_dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT draws from the global generator, and we replace what it drew; it warns of merging, which we never do.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without", category=UserWarning)
        LoraModel(module, config, _NAME)


def _begun(
    layer: LoRALayer, adapter: Adapter, rank: int, generator: torch.Generator, device: torch.device
) -> dict[str, nn.Parameter]:
    """Put an adapter's own factors where PEFT has put its, and say what is learned."""
    base: Any = layer.get_base_layer()
    stored: torch.device = base.weight.device
    waits = stored.type in {"cpu", "meta"}  # offloaded, unless the model computes there, too
    factors = adapter.factors(base.in_features, base.out_features, rank, generator)
    if not all(hasattr(one, "weight") for one in (factors if adapter.use_dora else factors[:1])):
        kinds = " and ".join(type(one).__name__ for one in factors)
        raise ContractError(
            f"{type(adapter).__name__}.factors returned {kinds}, and PEFT asks for their weight: need one."
        )
    down, up = (one.to(device if waits else stored) for one in factors)
    layer.lora_A[_NAME], layer.lora_B[_NAME] = down, up
    layer.cast_input_dtype_enabled = adapter.use_dora  # lengths of rows are no numbers for sixteen bits
    parts = {f"down.{name}": one for name, one in down.named_parameters()}
    parts |= {f"up.{name}": one for name, one in up.named_parameters()}
    if adapter.use_dora:
        lengths: Any = layer.lora_magnitude_vector[_NAME]
        first, last = (one.weight.to(stored) for one in (down, up))
        lengths.update_layer(base_layer=base, lora_A=first, lora_B=last, scaling=1.0)
        parts["magnitude"] = lengths.to(down.weight.device).weight
    return parts

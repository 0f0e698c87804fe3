"""The student and its teacher: a frozen model with one adapter in training, injected by PEFT and removed without a trace.

PEFT wraps the layers, so quantized ones work too; it is imported when training begins, not before.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from artaug._internal.modules import named_modules, unwrap
from artaug.errors import ContractError, LoRAMismatchError, ModelError
from artaug.lora.applied import fused_layers, unused_layers
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.regional.denoiser import Conditioning
from artaug.regional.guide import Guide
from artaug.training.adapters import Adapter, AdapterTensors, LayerWeights, PlainLoRA
from artaug.training.model import Predictor, as_decoder
from artaug.training.noise_schedule import DecodedPictures, Latents, NoiseSchedule, Sigmas
from artaug.training.quantized import check_dequantizable, check_gradients, prepare_for_training
from artaug.training.steering import Steering
from artaug.training.teacher_cache import TeacherCache

_ADAPTER_NAME = "artaug"
_PLAIN_LORA = PlainLoRA()


class LoRALayer(Protocol):
    """The part of PEFT's wrapper of a layer that is used here, typed since PEFT is imported only when training begins."""

    lora_A: nn.ModuleDict  # noqa: N815 - PEFT's name
    lora_B: nn.ModuleDict  # noqa: N815 - likewise
    lora_magnitude_vector: nn.ModuleDict
    cast_input_dtype_enabled: bool

    def enable_adapters(self, enabled: bool) -> None:
        """Let the wrapper add its update, or be the plain layer."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's update, beside its alpha over rank."""

    def get_base_layer(self) -> nn.Module:
        """The layer that is wrapped."""


@dataclass(frozen=True, eq=False)
class AdapterStudent:
    """A frozen model with one adapter in training: the `Student` that objectives get."""

    model: Predictor
    adapter: Adapter
    wrapped: Mapping[str, LoRALayer]
    """PEFT's LoRA layers by the path of the layer they wrap."""
    trained: Mapping[str, Mapping[str, nn.Parameter]]
    """The trained parameters, by layer and name: float32."""
    teacher_cache: TeacherCache | None = None
    """Predictions of the teacher, if batches are used several times."""
    steering: Steering = field(default_factory=Steering)
    """The guides of its predictions."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How the model's pictures are noised, and what it predicts."""
        return self.model.noise_schedule

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """The prediction with ``scale`` times the update: float32, with gradient.

        Raises:
            ModelError: if the adapter's update cannot be scaled, as DoRA's, and ``scale`` is not 1; or if the prediction
                depends on no layer in training.
        """
        with self.steering.unguided():
            return self._predict(noisy, sigmas, conditioning, scale=scale)

    def predict_guided(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, guide: Guide, plans: Sequence[Plan]
    ) -> Latents:
        """The prediction with the update under a guide: float32, with gradient.

        Raises:
            ModelError: if there is not a plan for each row, the model cannot be guided, or the guide reads regions.
        """
        if len(plans) != len(sigmas):
            raise ModelError(
                f"a prediction of {len(sigmas)} rows under {type(guide).__name__} came with {len(plans)} plans. Expected one for "
                "each row, such as batch.plans of a batch that a trainer has made."
            )
        with self.steering.guided(self.model, guide, plans, conditioning):
            return self._predict(noisy, sigmas, conditioning, scale=1.0)

    def _predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float) -> Latents:
        if scale != 1 and self.adapter.use_dora:
            raise ModelError(
                f"the objective asks for {scale:g} times the update, and {type(self.adapter).__name__} rotates weights "
                "instead of adding to them, so its update has no scale. Train a PlainLoRA or a LoKr."
            )
        self.set_scale(scale)
        try:
            prediction = self.model.predict(noisy, sigmas, conditioning).float()
        finally:
            self.set_scale(1.0)
        if torch.is_grad_enabled() and not prediction.requires_grad:
            raise ModelError(
                f"the prediction of {type(self.model.module).__name__} depends on none of the {len(self.wrapped)} layers in "
                f"training ({next(iter(self.wrapped))!r} is one): the model does not call them. If its projections are "
                "fused, call unfuse_qkv_projections() first; else choose other targets."
            )
        return backward_at_scale(prediction, self.set_scale, scale)

    def set_scale(self, scale: float) -> None:
        """Let the update count ``scale`` times from now on."""
        for layer in self.wrapped.values():
            layer.set_scale(_ADAPTER_NAME, scale)

    def teacher_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The prediction without the update: float32, without gradient."""
        if self.teacher_cache is None:
            return self._predict_without_adapter(noisy, sigmas, conditioning).float()
        inputs = {"noisy": noisy, "sigmas": sigmas, **{f"text.{name}": text for name, text in conditioning.items()}}
        return self.teacher_cache.get_or_compute(
            inputs, lambda: self._predict_without_adapter(noisy, sigmas, conditioning)
        ).float()

    @torch.no_grad()
    def _predict_without_adapter(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        for layer in self.wrapped.values():
            layer.enable_adapters(enabled=False)
        try:
            with self.steering.unguided():
                return self.model.predict(noisy, sigmas, conditioning)
        finally:
            for layer in self.wrapped.values():
                layer.enable_adapters(enabled=True)

    def decode(self, latents: Latents) -> DecodedPictures:
        """Pictures of clean latents: float32, in [0, 1], with gradient to the latents.

        Raises:
            ModelError: if the model does not decode latents.
        """
        return as_decoder(self.model).decode_latents(latents)

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of the model's layers."""
        return [parameter for parameters in self.trained.values() for parameter in parameters.values()]

    def tensors(self) -> dict[str, AdapterTensors]:
        """The trained parameters as they are now, by layer: float32 copies on the CPU."""
        return self.group_by_layer(self.parameters())

    def group_by_layer(self, tensors: Iterable[Tensor]) -> dict[str, AdapterTensors]:
        """Copies of tensors in the order of `parameters`, by layer, on the CPU."""
        values = iter(tensors)
        return {
            layer: {name: next(values).detach().cpu().clone() for name in parameters}
            for layer, parameters in self.trained.items()
        }

    def to_lora(self, layers: Mapping[str, AdapterTensors] | None = None) -> LoRA:
        """The current parameters, or ``layers`` in the form of `tensors`, as a LoRA."""
        return self.adapter.to_lora(self.tensors() if layers is None else layers, self.layer_weights)

    @torch.no_grad()
    def load(self, layers: Mapping[str, AdapterTensors]) -> None:
        """Set all trained parameters to what `tensors` returned."""
        for layer, parameters in self.trained.items():
            for name, parameter in parameters.items():
                parameter.copy_(layers[layer][name])

    def with_model(self, model: Predictor) -> "AdapterStudent":
        """The same student for pictures of another size: ``model`` has the same denoiser."""
        return self if model is self.model else replace(self, model=model)

    @torch.no_grad()
    def layer_weights(self, name: str) -> LayerWeights:
        """The weights of a frozen layer. Applied LoRAs are hooks, so their sum is read off the layer's outputs."""
        from peft.utils.integrations import dequantize_module_weight  # noqa: PLC0415 - loads transformers

        layer: Any = self.wrapped[name].get_base_layer()
        stored: Tensor = dequantize_module_weight(layer)
        # For y = x W^T + b: the rows of the identity give W^T + b, and a zero row gives b.
        identity = torch.eye(layer.in_features, device=stored.device, dtype=stored.dtype)
        used: Tensor = layer(identity) - layer(torch.zeros_like(identity[:1]))
        return LayerWeights(stored.float(), used.float().T)


@contextmanager
def inject_adapter(
    model: Predictor,
    *,
    rank: int,
    targets: str,
    generator: torch.Generator,
    adapter: Adapter = _PLAIN_LORA,
    teacher_cache: TeacherCache | None = None,
) -> Iterator[AdapterStudent]:
    """Give ``model`` a new adapter inside the ``with`` block, and leave it exactly as it was after it.

    Its update starts at zero.

    Raises:
        LoRAMismatchError: if ``targets`` selects no linear layer.
        ModelError: if the model carries PEFT adapters already, is quantized in a way that gives no true gradient, or has
            weights that the adapter cannot read.
    """
    module, device = unwrap(model.module), model.device  # read once: a pipeline searches all its parts for its device
    layers = trainable_layers(module, targets, adapter, device)
    paths = {name: item.path for name, item in named_modules(module).items() if name in layers}
    with restored_on_exit(module, {paths[name]: layer for name, layer in layers.items()}):
        module.eval()  # dropout would make student and teacher differ
        prepare_for_training(module)
        check_gradients(module, layers)
        _wrap_layers(module, paths.values(), rank, use_dora=adapter.use_dora)
        wrapped = {name: cast("LoRALayer", module.get_submodule(paths[name])) for name in layers}
        trained = {name: _install_factors(layer, adapter, rank, generator, device) for name, layer in wrapped.items()}
        yield AdapterStudent(model, adapter, wrapped, trained, teacher_cache)


def trainable_layers(module: nn.Module, targets: str, adapter: Adapter, device: torch.device) -> dict[str, nn.Module]:
    """The layers that ``targets`` selects, after the check that they can be trained.

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
    """The linear layers of ``module`` in whose name the regular expression ``targets`` is found.

    Raises:
        LoRAMismatchError: if there is none, naming one that could have been meant.
        ModelError: if some of them are out of use, since their projections are fused.
    """
    module = unwrap(module)
    modules = named_modules(module)
    unused = unused_layers(modules)
    linear = {
        name: item.module
        for name, item in modules.items()
        if name and hasattr(item.module, "in_features") and name not in unused
    }
    layers = {name: layer for name, layer in linear.items() if re.search(targets, name)}
    if not layers:
        example = list(linear)[len(linear) // 2] if linear else "(no linear layer)"
        raise LoRAMismatchError(
            f"the targets {targets!r} select none of the {len(linear)} linear layers of {type(module).__name__}; "
            f"names there look like {example!r}."
        )
    fused = fused_layers(modules)
    if fused_targets := [name for name in layers if name in fused or name in fused.values()]:
        raise ModelError(
            f"{len(fused_targets)} of the {len(layers)} layers that the targets select are in attention with fused projections "
            f"(first: {fused_targets[0]!r}), where nothing could be learned that fits an ordinary pipeline. Call the "
            f"unfuse_qkv_projections() of the {type(module).__name__} first."
        )
    return layers


@contextmanager
def restored_on_exit(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put back ``layers``, which are by their paths, and every flag and attribute of ``module`` when the block ends, after an exception too."""
    training = [(submodule, submodule.training) for submodule in module.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
        module.__dict__.pop("peft_config", None)
        for submodule, flag in training:
            submodule.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _wrap_layers(module: nn.Module, paths: Iterable[str], rank: int, *, use_dora: bool) -> None:
    from peft import LoraConfig  # noqa: PLC0415 - loads transformers
    from peft.tuners.lora import LoraModel  # noqa: PLC0415

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="|".join(map(re.escape, paths)),  # a string is matched against the whole path
        init_lora_weights=False,
        use_dora=use_dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT draws from the global generator, and we replace what it drew; it warns of merging, which we never do.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without", category=UserWarning)
        LoraModel(module, config, _ADAPTER_NAME)


def _install_factors(
    layer: LoRALayer, adapter: Adapter, rank: int, generator: torch.Generator, device: torch.device
) -> dict[str, nn.Parameter]:
    """Replace PEFT's factors of a layer by the adapter's own, and return the parameters to train."""
    base: Any = layer.get_base_layer()
    weight_device: torch.device = base.weight.device
    offloaded = weight_device.type in {"cpu", "meta"}  # or the model computes on the CPU, which `device` says then
    factors = adapter.build_factors(base.in_features, base.out_features, rank, generator)
    if not all(hasattr(factor, "weight") for factor in (factors if adapter.use_dora else factors[:1])):
        returned = " and ".join(type(factor).__name__ for factor in factors)
        raise ContractError(
            f"{type(adapter).__name__}.build_factors returned {returned}, and PEFT asks for their weight: need one."
        )
    down, up = (factor.to(device if offloaded else weight_device) for factor in factors)
    layer.lora_A[_ADAPTER_NAME], layer.lora_B[_ADAPTER_NAME] = down, up
    layer.cast_input_dtype_enabled = adapter.use_dora  # sixteen bits are too few for the norms of rows
    parameters = {f"down.{name}": parameter for name, parameter in down.named_parameters()}
    parameters |= {f"up.{name}": parameter for name, parameter in up.named_parameters()}
    if adapter.use_dora:
        magnitude: Any = layer.lora_magnitude_vector[_ADAPTER_NAME]
        lora_A, lora_B = (factor.weight.to(weight_device) for factor in (down, up))  # noqa: N806 - PEFT's names
        magnitude.update_layer(base_layer=base, lora_A=lora_A, lora_B=lora_B, scaling=1.0)
        parameters["magnitude"] = magnitude.to(down.weight.device).weight
    return parameters


def backward_at_scale(prediction: Latents, set_scale: Callable[[float], None], scale: float) -> Latents:
    """The same prediction, whose backward pass is computed with the LoRA at ``scale``.

    Gradient checkpointing throws activations away and runs the layers again in the backward pass, long after the
    forward pass has reset the LoRA's scale: without this, a prediction at -1 would get the gradient of one at +1,
    without an error. Autograd starts with the last prediction, and finishes it before it turns to the one before: so a
    scale that is set where the gradient enters a prediction holds until all of it is computed. A model whose layers are
    spread over several devices is worked on by several threads, and gives no such promise.

    Args:
        prediction: what the model predicted at ``scale``.
        set_scale: sets the scale of the LoRA's layers; it is left at 1 after the backward pass.
        scale: the scale.
    """
    return cast("Tensor", _BackwardAtScale.apply(prediction, set_scale, scale))  # type: ignore[no-untyped-call]


class _BackwardAtScale(Function):
    """The identity, whose backward pass sets the scale before the layers below are computed again."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, set_scale: Callable[[float], None], scale: float) -> Tensor:  # noqa: ANN401
        ctx.set_scale, ctx.scale = set_scale, scale
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        ctx.set_scale(ctx.scale)
        engine = torch.autograd.Variable._execution_engine  # noqa: SLF001 - as DistributedDataParallel does
        engine.queue_callback(lambda: ctx.set_scale(1.0))  # when the backward pass is over
        return gradient, None, None

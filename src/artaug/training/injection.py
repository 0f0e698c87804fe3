"""The injection of adapters: PEFT wraps layers of a frozen model for a training, and they are put back without a trace.

Quantized layers are wrapped, too. PEFT is imported when training begins, not before.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from artaug._internal.modules import named_modules, unwrap
from artaug.errors import ContractError, LoRAMismatchError, ModelError
from artaug.lora.applied import fused_layers, unused_layers
from artaug.training.adapters import Adapter, PlainLoRA
from artaug.training.learners import AdapterStudent, CompanionLearner, LoRALayer, Role, Roles
from artaug.training.model import Predictor
from artaug.training.objectives import Companion
from artaug.training.quantized import check_dequantizable, check_gradients, prepare_for_training
from artaug.training.teacher_cache import TeacherCache

_ADAPTER_NAME = "artaug"
_COMPANION_NAME = "artaug_companion"
_HEAD = "(head)"
"""The layer whose tensors are those of a companion's head, among layers by their paths."""
_PLAIN_LORA = PlainLoRA()


@contextmanager
def inject_adapter(
    model: Predictor,
    *,
    rank: int,
    targets: str,
    generator: torch.Generator,
    adapter: Adapter = _PLAIN_LORA,
    teacher_cache: TeacherCache | None = None,
    companion: Companion | None = None,
    companion_generator: torch.Generator | None = None,
) -> Iterator[AdapterStudent]:
    """Give ``model`` a new adapter inside the ``with`` block, and leave it exactly as it was after it.

    Its update starts at zero, and so does that of a companion, whose own generator is ``companion_generator``.

    Raises:
        LoRAMismatchError: if ``targets`` selects no linear layer.
        ModelError: if the model carries PEFT adapters already, is quantized in a way that gives no true gradient, or has
            weights that the adapter cannot read.
    """
    module, device = unwrap(model.module), model.device  # read once: a pipeline searches all its parts for its device
    layers = trainable_layers(module, targets, adapter, device)
    read_by_head = {} if companion is None else _feature_layers(module, companion)  # before PEFT's own layers are there
    paths = {name: item.path for name, item in named_modules(module).items() if name in {**layers, **read_by_head}}
    with restored_on_exit(module, {paths[name]: layer for name, layer in layers.items()}):
        module.eval()  # dropout would make student and teacher differ
        prepare_for_training(module)
        check_gradients(module, layers)
        companion_random = companion_generator or torch.Generator()
        adapters = {_ADAPTER_NAME: (adapter, rank, generator)}
        if companion is not None and companion.adapter is not None:
            adapters[_COMPANION_NAME] = (companion.adapter, companion.rank or rank, companion_random)
        _wrap_layers(
            module, paths.values(), {name: (each.use_dora, size) for name, (each, size, _) in adapters.items()}
        )
        wrapped = {name: cast("LoRALayer", module.get_submodule(paths[name])) for name in layers}
        factors = {
            adapter_name: {
                name: _install_factors(layer, adapter_name, each, size, random, device)
                for name, layer in wrapped.items()
            }
            for adapter_name, (each, size, random) in adapters.items()
        }
        learner = None
        if companion is not None:
            head = _build_head(companion, read_by_head, companion_random, device)
            learner = CompanionLearner(
                trained={
                    **factors.get(_COMPANION_NAME, {}),
                    **({} if head is None else {_HEAD: dict(head.named_parameters())}),
                },
                has_adapter=companion.adapter is not None,
                head=head,
                features={name: module.get_submodule(paths[name]) for name in read_by_head},
            )
        yield AdapterStudent(
            model=model,
            adapter=adapter,
            wrapped=wrapped,
            trained=factors[_ADAPTER_NAME],
            roles=_roles_of(wrapped, factors, learner),
            companion=learner,
            teacher_cache=teacher_cache,
        )


def _roles_of(
    wrapped: Mapping[str, LoRALayer],
    factors: Mapping[str, Mapping[str, Mapping[str, nn.Parameter]]],
    companion: CompanionLearner | None,
) -> Roles:
    adapters: dict[Role, str] = {"student": _ADAPTER_NAME}
    parameters: dict[Role, list[nn.Parameter]] = {
        "student": [parameter for layer in factors[_ADAPTER_NAME].values() for parameter in layer.values()]
    }
    if companion is not None:
        parameters["companion"] = companion.parameters()
        if companion.has_adapter:
            adapters["companion"] = _COMPANION_NAME
    roles = Roles(wrapped, adapters, parameters)
    with roles.learning("student"):
        return roles


def _feature_layers(module: nn.Module, companion: Companion) -> dict[str, nn.Module]:
    return find_target_layers(module, companion.features) if companion.head is not None else {}


def _build_head(
    companion: Companion, features: Mapping[str, nn.Module], generator: torch.Generator, device: torch.device
) -> nn.Module | None:
    """The head of a companion, initialized from its generator.

    Raises:
        ContractError: if what it makes is no module, has buffers, or has no parameters.
    """
    if companion.head is None:
        return None
    channels = [int(cast("Any", layer).out_features) for layer in features.values()]
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would reach the generators of devices that are not restored.
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        head: object = companion.head(channels)
    if not isinstance(head, nn.Module) or any(True for _ in head.buffers()) or not any(True for _ in head.parameters()):
        raise ContractError(
            f"the head of a Companion made a {type(head).__name__} for {len(channels)} layers. Expected a torch module with parameters, and without "
            "buffers, which no checkpoint would hold: norms of batches and spectral norms have some, norms of layers and groups none."
        )
    return head.to(device, torch.float32)


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


def _wrap_layers(module: nn.Module, paths: Iterable[str], adapters: Mapping[str, tuple[bool, int]]) -> None:
    """Have PEFT wrap layers, with adapters by name: whether it is a DoRA, and its rank."""
    from peft import LoraConfig  # noqa: PLC0415 - loads transformers
    from peft.tuners.lora import LoraModel  # noqa: PLC0415

    targets = "|".join(map(re.escape, paths))  # a string is matched against the whole path
    configs = {
        name: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
        for name, (use_dora, rank) in adapters.items()
    }
    (first, config), *others = configs.items()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT draws from the global generator, and we replace what it drew; it warns of merging, which we never do.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without", category=UserWarning)
        tuner = LoraModel(module, config, first)
        for name, other in others:
            tuner.peft_config[name] = other
            tuner.inject_adapter(module, name)


def _install_factors(
    layer: LoRALayer, name: str, adapter: Adapter, rank: int, generator: torch.Generator, device: torch.device
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
    layer.lora_A[name], layer.lora_B[name] = down, up
    if name == _ADAPTER_NAME:  # a companion is no DoRA
        layer.cast_input_dtype_enabled = adapter.use_dora  # sixteen bits are too few for the norms of rows
    parameters = {f"down.{part}": parameter for part, parameter in down.named_parameters()}
    parameters |= {f"up.{part}": parameter for part, parameter in up.named_parameters()}
    if adapter.use_dora:
        magnitude: Any = layer.lora_magnitude_vector[name]
        lora_A, lora_B = (factor.weight.to(weight_device) for factor in (down, up))  # noqa: N806 - PEFT's names
        magnitude.update_layer(base_layer=base, lora_A=lora_A, lora_B=lora_B, scaling=1.0)
        parameters["magnitude"] = magnitude.to(down.weight.device).weight
    return parameters

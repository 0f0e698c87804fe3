"""Proof that a LoRA file works: every layer rebuilt by several readers, diffusers' own among them."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from artaug.diffusion.families.base import Family
from artaug.diffusion.families.registry import FAMILIES
from artaug.errors import LoRAError, ModelError
from artaug.lora.formats import KeyMap
from artaug.lora.formats.load import ParsedLoRA, load_lora, read_tensors
from artaug.lora.formats.low_rank import LowRank
from artaug.lora.formats.verification import DEFINITION, Verification, key_stems, layer_errors, read_by_definition
from artaug.lora.layers import weight_shape
from artaug.lora.lora import LoRA

_ADAPTER = "artaug"
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UNET = SimpleNamespace(layers_per_block=2)
"""The part of a U-Net's config that diffusers needs to translate original names: that of Stable Diffusion's."""


def verify_export(
    path: str | Path,
    lora: LoRA | None = None,
    *,
    pipeline: DiffusionPipeline | None = None,
    family: type[Family] | None = None,
    key_map: KeyMap | None = None,
    tolerance: float = 1e-3,
) -> Verification:
    """Prove that a LoRA file, in any format, holds every layer's update and nothing else.

    The file is read three times, and each time every layer's update is rebuilt and compared: by ``LoRA.load``, by the
    definition of its format, and by diffusers, whose own loader puts it onto empty layers with PEFT, as it would onto a
    model. No update is formed, and no model is needed or changed.

    Args:
        path: the file.
        lora: what it should hold; without it, what ``LoRA.load`` makes of it.
        pipeline: whose loader and whose layers to use.
        family: the model family that the file is for, also one of your own: its ``pipeline_class`` loads the file, and
            its ``key_map`` names the layers. Without a pipeline and a family, the loader is that of the first published
            family whose names the file has, and there is none for formats that only artaug reads: see
            ``Verification.readers``.
        key_map: names of the layers, where neither the file's keys nor ``family`` settle them.
        tolerance: largest relative error of a layer's update. Files in ``torch.bfloat16`` need 5e-3.

    Raises:
        LoRAError: if a reader cannot read the file, misses a layer, finds one more, or finds another update.
        LoRAMismatchError: if the layers are none of the pipeline's, or have other shapes there.
        ModelError: if the pipeline loads no LoRAs.

    >>> import torch
    >>> import artaug as aa
    >>> from artaug.diffusion import verify_export
    >>> from artaug.lora.formats import FLUX1
    >>> lora = aa.LoRA({"transformer_blocks.0.ff.net.2": aa.LowRank(torch.ones(1, 16), torch.ones(4, 1))})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = lora.save(f"{folder}/lora.safetensors", format=aa.Format.KOHYA, key_map=FLUX1)
    ...     verify_export(path, lora).readers
    ('LoRA.load', "the format's definition", 'FluxPipeline')
    """
    path = Path(path)
    if key_map is None and family is not None:
        key_map = family.key_map
    parsed = load_lora(path, key_map=key_map)
    expected = parsed.layers if lora is None else lora.layers
    readings = {"LoRA.load": parsed.layers, DEFINITION: read_by_definition(path, expected, key_map=key_map)}
    loader: Any = _find_loader(path, parsed, key_map)
    if pipeline is not None or family is not None:
        loader = type(pipeline) if pipeline is not None else getattr(family, "pipeline_class", None)
        if not hasattr(loader, "lora_state_dict"):
            raise ModelError(f"{loader.__name__} loads no LoRAs: it has no lora_state_dict.")
    if loader is not None:
        shapes = None if pipeline is None else _weight_shapes(getattr(pipeline, _denoiser_name(loader)), LoRA(expected))
        config = getattr(getattr(pipeline, "unet", None), "config", _UNET)
        readings[loader.__name__] = _read_by_diffusers(path, loader, shapes, config)
    errors = [
        layer_errors(layers, expected, path=path, reader=reader, tolerance=tolerance)
        for reader, layers in readings.items()
    ]
    worst = {name: max(reader_errors[name] for reader_errors in errors) for name in expected}
    return Verification(path=path, format=parsed.format, readers=tuple(readings), errors=worst)


def _find_loader(path: Path, parsed: ParsedLoRA, key_map: KeyMap | None) -> type | None:
    """The pipeline class of the first published family that names all layers as the file does."""
    stems = key_stems(path)
    for family in FAMILIES:
        if family.key_map is None or (key_map is not None and family.key_map != key_map):
            continue
        key_format = family.key_map.key_formats.get(parsed.format)
        if key_format is None:
            continue
        matches = {name: family.key_map.match(name) for name in parsed.layers}
        names = {match.original if key_format.original_names else name for name, match in matches.items() if match}
        if all(matches.values()) and all(key_format.stem(name) in stems for name in names):
            return family.pipeline_class
    return None


def _denoiser_name(loader: Any) -> str:  # noqa: ANN401 - a pipeline's class, which diffusers gives no type
    """The denoiser's name in the pipelines of a class, and in the keys of their files."""
    name: str = loader.transformer_name if hasattr(loader, "transformer_name") else loader.unet_name
    return name


def _weight_shapes(denoiser: nn.Module, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's weights that a LoRA can update, if this one fits it."""
    with lora.applied_to(denoiser):
        pass
    return {name: shape for name, layer in denoiser.named_modules() if (shape := weight_shape(layer))}


class _EmptyLayers(nn.Module, PeftAdapterMixin):  # type: ignore[misc]  # untyped in diffusers
    """Layers without memory of their own, for adapters to be loaded onto."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for path, shape in shapes.items():
            *parents, name = path.split(".")
            parent: nn.Module = self
            for parent_name in parents:
                if parent_name not in parent._modules:  # noqa: SLF001 - hasattr would find attributes of Module, too
                    parent.add_module(parent_name, nn.Module())
                parent = parent.get_submodule(parent_name)
            parent.add_module(name, _empty_layer(*shape))


def _empty_layer(outputs: int, inputs: int, *kernel: int) -> nn.Module:
    layer = (
        _CONVOLUTIONS[len(kernel)](inputs, outputs, kernel, bias=False, device="meta")
        if kernel
        else nn.Linear(inputs, outputs, bias=False, device="meta")
    )
    zeros = torch.zeros(1).expand(outputs, inputs, *kernel)  # one number of memory, whatever the shape
    layer.weight = nn.Parameter(zeros, requires_grad=False)  # on the CPU, since PEFT puts adapters on its device
    return layer


def _read_by_diffusers(
    path: Path,
    loader: Any,  # noqa: ANN401 - a pipeline's class
    shapes: Mapping[str, tuple[int, ...]] | None,
    unet_config: object,
) -> dict[str, LowRank]:
    """What diffusers and PEFT make of a file: factors times strength, as they sit on the layers afterwards.

    Raises:
        LoRAError: if they refuse it.
    """
    denoiser_name = _denoiser_name(loader)
    negative = [key for key, tensor in read_tensors(path)[0].items() if key.endswith(".alpha") and (tensor < 0).any()]
    if negative:
        raise LoRAError(
            f"{path}: {negative[0]!r} is negative, and diffusers never finishes to read that: it doubles alpha until it is "
            "large enough. Write the file anew, with LoRA.load(path).save(...): alpha is the rank then."
        )
    try:
        tensors, *alphas, metadata = loader.lora_state_dict(
            str(path.absolute()),
            return_alphas=True,
            return_lora_metadata=True,
            use_safetensors=True,
            unet_config=unet_config,
        )
        layers = _EmptyLayers(_shapes_of_state_dict(tensors, denoiser_name) if shapes is None else shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # strengths that PEFT ignores show in the updates
            PeftAdapterMixin.load_lora_adapter(
                layers,
                tensors,
                prefix=denoiser_name,
                network_alphas=alphas[0] if alphas else None,
                adapter_name=_ADAPTER,
                metadata=metadata,
                low_cpu_mem_usage=True,
            )
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise LoRAError(f"{path}: {loader.__name__} refuses it ({type(error).__name__}: {error}).") from error
    return dict(_loaded_adapters(layers))


def _shapes_of_state_dict(tensors: Mapping[str, Tensor], denoiser_name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers that a state dict of diffusers has updates for."""
    prefix = f"{denoiser_name}."
    factors = {key.removeprefix(prefix): factor for key, factor in tensors.items() if key.startswith(prefix)}
    if not any("lora_A" in key for key in factors):
        factors = convert_unet_state_dict_to_peft(factors)
    # The factor down has a shape of (rank, inputs, ...), up one of (outputs, rank, ...).
    return {
        key.removesuffix(".lora_A.weight"): (factors[key.replace(".lora_A.", ".lora_B.")].shape[0], *factor.shape[1:])
        for key, factor in factors.items()
        if key.endswith(".lora_A.weight")
    }


def _loaded_adapters(layers: nn.Module) -> Iterator[tuple[str, LowRank]]:
    for name, layer in layers.named_modules():
        if isinstance(layer, LoraLayer) and _ADAPTER in layer.lora_A:
            down, up = layer.lora_A[_ADAPTER].weight.detach(), layer.lora_B[_ADAPTER].weight.detach()
            yield name, LowRank(down, up.flatten(1).double() * layer.scaling[_ADAPTER])

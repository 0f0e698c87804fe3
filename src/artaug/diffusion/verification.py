"""Proof that a LoRA file works: every layer rebuilt by several readers, diffusers' own among them."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from artaug.errors import LoRAError, ModelError
from artaug.lora.formats import FLUX1, FLUX2, QWEN_IMAGE, SD3, SD15, SDXL, Z_IMAGE, KeyMap
from artaug.lora.formats.load import ParsedLoRA, load_lora
from artaug.lora.formats.low_rank import LowRank
from artaug.lora.formats.verification import DEFINITION, Verification, key_stems, layer_errors, read_by_definition
from artaug.lora.layers import weight_shape
from artaug.lora.lora import LoRA

_PIPELINES: Mapping[KeyMap, type] = {
    FLUX1: FluxPipeline,
    FLUX2: Flux2Pipeline,
    SD3: StableDiffusion3Pipeline,
    SDXL: StableDiffusionXLPipeline,
    SD15: StableDiffusionPipeline,
    QWEN_IMAGE: QwenImagePipeline,
    Z_IMAGE: ZImagePipeline,
}
_ADAPTER = "artaug"
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UNET = SimpleNamespace(layers_per_block=2)
"""What diffusers asks of Stable Diffusion's U-Nets, to translate their original names."""


def verify_export(
    path: str | Path,
    lora: LoRA | None = None,
    *,
    pipeline: DiffusionPipeline | None = None,
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
        pipeline: whose loader and whose layers to use. Without it the loader is that of the family whose names the file
            has, and there is none for formats that only artaug reads: ``Verification.readers`` says who read it.
        key_map: the family, if the file's keys fit several.
        tolerance: largest relative error of a layer's update. Files in ``torch.bfloat16`` need 5e-3.

    Raises:
        LoRAError: if a reader cannot read the file, misses a layer, finds one more, or finds another update.
        LoRAMismatchError: if the layers are none of the pipeline's, or have other shapes there.
        ModelError: if the pipeline loads no LoRAs.

    >>> import torch
    >>> import artaug as aa
    >>> from artaug.diffusion import verify_export
    >>> lora = aa.LoRA({"transformer_blocks.0.ff.net.2": aa.LowRank(torch.ones(1, 16), torch.ones(4, 1))})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = lora.save(f"{folder}/lora.safetensors", format=aa.Format.KOHYA, key_map=aa.formats.FLUX1)
    ...     verify_export(path, lora).readers
    ('LoRA.load', "the format's definition", 'FluxPipeline')
    """
    path = Path(path)
    parsed = load_lora(path, key_map=key_map)
    wanted = parsed.layers if lora is None else lora.layers
    found = {"LoRA.load": parsed.layers, DEFINITION: read_by_definition(path, wanted)}
    loader = _loader_of(pipeline) if pipeline is not None else _loader_for(path, parsed, key_map)
    if loader is not None:
        shapes = None if pipeline is None else _shapes(getattr(pipeline, _part(loader)), LoRA(wanted))
        config = getattr(getattr(pipeline, "unet", None), "config", _UNET)
        found[loader.__name__] = _loaded(path, loader, shapes, config)
    errors = [layer_errors(one, wanted, path=path, reader=who, tolerance=tolerance) for who, one in found.items()]
    worst = {name: max(one[name] for one in errors) for name in wanted}
    return Verification(path=path, format=parsed.format, readers=tuple(found), errors=worst)


def _loader_of(pipeline: DiffusionPipeline) -> type:
    if not hasattr(pipeline, "lora_state_dict"):
        raise ModelError(f"{type(pipeline).__name__} loads no LoRAs: it has no lora_state_dict.")
    return type(pipeline)


def _loader_for(path: Path, parsed: ParsedLoRA, key_map: KeyMap | None) -> type | None:
    """The pipeline that reads files like this one: that of the first family whose spelling of the layers it has."""
    stems = key_stems(path)
    for one in _PIPELINES if key_map is None else (key_map,):
        key_format = one.key_formats.get(parsed.format)
        if one in _PIPELINES and key_format is not None:
            matches = {name: one.match(name) for name in parsed.layers}
            names = {match.original if key_format.original_names else name for name, match in matches.items() if match}
            if all(matches.values()) and all(key_format.stem(name) in stems for name in names):
                return _PIPELINES[one]
    return None


def _part(loader: Any) -> str:  # noqa: ANN401 - a pipeline's class, which diffusers gives no type
    """The denoiser's name in the pipelines of a class, and in the keys of their files."""
    name: str = loader.transformer_name if hasattr(loader, "transformer_name") else loader.unet_name
    return name


def _shapes(denoiser: nn.Module, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's weights that a LoRA can update, if this one fits it."""
    with lora.applied_to(denoiser):
        pass
    return {name: shape for name, one in denoiser.named_modules() if (shape := weight_shape(one))}


class _Layers(nn.Module, PeftAdapterMixin):  # type: ignore[misc]  # untyped in diffusers
    """Layers that weigh nothing, for adapters to be loaded onto."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for path, shape in shapes.items():
            *folders, name = path.split(".")
            at: nn.Module = self
            for folder in folders:
                if folder not in at._modules:  # noqa: SLF001 - hasattr would find attributes of Module, too
                    at.add_module(folder, nn.Module())
                at = at.get_submodule(folder)
            at.add_module(name, _weightless(*shape))


def _weightless(outputs: int, inputs: int, *kernel: int) -> nn.Module:
    layer = (
        _CONVOLUTIONS[len(kernel)](inputs, outputs, kernel, bias=False, device="meta")
        if kernel
        else nn.Linear(inputs, outputs, bias=False, device="meta")
    )
    nothing = torch.zeros(1).expand(outputs, inputs, *kernel)
    layer.weight = nn.Parameter(nothing, requires_grad=False)  # PEFT follows its device
    return layer


def _loaded(
    path: Path,
    loader: Any,  # noqa: ANN401 - a pipeline's class
    shapes: Mapping[str, tuple[int, ...]] | None,
    unet: object,
) -> dict[str, LowRank]:
    """What diffusers and PEFT make of a file: factors times strength, as they sit on the layers afterwards.

    Raises:
        LoRAError: if they refuse it.
    """
    part = _part(loader)
    try:
        tensors, *alphas, metadata = loader.lora_state_dict(
            str(path.absolute()),
            return_alphas=True,
            return_lora_metadata=True,
            use_safetensors=True,
            unet_config=unet,
        )
        layers = _Layers(_shapes_in(tensors, part) if shapes is None else shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # strengths that PEFT ignores show in the updates
            PeftAdapterMixin.load_lora_adapter(
                layers,
                tensors,
                prefix=part,
                network_alphas=alphas[0] if alphas else None,
                adapter_name=_ADAPTER,
                metadata=metadata,
                low_cpu_mem_usage=True,
            )
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
        raise LoRAError(f"{path}: {loader.__name__} refuses it ({type(fault).__name__}: {fault}).") from fault
    return dict(_adapters(layers))


def _shapes_in(tensors: Mapping[str, Tensor], part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers that a state dict of diffusers has updates for."""
    layers = {key.removeprefix(f"{part}."): one for key, one in tensors.items() if key.startswith(f"{part}.")}
    if not any("lora_A" in key for key in layers):
        layers = convert_unet_state_dict_to_peft(layers)
    return {
        key.removesuffix(".lora_A.weight"): (layers[key.replace(".lora_A.", ".lora_B.")].shape[0], *one.shape[1:])
        for key, one in layers.items()
        if key.endswith(".lora_A.weight")
    }


def _adapters(layers: nn.Module) -> Iterator[tuple[str, LowRank]]:
    for name, one in layers.named_modules():
        if isinstance(one, LoraLayer) and _ADAPTER in one.lora_A:
            down, up = one.lora_A[_ADAPTER].weight.detach(), one.lora_B[_ADAPTER].weight.detach()
            yield name, LowRank(down, up.flatten(1).double() * one.scaling[_ADAPTER])

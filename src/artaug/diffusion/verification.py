"""Proof that a LoRA file works: every layer rebuilt by several readers, diffusers' own and other programs' among them."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.modules import named_modules
from artaug._internal.text import shorten
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.registry import FAMILIES
from artaug.errors import LoRAError, ModelError
from artaug.lora.applied import updatable_shapes
from artaug.lora.formats import KeyMap
from artaug.lora.formats.load import load_lora, read_tensors
from artaug.lora.formats.low_rank import LowRank
from artaug.lora.formats.programs import DIFFUSERS, PROGRAMS, Program
from artaug.lora.formats.verification import DEFINITION, Verification, layer_errors, read_by_definition, reading_by
from artaug.lora.lora import LoRA

_ADAPTER = "artaug"
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings of PEFT's config that leave layers out."""
_MAX_QUANTIFIERS = 3
"""Of one pattern: ``re`` takes a time of the name's length to that power."""
_UNET = SimpleNamespace(layers_per_block=2)
"""The part of a U-Net's config that diffusers needs to translate original names: that of Stable Diffusion's."""


@checked
def verify_export(
    path: str | Path,
    lora: LoRA | None = None,
    *,
    pipeline: DiffusionPipeline | None = None,
    family: type[Family] | None = None,
    key_map: KeyMap | None = None,
    tolerance: float = 1e-3,
) -> Verification:
    """Prove that a LoRA file, in any format, holds every layer's update and nothing else, and say who will read it whole.

    The file is read several times, and each time every layer's update is rebuilt and compared: by ``LoRA.load``, by the
    definition of its format, by diffusers, whose own loader puts it onto empty layers with PEFT as it would onto a model,
    and by the rules of other programs, such as ComfyUI. No update is formed, and no model is needed or changed.

    artaug's own readers prove nothing alone: diffusers, or one of the programs, has to read the whole file. The result
    names the programs that do (``whole``), and says what those make of it that know the model and do not (``partial``).

    Args:
        path: the file.
        lora: what it should hold; without it, what ``LoRA.load`` makes of it.
        pipeline: whose loader and whose layers to use.
        family: the model family that the file is for, also one of your own: its ``pipeline_class`` loads the file, and
            its ``key_map`` names the layers. Without a pipeline and a family, it is the first published family whose
            names the file has.
        key_map: names of the layers, where neither the file's keys nor ``family`` settle them.
        tolerance: largest relative error of a layer's update. Files in ``torch.bfloat16`` need 5e-3.

    Raises:
        LoRAError: if a reader cannot read the file, misses a layer, finds one more, or finds another update; if no key
            map has the names; if nobody but artaug reads the whole file.
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
    ...     verification = verify_export(path, lora)
    >>> verification.readers
    ('LoRA.load', "the format's definition", 'FluxPipeline')
    >>> verification.whole
    ('diffusers', 'ComfyUI', 'DiffSynth-Studio', 'sd-scripts')
    """
    path = Path(path)
    loader: Any = None
    if pipeline is not None or family is not None:
        loader = type(pipeline) if pipeline is not None else getattr(family, "pipeline_class", None)
        if not hasattr(loader, "lora_state_dict"):
            raise ModelError(f"{loader.__name__} loads no LoRAs: it has no lora_state_dict.")
    if key_map is None and family is not None:
        key_map = family.key_map
    parsed = load_lora(path, key_map=key_map)
    expected = parsed.layers if lora is None else lora.layers
    readings = {"LoRA.load": parsed.layers, DEFINITION: read_by_definition(path, expected, key_map=key_map)}
    key_maps = [key_map] if key_map is not None else _key_maps_of(loader)
    programs = _ask_programs(path, expected, key_maps, tolerance)
    if loader is None and programs.reads(DIFFUSERS):
        loader = next((known.pipeline_class for known in FAMILIES if known.key_map == programs.key_map), None)
    if loader is not None:
        shapes = None if pipeline is None else _weight_shapes(getattr(pipeline, _denoiser_name(loader)), LoRA(expected))
        config = getattr(getattr(pipeline, "unet", None), "config", _UNET)
        readings[loader.__name__] = _read_by_diffusers(path, loader, shapes, config)
    errors = [
        layer_errors(layers, expected, path=path, reader=reader, tolerance=tolerance)
        for reader, layers in readings.items()
    ]
    if loader is None:
        _check_witness(path, expected, programs, key_maps)
    verdicts = {**programs.readings, **({DIFFUSERS: ""} if loader is not None else {})}  # what ran is no longer a rule
    return Verification(
        path=path,
        format=parsed.format,
        readers=tuple(readings),
        errors={name: max(reader_errors[name] for reader_errors in errors) for name in expected},
        whole=tuple(program.name for program, reading in verdicts.items() if not reading),
        partial={program.name: reading for program, reading in verdicts.items() if reading},
    )


@dataclass(frozen=True)
class _ProgramReadings:
    """What the programs that know a family make of a file, by their rules."""

    key_map: KeyMap | None
    readings: Mapping[Program, str]

    def reads(self, program: Program) -> bool:
        """Whether it reads the whole file."""
        return self.readings.get(program) == ""


def _key_maps_of(loader: Any) -> list[KeyMap]:  # noqa: ANN401 - a pipeline's class, which diffusers gives no type
    """The key maps of the published families, or of those that a pipeline's class draws."""
    families = [known for known in FAMILIES if loader is None or issubclass(loader, known.pipeline_class)]
    return list(dict.fromkeys(known.key_map for known in families if known.key_map is not None))


def _ask_programs(
    path: Path, expected: Mapping[str, LowRank], key_maps: Iterable[KeyMap], tolerance: float
) -> _ProgramReadings:
    """The readings for the first family that has all layers and that diffusers, else any program, reads the file for."""
    candidates = [
        _ProgramReadings(
            key_map,
            {
                program: reading_by(program, path, expected, key_map=key_map, tolerance=tolerance)
                for program in PROGRAMS
                if key_map.name in program.styles
            },
        )
        for key_map in key_maps
        if all(map(key_map.match, expected))
    ]
    by_diffusers = [programs for programs in candidates if programs.reads(DIFFUSERS)]
    by_any = [programs for programs in candidates if "" in programs.readings.values()]
    return next(iter([*by_diffusers, *by_any, *candidates]), _ProgramReadings(None, {}))


def _check_witness(
    path: Path, expected: Mapping[str, LowRank], programs: _ProgramReadings, key_maps: Iterable[KeyMap]
) -> None:
    """Refuse to prove what nobody reads but artaug."""
    if programs.key_map is None:
        key_maps = list(key_maps)
        name = next(
            (name for name in expected if not any(known.match(name) for known in key_maps)), next(iter(expected))
        )
        raise LoRAError(
            f"{path}: no key map ({', '.join(known.name for known in key_maps)}) has all of its layers, the first without is "
            f"{name!r}, so nothing is proved. Pass the pipeline that it is for, or your model's family."
        )
    if "" not in programs.readings.values():
        others = "".join(f" {program.name} {reading}." for program, reading in programs.readings.items())
        raise LoRAError(
            f"{path}: nothing is proved, since only artaug reads it whole.{others} Save it in another format, or pass "
            "the pipeline or the family that loads it."
        )


def _denoiser_name(loader: Any) -> str:  # noqa: ANN401 - a pipeline's class, which diffusers gives no type
    """The denoiser's name in the pipelines of a class, and in the keys of their files."""
    name: str = loader.transformer_name if hasattr(loader, "transformer_name") else loader.unet_name
    return name


def _weight_shapes(denoiser: nn.Module, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's weights that a LoRA can update, if this one fits it."""
    lora.check_fits(denoiser)
    return updatable_shapes(named_modules(denoiser))


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
                metadata=_without_regexes(metadata, denoiser_name, path),
                low_cpu_mem_usage=True,
            )
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise LoRAError(f"{path}: {loader.__name__} refuses it ({type(error).__name__}: {error}).") from error
    return dict(_loaded_adapters(layers))


def _without_regexes(metadata: Mapping[str, Any] | None, denoiser_name: str, path: Path) -> dict[str, Any] | None:
    """A config whose regular expressions end in a time that one can wait for.

    Those that choose layers are taken out: PEFT matches them, but diffusers loads what the file holds, whatever they say.
    Those of strengths stay; ``LoRA.load`` has refused the worst of them.
    """
    if metadata is None:
        return None
    prefix, targets = f"{denoiser_name}.", f"{denoiser_name}.target_modules"
    kept = {key: value for key, value in metadata.items() if key.removeprefix(prefix) not in _CHOICES}
    if isinstance(kept.get(targets), str):
        kept[targets] = [kept[targets]]  # a name then
    patterns = {**(kept.get(f"{prefix}rank_pattern") or {}), **(kept.get(f"{prefix}alpha_pattern") or {})}
    slow = next((pattern for pattern in patterns if sum(map(pattern.count, "*+?")) > _MAX_QUANTIFIERS), None)
    if slow is not None:
        raise LoRAError(
            f"{path}: its header has the pattern {shorten(slow, 120)!r}, which PEFT may match forever. Write the file anew, "
            "with LoRA.load(path).save(...): that needs no patterns."
        )
    return kept


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
            yield name, LowRank(down.cpu(), up.flatten(1).cpu().double() * layer.scaling[_ADAPTER])

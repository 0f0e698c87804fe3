"""LoRA as a value: low-rank updates by layer name; load, save, scale and add them, and apply them to a module.

There is no separate strength: alpha is folded into the factors, so the update of a layer is ``up @ down``.
"""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.digests import tensors_digest
from artaug._internal.files import atomic_write, save_tensors
from artaug._internal.mappings import FrozenDict
from artaug._internal.modules import named_modules, unwrap
from artaug._internal.text import table_html
from artaug.errors import LoRAError, LoRAMismatchError
from artaug.lora.applied import compute_dtype, fused_layers, updatable_shapes, update_applied
from artaug.lora.formats.key_maps import Format, KeyMap
from artaug.lora.formats.load import load_lora
from artaug.lora.formats.low_rank import LowRank
from artaug.lora.formats.save import to_state_dict

__all__ = ["LoRA", "LowRank", "sum_loras"]

_log = logging.getLogger(__name__)
_MAX_KINDS = 24
"""Kinds of layers that a notebook shows."""


@checked
@dataclass(frozen=True, eq=False)
class LoRA:
    """Low-rank updates by layer name. The names are the denoiser's own module paths.

    Raises:
        LoRAError: if there is no layer.

    >>> import artaug as aa, torch
    >>> lora = aa.LoRA({"transformer_blocks.0.attn.to_q": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    >>> lora.rank, lora.scaled(0.5).layers["transformer_blocks.0.attn.to_q"].delta()[0, 0].item()
    (1, 0.5)
    """

    layers: Mapping[str, LowRank]

    def __post_init__(self) -> None:
        if not self.layers:
            raise LoRAError("a LoRA needs at least one layer, received none.")
        object.__setattr__(self, "layers", FrozenDict(self.layers))

    def __repr__(self) -> str:
        return f"LoRA({len(self.layers)} layers, rank {self.rank})"

    def _repr_html_(self) -> str:
        """Its layers by kind, with their ranks, parameters and share of the update, for notebooks."""
        kinds: dict[str, list[LowRank]] = {}
        for name, layer in self.layers.items():
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(layer)
        total = sum(layer.energy() for layer in self.layers.values()) or 1
        rows = [
            (
                kind,
                f"{len(layers):,}",
                " to ".join(map(str, sorted({min(one.rank for one in layers), max(one.rank for one in layers)}))),
                f"{sum(one.down.numel() + one.up.numel() for one in layers):,}",
                f"{sum(one.energy() for one in layers) / total:.1%}",
            )
            for kind, layers in list(kinds.items())[:_MAX_KINDS]
        ]
        more = f"<p>and {len(kinds) - _MAX_KINDS} more kinds</p>" * (len(kinds) > _MAX_KINDS)
        table = table_html(("layers", "count", "rank", "parameters", "share of the update's energy"), rows)
        return f"<p>{escape(repr(self))}</p>{table}{more}"

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(layer.rank for layer in self.layers.values())

    def scaled(self, scale: float) -> "LoRA":
        """The LoRA whose every update is ``scale`` times this one's. See `LowRank.scaled` for the precision.

        Raises:
            LoRAError: if ``scale`` is not finite, or makes a factor too large for float32.
        """
        return LoRA({name: layer.scaled(scale) for name, layer in self.layers.items()})

    def save(
        self,
        path: str | Path,
        *,
        format: Format | str | None = None,  # noqa: A002 - the field's word
        key_map: KeyMap | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write one safetensors file, atomically.

        Without a format it is written in the one that the programs of the family's users read whole: kohya's for the
        U-Nets of Stable Diffusion, of whose PEFT files ComfyUI drops the attention, and PEFT's for the others. Which
        program reads which file whole is a table in the LoRA files page of the documentation, and
        ``artaug.diffusion.verify_export`` says it of a file, and proves it.

        In PEFT format all layers are padded with zeros to one rank, and alpha equals it, so that readers that know alpha
        and readers that ignore it see the same update. In the other formats each layer keeps its rank, except for
        U-Nets, where diffusers loses alphas that differ. Layers that the original model fuses are written as blocks of
        one layer.

        Args:
            path: where to write; missing folders are created.
            format: the convention of the keys: a `Format`, or its name; without it, the family's
                ``KeyMap.default_format``.
            key_map: the model family, if several families have these layers.
            metadata: strings for the file's header, provenance for instance.
            dtype: of the factors. Without it they are written as they are, so a trained LoRA in float32, exactly. Half
                the bytes cost about 3e-4 of every update in ``torch.float16`` and 2e-3 in ``torch.bfloat16``.

        Returns:
            The path written.

        Raises:
            LoRAError: if ``metadata`` uses a name that the file format needs, if the layers fit no family or several, if
                no reader other than artaug's reads these layers in this format, or if a layer would lose more than 1 %
                of its update in ``dtype``.
            StorageError: if the system cannot write the file; an existing file is kept.
        """
        tensors, header = to_state_dict(self.layers, format, key_map=key_map, dtype=dtype)
        reserved = {"format", "lora_adapter_metadata"} & set(metadata or {})
        if reserved:
            raise LoRAError(
                f"metadata may not set {sorted(reserved)}: readers of the file rely on it. Use another name."
            )
        path = Path(path)
        with atomic_write(path, what="the LoRA file", remedy="Make room, or choose another place.") as temporary:
            save_tensors(tensors, temporary, {**header, **(metadata or {})})
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        key_map: KeyMap | None = None,
        alpha: float | None = None,
        denoiser_only: bool = False,
    ) -> Self:
        """Read a file in any `Format`, recognised by its keys, or the folder of a PEFT adapter; fold alpha into the factors.

        The strength is ``alpha / rank`` (rsLoRA: over the root of the rank). Alpha stands beside each layer (kohya), in the
        header (diffusers) or in ``adapter_config.json`` beside ``adapter_model.safetensors`` (PEFT, with its patterns);
        elsewhere it is the rank. Factors keep the file's precision where that holds the product with the strength exactly,
        else `LowRank.scaled` says what becomes of them; float8 is read as bfloat16, which is exact. LoKr is read as the
        exact LoRA that it is, in float32.

        Args:
            path: the file, or the folder with ``adapter_model.safetensors`` and ``adapter_config.json``.
            key_map: the model family, if the keys fit several.
            alpha: ``lora_alpha`` of a file that does not state it, such as a PEFT adapter without its config.
            denoiser_only: leave out layers of text encoders, with a warning in the log. Without it they are an error.

        Raises:
            LoRAError: if the file is missing, is no safetensors file, or holds anything this reader does not know; if its
                strength is not stated and PEFT has no default for it; if ``alpha`` is given and the file states its own.
        """
        parsed = load_lora(Path(path), key_map=key_map, alpha=alpha, denoiser_only=denoiser_only)
        _log.info("%s is a %s file of %d layers", path, parsed.format, len(parsed.layers))
        return cls(parsed.layers)

    @property
    def digest(self) -> str:
        """SHA-256 of the names and factors, in hexadecimal: equal if and only if two LoRAs are bitwise equal."""
        return tensors_digest(
            {
                f"{name}.{factor}": tensor
                for name, layer in self.layers.items()
                for factor, tensor in (("down", layer.down), ("up", layer.up))
            }
        )

    @contextmanager
    def applied_to(
        self,
        module: nn.Module,
        *,
        scale: float = 1.0,
        output_weights: Callable[[str, Tensor], Tensor | None] | None = None,
    ) -> Iterator[None]:
        """Add this LoRA to ``module`` inside the ``with`` block; after it the module computes exactly as before.

        The update is added in the layers' ``forward``, so the weights are neither copied nor changed: quantized, offloaded,
        compiled and shared layers work, and several LoRAs can be applied at once.

        Args:
            module: the denoiser.
            scale: of every update.
            output_weights: called with a layer's name and output, returns the weight of the update for each token or
                pixel, of a shape that multiplies the output, or None to skip the update. Without it the weight is 1.

        Raises:
            LoRAMismatchError: before anything changes, if a layer is missing, has another shape, or is out of use.
        """
        layers, dtype = self._find_layers(module), compute_dtype(module)
        with ExitStack() as applied:
            for name, layer in layers.items():
                weights = None if output_weights is None else functools.partial(output_weights, name)
                applied.enter_context(
                    update_applied(layer, self.layers[name].scaled(scale), dtype=dtype, output_weights=weights)
                )
            yield

    def check_fits(self, module: nn.Module) -> None:
        """Refuse a module that this LoRA does not fit; the module is not touched.

        Raises:
            LoRAMismatchError: if a layer is missing, has another shape, or is out of use.
        """
        self._find_layers(module)

    def _find_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """The submodules that this LoRA names; all of them must be there, fit, and be in use."""
        module = unwrap(module)
        modules = named_modules(module)
        shapes = updatable_shapes(modules)
        missing = [name for name in self.layers if name not in shapes]
        if missing:
            example = next(iter(shapes), "(no linear layer)")
            present = "none" if len(missing) == len(self.layers) else f"only {len(self.layers) - len(missing)}"
            raise LoRAMismatchError(
                f"this LoRA names {len(self.layers)} layers and {type(module).__name__} has {present} of them; "
                f"first missing is {missing[0]!r}, names there look like {example!r}."
            )
        for name, layer in self.layers.items():
            if layer.shape != shapes[name]:
                raise LoRAMismatchError(
                    f"this LoRA updates {name!r} with shape {layer.shape}, and in {type(module).__name__} it has "
                    f"{shapes[name]}. It was trained for a model of another size."
                )
        fused = fused_layers(modules)
        if unused := [name for name in self.layers if name in fused]:
            raise LoRAMismatchError(
                f"this LoRA updates {unused[0]!r}, which {type(module).__name__} does not use: {fused[unused[0]]!r} "
                f"computes in its place ({len(unused)} of {len(self.layers)} layers). Call the model's "
                "unfuse_qkv_projections() first."
            )
        return {name: modules[name].module for name in self.layers}


def sum_loras(loras: Sequence[LoRA]) -> LoRA:
    """The LoRA whose update of every layer is the exact sum of their updates, by concatenation of the ranks.

    ``B1 A1 + B2 A2 = [B1, B2] @ [A1; A2]``, in the smallest type that holds all factors exactly: float32 for float16 and
    bfloat16 together. Adding or averaging the factors would be wrong: ``(B1 + B2)(A1 + A2)`` has
    the cross terms ``B1 A2 + B2 A1``.

    Raises:
        LoRAError: if there is none, or two of them give one layer different shapes.

    >>> import artaug as aa, torch
    >>> from artaug.lora.lora import sum_loras
    >>> lora = aa.LoRA({"proj": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    >>> total = sum_loras([lora, lora.scaled(0.5)])
    >>> total.rank, total.layers["proj"].delta()[0, 0].item()
    (2, 1.5)
    """
    if not loras:
        raise LoRAError("received 0 LoRAs to add up, and a sum needs at least one.")
    addends: dict[str, list[LowRank]] = {}
    for lora in loras:
        for name, layer in lora.layers.items():
            addends.setdefault(name, []).append(layer)
    for name, layers in addends.items():
        shapes = {layer.shape for layer in layers}
        if len(shapes) > 1:
            raise LoRAError(
                f"the LoRAs disagree on the shape of {name!r}: {sorted(shapes)}. They belong to different models."
            )
    return LoRA(
        {
            name: LowRank(torch.cat([layer.down for layer in layers]), torch.cat([layer.up for layer in layers], dim=1))
            for name, layers in addends.items()
        }
    )

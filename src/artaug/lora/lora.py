"""LoRA as a value: low-rank updates by layer name, what they add up to, the file they live in, and wearing them.

Strength is never hidden here: alpha is folded into the factors, so the update of a layer is ``up @ down`` and
nothing else.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from artaug._internal.digests import tensors_digest
from artaug.errors import LoRAError, LoRAMismatchError
from artaug.lora.formats.files import write_tensors
from artaug.lora.formats.key_maps import Format, KeyMap
from artaug.lora.formats.low_rank import LowRank
from artaug.lora.formats.reading import read
from artaug.lora.formats.writing import to_state_dict
from artaug.lora.layers import updated, weight_shape

__all__ = ["LoRA", "LowRank", "sum_loras"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoRA:
    """Low-rank updates by layer name, the names being the denoiser's own module paths.

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
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __reduce__(self) -> tuple[type["LoRA"], tuple[dict[str, LowRank]]]:
        return LoRA, (dict(self.layers),)  # a mapping proxy cannot be copied or sent to another process

    def __repr__(self) -> str:
        return f"LoRA({len(self.layers)} layers, rank {self.rank})"

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(layer.rank for layer in self.layers.values())

    def scaled(self, scale: float) -> "LoRA":
        """The LoRA whose every update is ``scale`` times this one's."""
        return LoRA({name: LowRank(layer.down, layer.up * scale) for name, layer in self.layers.items()})

    def save(
        self,
        path: str | Path,
        *,
        format: Format | str = Format.PEFT,  # noqa: A002 - the field's word
        key_map: KeyMap | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write one safetensors file. The file appears whole or not at all.

        In PEFT format, the universal one, all layers are padded with zeros to one rank, and alpha equals it, so
        readers that know alpha and readers that ignore it see the same update. In the others each layer keeps its
        rank (but for U-Nets, where diffusers loses alphas that differ), and parts of a layer that the original model
        fuses stand there as blocks. ``artaug.diffusion.verify_export`` proves the file.

        Args:
            path: where to write; folders in between are made.
            format: how layers are named: a `Format`, or its name.
            key_map: the model family, where the layers alone do not tell it.
            metadata: strings to put beside the weights, provenance for instance.
            dtype: of the factors. Without it they are written as they are, so a trained LoRA in float32, exactly. Half
                the bytes cost about 3e-4 of every update in ``torch.float16`` and 2e-3 in ``torch.bfloat16``.

        Returns:
            The path written.

        Raises:
            LoRAError: if ``metadata`` uses a name that the file format needs, if the family cannot be told, if artaug
                could not prove that its layers arrive in this format, or if a layer would lose more than 1 % of its
                update in ``dtype``.
            StorageError: if the system cannot write the file; one that was there before stays.
        """
        tensors, header = to_state_dict(self.layers, format, key_map=key_map, dtype=dtype)
        taken = {"format", "lora_adapter_metadata"} & set(metadata or {})
        if taken:
            raise LoRAError(f"metadata may not set {sorted(taken)}: readers of the file rely on it. Use another name.")
        return write_tensors(Path(path), tensors, {**header, **(metadata or {})})

    @classmethod
    def load(cls, path: str | Path, *, key_map: KeyMap | None = None) -> Self:
        """Read a file in any `Format`, recognised by its keys, folding alpha where the file states one.

        Args:
            path: the file.
            key_map: the model family, where the keys alone do not tell it.

        Raises:
            LoRAError: if the file is missing, is no safetensors file, or holds anything this reader does not know.
        """
        found = read(Path(path), key_map=key_map)
        _log.info("%s is a %s file of %d layers", path, found.format, len(found.layers))
        return cls(found.layers)

    @property
    def digest(self) -> str:
        """SHA-256 of the names and factors, in hexadecimal: that of two LoRAs is the same if they are, bit for bit."""
        sides = ("down", "up")
        return tensors_digest(
            {f"{name}.{side}": getattr(layer, side) for name, layer in self.layers.items() for side in sides}
        )

    @contextmanager
    def applied_to(
        self, module: nn.Module, *, scale: float = 1.0, along: Callable[[str, Tensor], Tensor | None] | None = None
    ) -> Iterator[None]:
        """Let ``module`` compute with this LoRA inside the ``with`` block, and exactly as before after it.

        The update is added by forward hooks on the named layers, linear ones and convolutions, so the weights are
        neither copied nor touched: quantized, offloaded and shared layers work, and several LoRAs can be worn at once.

        Args:
            module: the denoiser.
            scale: of every update.
            along: for the name of a layer and what comes out of it, how much of the update each token or pixel takes,
                shaped to multiply that, or None for nothing at all; without it all take the whole.

        Raises:
            LoRAMismatchError: before anything changes, if a layer is missing or has another shape.
        """
        targets = self._targets(module)
        with ExitStack() as worn:
            for name, target in targets.items():
                along_here = None if along is None else functools.partial(along, name)
                handle = target.register_forward_hook(_adding(self.layers[name], scale, along_here))
                worn.callback(handle.remove)
            yield

    def _targets(self, module: nn.Module) -> dict[str, nn.Module]:
        """The layers this LoRA names, all of them or none."""
        modules = dict(module.named_modules())
        shapes = {name: shape for name, one in modules.items() if (shape := weight_shape(one))}
        missing = [name for name in self.layers if name not in shapes]
        if missing:
            known = next(iter(shapes), "(no linear layer)")
            found = "none" if len(missing) == len(self.layers) else f"only {len(self.layers) - len(missing)}"
            raise LoRAMismatchError(
                f"this LoRA names {len(self.layers)} layers and {type(module).__name__} has {found} of them; "
                f"first missing is {missing[0]!r}, names there look like {known!r}."
            )
        for name, layer in self.layers.items():
            if layer.shape != shapes[name]:
                raise LoRAMismatchError(
                    f"this LoRA updates {name!r} with shape {layer.shape}, and in {type(module).__name__} it has "
                    f"{shapes[name]}. It was trained for a model of another size."
                )
        return {name: modules[name] for name in self.layers}


def _adding(
    layer: LowRank, scale: float, along: Callable[[Tensor], Tensor | None] | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds a low-rank update to a layer's output."""
    down, up = layer.down, layer.up * scale

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal down, up
        inputs = args[0]
        taken = None if along is None else along(output)
        if along is not None and taken is None:
            return output
        if down.device != inputs.device or down.dtype != inputs.dtype:
            down, up = down.to(inputs), up.to(inputs)
        update = updated(module, inputs, down, up)
        return output + (update if taken is None else taken.to(update) * update)

    return hook


def sum_loras(loras: Sequence[LoRA]) -> LoRA:
    """The LoRA whose update of every layer is the sum of theirs, exactly: ranks are put side by side.

    Averaging factors would not do: ``(B1 + B2)(A1 + A2)`` has cross terms that nobody trained.

    Raises:
        LoRAError: if there is none, or two of them give one layer different shapes.

    >>> import artaug as aa, torch
    >>> from artaug.lora.lora import sum_loras
    >>> lora = aa.LoRA({"proj": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    >>> both = sum_loras([lora, lora.scaled(0.5)])
    >>> both.rank, both.layers["proj"].delta()[0, 0].item()
    (2, 1.5)
    """
    if not loras:
        raise LoRAError("received 0 LoRAs to add up, and a sum needs at least one.")
    parts: dict[str, list[LowRank]] = {}
    for lora in loras:
        for name, layer in lora.layers.items():
            parts.setdefault(name, []).append(layer)
    for name, layers in parts.items():
        shapes = {layer.shape for layer in layers}
        if len(shapes) > 1:
            raise LoRAError(
                f"the LoRAs disagree on the shape of {name!r}: {sorted(shapes)}. They belong to different models."
            )
    return LoRA(
        {
            name: LowRank(torch.cat([one.down for one in layers]), torch.cat([one.up for one in layers], dim=1))
            for name, layers in parts.items()
        }
    )

"""LoRA as a value: low-rank updates by layer name, what they add up to, the file they live in, and wearing them.

Strength is never hidden here: alpha is folded into the factors, so the update of a layer is ``up @ down`` and
nothing else.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from artaug.errors import LoRAError, LoRAMismatchError

_PREFIX = "transformer."
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one linear layer: ``up @ down``, nothing hidden.

    Raises:
        LoRAError: if the two factors do not share a rank of at least 1, or hold NaN or infinity.
    """

    down: Tensor
    """Shape (rank, inputs); called ``lora_A`` in PEFT files."""
    up: Tensor
    """Shape (outputs, rank); called ``lora_B`` in PEFT files."""

    def __post_init__(self) -> None:
        flat = self.down.ndim == self.up.ndim == 2
        if not (flat and self.down.shape[0] == self.up.shape[1] >= 1):
            raise LoRAError(
                f"low-rank factors need shapes (rank, inputs) and (outputs, rank) with a rank of at least 1, "
                f"received {tuple(self.down.shape)} and {tuple(self.up.shape)}."
            )
        if not (self.down.isfinite().all() and self.up.isfinite().all()):
            raise LoRAError("low-rank factors hold NaN or infinity. The training that made them diverged.")

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """What is added to the layer's weight: float32, shape (outputs, inputs)."""
        return self.up.float() @ self.down.float()


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

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> Path:
        """Write one safetensors file in PEFT naming that ``FluxPipeline.load_lora_weights`` reads at full strength.

        All layers are padded with zeros to one rank, and alpha equals it, so readers that know alpha and readers
        that ignore it see the same update. The file appears whole or not at all.

        Args:
            path: where to write; folders in between are made.
            metadata: strings to put beside the weights, provenance for instance.

        Returns:
            The path written.

        Raises:
            LoRAError: if ``metadata`` uses a name that the file format needs.
        """
        path = Path(path)
        taken = {"format", _METADATA} & set(metadata or {})
        if taken:
            raise LoRAError(f"metadata may not set {sorted(taken)}: readers of the file rely on it. Use another name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        rank = self.rank
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():  # cloned: layers may share a tensor, and safetensors refuses that
            down, up = layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone()
            tensors[f"{_PREFIX}{name}{_DOWN}"] = nn.functional.pad(down, (0, 0, 0, rank - layer.rank)).contiguous()
            tensors[f"{_PREFIX}{name}{_UP}"] = nn.functional.pad(up, (0, rank - layer.rank)).contiguous()
        adapter = {
            f"{_PREFIX}r": rank,
            f"{_PREFIX}lora_alpha": rank,
            f"{_PREFIX}target_modules": sorted(self.layers),
        }
        header = {"format": "pt", _METADATA: json.dumps(adapter), **(metadata or {})}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata=header)
            return partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file in PEFT naming, folding alpha where the file states one.

        Raises:
            LoRAError: if the file is missing, is no safetensors file, or holds anything this reader does not know.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as fault:
            raise LoRAError(f"{path} is not a LoRA file: {fault}. Expected safetensors in PEFT naming.") from None
        adapter = _adapter(header, path)
        layers = _layers(tensors, path)
        return cls({name: _folded(name, layer, tensors, adapter) for name, layer in layers.items()})

    @contextmanager
    def worn_by(
        self, module: nn.Module, *, scale: float = 1.0, along: Callable[[str, Tensor], Tensor | None] | None = None
    ) -> Iterator[None]:
        """Let ``module`` compute with this LoRA inside the ``with`` block, and exactly as before after it.

        The update is added by forward hooks on the named linear layers, so the weights are neither copied nor
        touched: quantised, offloaded and shared layers work, and several LoRAs can be worn at once.

        Args:
            module: the denoiser.
            scale: of every update.
            along: for the name of a layer and what goes into it, how much of the update each token takes, shaped to
                multiply the layer's output, or None for nothing at all; without it all take the whole.

        Raises:
            LoRAMismatchError: before anything changes, if a layer is missing or has another shape.
        """
        targets = self._targets(module)
        with ExitStack() as worn:
            for name, linear in targets.items():
                along_here = None if along is None else functools.partial(along, name)
                handle = linear.register_forward_hook(_adding(self.layers[name], scale, along_here))
                worn.callback(handle.remove)
            yield

    def _targets(self, module: nn.Module) -> dict[str, nn.Module]:
        """The layers this LoRA names, all of them or none."""
        modules = dict(module.named_modules())
        missing = [name for name in self.layers if not hasattr(modules.get(name), "in_features")]
        if missing:
            known = next((name for name, one in modules.items() if hasattr(one, "in_features")), "(no linear layer)")
            found = "none" if len(missing) == len(self.layers) else f"only {len(self.layers) - len(missing)}"
            raise LoRAMismatchError(
                f"this LoRA names {len(self.layers)} layers and {type(module).__name__} has {found} of them; "
                f"first missing is {missing[0]!r}, names there look like {known!r}."
            )
        for name, layer in self.layers.items():
            wanted = (modules[name].out_features, modules[name].in_features)
            given = (layer.up.shape[0], layer.down.shape[1])
            if given != wanted:
                raise LoRAMismatchError(
                    f"this LoRA updates {name!r} with shape {given}, and in {type(module).__name__} it has {wanted}. "
                    "It was trained for a model of another size."
                )
        return {name: modules[name] for name in self.layers}


def _adding(
    layer: LowRank, scale: float, along: Callable[[Tensor], Tensor | None] | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds a low-rank update to a linear layer's output."""
    down, up = layer.down, layer.up * scale

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal down, up
        inputs = args[0]
        taken = None if along is None else along(inputs)
        if along is not None and taken is None:
            return output
        if down.device != inputs.device or down.dtype != inputs.dtype:
            down, up = down.to(inputs), up.to(inputs)
        update = nn.functional.linear(nn.functional.linear(inputs, down), up)
        return output + (update if taken is None else taken.to(update) * update)

    return hook


def summed(loras: Sequence[LoRA]) -> LoRA:
    """The LoRA whose update of every layer is the sum of theirs, exactly: ranks are put side by side.

    Averaging factors would not do: ``(B1 + B2)(A1 + A2)`` has cross terms that nobody trained.

    Raises:
        LoRAError: if there is none, or two of them give one layer different shapes.

    >>> import artaug as aa, torch
    >>> from artaug.lora import summed
    >>> lora = aa.LoRA({"proj": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    >>> both = summed([lora, lora.scaled(0.5)])
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
        shapes = {(layer.up.shape[0], layer.down.shape[1]) for layer in layers}
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


def _adapter(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What the file's header says about strength, by PEFT's own names."""
    try:
        adapter = json.loads(header.get(_METADATA, "{}"))
    except json.JSONDecodeError as fault:
        raise LoRAError(
            f"{path} has a header {_METADATA!r} that is no JSON ({fault}), so its strength is unknown."
        ) from None
    if not isinstance(adapter, dict):
        raise LoRAError(f"{path} has a header {_METADATA!r} that is no JSON object, so its strength is unknown.")
    return {key.removeprefix(_PREFIX): stated for key, stated in adapter.items()}


def _layers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, LowRank]:
    """The factors in a file as they stand there, with nothing missing and nothing left over."""
    names = [key.removeprefix(_PREFIX).removesuffix(_DOWN) for key in tensors if key.endswith(_DOWN)]
    known = {f"{_PREFIX}{name}{end}" for name in names for end in (_DOWN, _UP, _ALPHA)}
    odd = [key for key in tensors if key not in known]
    odd += [f"{_PREFIX}{name}{_DOWN}" for name in names if f"{_PREFIX}{name}{_UP}" not in tensors]
    if odd or not names:
        raise LoRAError(
            f"{path} is not a LoRA in PEFT naming: it holds {(odd or ['no tensor at all'])[0]!r}. "
            f"Expected pairs like '{_PREFIX}transformer_blocks.0.attn.to_q{_DOWN}' and '...{_UP[1:]}', nothing else."
        )
    try:
        return {name: LowRank(tensors[f"{_PREFIX}{name}{_DOWN}"], tensors[f"{_PREFIX}{name}{_UP}"]) for name in names}
    except LoRAError as fault:
        raise LoRAError(f"{path} is not a LoRA artaug can read: {fault}") from None


def _folded(name: str, layer: LowRank, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any]) -> LowRank:
    """One layer with its strength folded in: its own alpha first, then the file's, then alpha = rank."""
    patterns = adapter.get("alpha_pattern", {})
    pattern = next((one for one in patterns if re.fullmatch(rf"(.*\.)?({one})", name)), None)  # PEFT's own rule
    alpha = adapter.get("lora_alpha", layer.rank) if pattern is None else patterns[pattern]
    if (key := f"{_PREFIX}{name}{_ALPHA}") in tensors:
        alpha = tensors[key].item()
    scale = alpha / (layer.rank**0.5 if adapter.get("use_rslora") else layer.rank)
    return layer if scale == 1 else LowRank(layer.down, layer.up * scale)

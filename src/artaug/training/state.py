"""The state of a training between two steps, and the checkpoint files it is written to. No pickle anywhere.

The pairs of a step and their noise follow from the seed and the step's number alone (`artaug.training.batches`), so no state
of a random generator and no position in a data set has to be kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.decoding import decode_json
from artaug._internal.files import atomic_write, check_writable
from artaug._internal.sealed import open_sealed, save_sealed
from artaug.errors import InvalidValueError, StorageError
from artaug.lora.lora import LoRA, LowRank, sum_loras
from artaug.training.adapters import AdapterTensors
from artaug.training.loss_scale import LossScale
from artaug.training.validation import ValidationResult

_VERSION = "6"
_TENSOR_KEY = "__tensor__"

OptimizerState: TypeAlias = Any
"""An optimizer's ``state_dict``: nested dicts, lists and tuples of tensors, numbers, strings and None."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CompanionState:
    """The companion of a stage, between two steps."""

    tensors: Mapping[str, AdapterTensors]
    """Its trained tensors, by layer; a head counts as a layer."""
    optimizer: OptimizerState
    """Its optimizer's ``state_dict``."""
    loss_scale: LossScale | None = None
    """Of a model that computes in float16."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """A training after ``step`` steps."""

    step: int = 0
    """Optimizer steps taken."""
    losses: tuple[float, ...] = ()
    """Of those steps."""
    seconds: float = 0.0
    """Wall-clock time they took, encoding and validations included, over all runs of a training that was resumed."""
    group_loras: tuple[LoRA, ...] = ()
    """The results of the groups of pairs that are done."""
    stage_loras: tuple[LoRA, ...] = ()
    """The LoRAs of the earlier stages of the current group: applied, frozen, while the current stage learns."""
    adapter: Mapping[str, AdapterTensors] = field(default_factory=dict)
    """The trained tensors of the current stage, by layer; empty where a stage is about to begin."""
    ema: Mapping[str, AdapterTensors] = field(default_factory=dict)
    """Their moving average, if one is kept."""
    ema_updates: int = 0
    """How many parameters it has averaged."""
    loss_scale: LossScale | None = None
    """Of a model that computes in float16; it goes on from stage to stage."""
    optimizer: OptimizerState = None
    """The optimizer's ``state_dict``."""
    companion: CompanionState | None = None
    """What learns beside the current stage, if anything does; None where a stage is about to begin."""
    base_scores: tuple[float, ...] = ()
    """Of the held-out pictures drawn without the LoRA, if there is a validation."""
    validations: tuple[ValidationResult, ...] = ()
    best_lora: LoRA | None = None
    """The LoRA of the best validation."""
    current_lora: LoRA | None = None
    """What the current stage would export now. It follows from the others and the model, so it is not saved."""

    def after_phase(self, lora: LoRA, *, is_last_stage: bool) -> "TrainingState":
        """The state after a phase that learned ``lora``."""
        state = replace(self, adapter={}, ema={}, ema_updates=0, optimizer=None, companion=None, current_lora=None)
        if is_last_stage:
            return replace(state, group_loras=(*self.group_loras, lora), stage_loras=())
        return replace(state, stage_loras=(*self.stage_loras, lora))

    def lora(self) -> LoRA:
        """What has been learned: the mean over the groups that are done, or what a single group has so far."""
        if self.current_lora is not None:
            return self.current_lora
        return sum_loras([lora.scaled(1 / len(self.group_loras)) for lora in self.group_loras])

    def save(self, path: Path, *, run_fingerprint: Mapping[str, str]) -> None:
        """Write the state to one file that appears whole or not at all, even if the machine dies on the way.

        Args:
            path: where to write; folders in between are made.
            run_fingerprint: what decides the result of the training, by name; `load` refuses a file with another one.

        Raises:
            StorageError: if it cannot be written; whatever was at ``path`` is as before.
        """
        numbers = {"losses": self.losses, "base_scores": self.base_scores}
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
        for index, lora in enumerate(self.group_loras):
            tensors |= lora_to_tensors(f"group_loras.{index}", lora)
        for index, lora in enumerate(self.stage_loras):
            tensors |= lora_to_tensors(f"stage_loras.{index}", lora)
        tensors |= _adapter_to_tensors("adapter", self.adapter) | _adapter_to_tensors("ema", self.ema)
        if self.best_lora is not None:
            tensors |= lora_to_tensors("best_lora", self.best_lora)
        companion = None
        if self.companion is not None:
            tensors |= _adapter_to_tensors("companion", self.companion.tensors)
            companion = {
                "optimizer": _extract_tensors(self.companion.optimizer, "companion_optimizer", tensors),
                "loss_scale": None if self.companion.loss_scale is None else asdict(self.companion.loss_scale),
            }
        header = {
            "version": _VERSION,
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "ema_updates": str(self.ema_updates),
            "loss_scale": json.dumps(None if self.loss_scale is None else asdict(self.loss_scale)),
            "validations": json.dumps([result.to_dict() for result in self.validations]),
            "companion": json.dumps(companion),
            "optimizer": json.dumps(_extract_tensors(self.optimizer, "optimizer", tensors)),
        }
        remedy = (
            "Those before it are whole: once the folder can be written to, call train again with the same arguments to go on "
            "from the last."
        )
        with atomic_write(path, what="the checkpoint", remedy=remedy) as partial:
            save_sealed(tensors, partial, {**header, **run_fingerprint})

    @classmethod
    def load(cls, path: Path, *, run_fingerprint: Mapping[str, str]) -> "TrainingState":
        """Read what `save` wrote.

        Raises:
            StorageError: if it is no checkpoint, one with as much as a bit that is not as it was written, or one of
                another training, naming what differs.
        """
        remedy = "Delete it to go on from the one before."
        with open_sealed(path, what="checkpoint", remedy=remedy) as file:
            header = file.metadata
            if header.get("version") != _VERSION:
                raise StorageError(
                    f"{path} is no checkpoint of this version of artaug (its version: {header.get('version')}, expected "
                    f"{_VERSION}). Give the training another folder."
                )
            differing = [name for name in run_fingerprint if header.get(name) != run_fingerprint[name]]
            if differing:
                both = "; ".join(
                    f"{name}: {header.get(name)} there, {run_fingerprint[name]} here" for name in differing
                )
                raise StorageError(
                    f"{path} belongs to another training ({both}). Give this one another folder, or the arguments of that "
                    "one."
                )
            # Copied, since the originals are mapped to a file that is deleted later.
            tensors = {name: file.read(name).clone() for name in sorted(file.names)}
        try:
            return cls._from_file(tensors, header)
        except (LookupError, TypeError, ValueError, RecursionError) as error:  # sealed, and not by this program
            raise StorageError(f"{path} is no checkpoint that artaug wrote: {error!r}. {remedy}") from error

    @classmethod
    def _from_file(cls, tensors: dict[str, Tensor], header: Mapping[str, str]) -> "TrainingState":
        return cls(
            step=int(header["step"]),
            losses=tuple(tensors.pop("losses").tolist()),
            seconds=float(header["seconds"]),
            group_loras=_loras_from_tensors(tensors, "group_loras"),
            stage_loras=_loras_from_tensors(tensors, "stage_loras"),
            adapter=_adapter_from_tensors(tensors, "adapter"),
            ema=_adapter_from_tensors(tensors, "ema"),
            ema_updates=int(header["ema_updates"]),
            loss_scale=_loss_scale(json.loads(header["loss_scale"])),
            companion=None
            if (companion := decode_json(header["companion"])) is None
            else CompanionState(
                tensors=_adapter_from_tensors(tensors, "companion"),
                optimizer=_insert_tensors(companion["optimizer"], tensors),
                loss_scale=_loss_scale(companion["loss_scale"]),
            ),
            base_scores=tuple(tensors.pop("base_scores").tolist()),
            validations=tuple(ValidationResult(**result) for result in decode_json(header["validations"])),
            best_lora=lora_from_tensors(tensors, "best_lora")
            if any(name.startswith("best_lora.") for name in tensors)
            else None,
            optimizer=_insert_tensors(decode_json(header["optimizer"]), tensors),
        )


@checked
@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The folder of a training's checkpoints, so that it goes on after a kill as if nothing had happened.

    A training that finds its own checkpoints in the folder goes on from the newest; one that finds those of another
    training refuses to run. Each file appears whole or not at all.

    Raises:
        InvalidValueError: unless both numbers are whole and at least 1.

    >>> import artaug as aa
    >>> aa.Checkpoints(folder="runs/first/training", every=50)
    Checkpoints(folder='runs/first/training', every=50, keep=2)
    """

    folder: str | Path
    """Made if it does not exist."""
    every: int = 100
    """Steps between two files. There is one after each validation and after the last step, too."""
    keep: int = 2
    """How many of the newest files stay."""

    def __post_init__(self) -> None:
        numbers: tuple[object, ...] = (self.every, self.keep)
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise InvalidValueError(
                f"Checkpoints(every={self.every!r}, keep={self.keep!r}): need whole numbers of at least 1, steps between "
                "two files and files that stay."
            )

    def check(self) -> None:
        """Refuse a folder that cannot be written to; nothing is made or changed.

        Raises:
            StorageError: if the system says so.
        """
        check_writable(Path(self.folder), what="the folder of checkpoints")

    def latest(self, *, run_fingerprint: Mapping[str, str]) -> TrainingState | None:
        """The state in the newest file; None if there is none yet.

        Raises:
            StorageError: if the file is broken, or belongs to another training.
        """
        files = self._files()
        return TrainingState.load(files[-1], run_fingerprint=run_fingerprint) if files else None

    def write(self, state: TrainingState, *, run_fingerprint: Mapping[str, str]) -> None:
        """Add a file, then delete the oldest beyond ``keep``.

        Raises:
            StorageError: if it cannot be written; the files before it are all there then.
        """
        path = Path(self.folder) / f"step-{state.step:08}.safetensors"
        state.save(path, run_fingerprint=run_fingerprint)
        for old in self._files()[: -self.keep]:
            old.unlink()

    def _files(self) -> list[Path]:
        return sorted(Path(self.folder).glob("step-*.safetensors"))


# Tensors in the file are named "adapter|<layer>|<tensor>" and "group_loras.<index>.<layer>.<side>". safetensors sorts the
# names, and layers are looked up by theirs, so the order within the file does not matter.


def _adapter_to_tensors(prefix: str, layers: Mapping[str, AdapterTensors]) -> dict[str, Tensor]:
    return {f"{prefix}|{layer}|{name}": tensor for layer, tensors in layers.items() for name, tensor in tensors.items()}


def _adapter_from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, *path = key.split("|")
        if kind == prefix:
            layer, name = path
            layers.setdefault(layer, {})[name] = tensor
    return layers


def lora_to_tensors(prefix: str, lora: LoRA) -> dict[str, Tensor]:
    """The factors of a LoRA under names that begin with ``prefix``, to the bit."""
    sides = ((name, side, getattr(layer, side)) for name, layer in lora.layers.items() for side in ("down", "up"))
    # Copied, since safetensors refuses tensors that share memory, as the factors of two layers may.
    return {f"{prefix}.{name}.{side}": factor.clone() for name, side, factor in sides}


def lora_from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> LoRA:
    """The LoRA that `lora_to_tensors` took apart."""
    start, end = f"{prefix}.", ".down"
    names = [key[len(start) : -len(end)] for key in tensors if key.startswith(start) and key.endswith(end)]
    return LoRA({name: LowRank(tensors[f"{start}{name}.down"], tensors[f"{start}{name}.up"]) for name in names})


def _loras_from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> tuple[LoRA, ...]:
    indices = sorted({int(key.split(".")[1]) for key in tensors if key.startswith(f"{prefix}.")})
    return tuple(lora_from_tensors(tensors, f"{prefix}.{index}") for index in indices)


def _loss_scale(numbers: Mapping[str, Any] | None) -> LossScale | None:
    return None if numbers is None else LossScale(**numbers)


def _extract_tensors(value: OptimizerState, name: str, tensors: dict[str, Tensor]) -> OptimizerState:
    """A copy that JSON can hold: tensors go to ``tensors``, and their names stand in their places."""
    match value:
        case Tensor():
            tensors[name] = value.detach().cpu().clone()
            return {_TENSOR_KEY: name}
        case Mapping():
            # As pairs, since an optimizer's keys are numbers, too, which JSON would make strings.
            return {"pairs": [[key, _extract_tensors(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
        case str() | int() | float() | None:
            return value
        case Sequence():
            items = [_extract_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
            return {"items": items, "tuple": isinstance(value, tuple)}
        case _:
            pass
    raise StorageError(
        f"the optimizer keeps a {type(value).__name__} at {name!r}, which a checkpoint without pickle cannot hold. "
        "Expected tensors, numbers, strings, lists and dicts: train without checkpoints, or with another optimizer."
    )


def _insert_tensors(value: OptimizerState, tensors: Mapping[str, Tensor]) -> OptimizerState:
    """The inverse of `_extract_tensors`."""
    match value:
        case {"__tensor__": name}:
            return tensors[name]
        case {"pairs": pairs}:
            return {key: _insert_tensors(item, tensors) for key, item in pairs}
        case {"items": items, "tuple": is_tuple}:
            restored = [_insert_tensors(item, tensors) for item in items]
            return tuple(restored) if is_tuple else restored
        case _:
            return value

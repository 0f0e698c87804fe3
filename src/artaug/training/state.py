"""Where a training stands between two steps: all it needs to go on, and the file it waits in. No pickle anywhere.

Which pairs a step sees and their noise follow from the seed and the step's number alone (`artaug.training.batches`),
so no state of a random generator and no place in a list has to be kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from artaug._internal.files import atomic_write, load_tensors, save_tensors
from artaug.errors import InvalidValueError, StorageError
from artaug.lora.lora import LoRA, LowRank, sum_loras
from artaug.training.adapters import AdapterTensors
from artaug.training.validation import ValidationResult, as_json

_VERSION = "2"
_HELD = "__tensor__"

Nested: TypeAlias = Any
"""What an optimizer's ``state_dict`` is made of: dicts, lists, tensors, numbers, strings, None."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """A training after so many steps."""

    step: int = 0
    """Optimizer steps behind it."""
    losses: tuple[float, ...] = ()
    """Of those steps."""
    finished: tuple[LoRA, ...] = ()
    """What the groups of pairs behind it have learned."""
    under: tuple[LoRA, ...] = ()
    """What the earlier stages of this group have learned."""
    layers: Mapping[str, AdapterTensors] = field(default_factory=dict)
    """What the stage under way is learning, by layer; none where a stage is about to begin."""
    average: Mapping[str, AdapterTensors] = field(default_factory=dict)
    """Its moving average, if one is kept."""
    optimizer: Nested = None
    """The optimizer's ``state_dict``."""
    base_scores: tuple[float, ...] = ()
    """Of the held-out pictures drawn without what is learned, if they are looked at."""
    validations: tuple[ValidationResult, ...] = ()
    best: LoRA | None = None
    """The LoRA of the best look."""
    learned: LoRA | None = None
    """What the stage under way would export now. It follows from the others and the model, and is not written down."""

    def past(self, lora: LoRA, *, last: bool) -> "TrainingState":
        """The state after a leg that learned ``lora``, which was the last of its group or not."""
        between = replace(self, layers={}, average={}, optimizer=None, learned=None)
        if last:
            return replace(between, finished=(*self.finished, lora), under=())
        return replace(between, under=(*self.under, lora))

    def lora(self) -> LoRA:
        """What has been learned: the mean over the groups of pairs that are done, or what a single one has so far."""
        if self.learned is not None:
            return self.learned
        return sum_loras([lora.scaled(1 / len(self.finished)) for lora in self.finished])

    def save(self, path: Path, *, run_fingerprint: Mapping[str, str]) -> None:
        """Write the state to one file that appears whole or not at all, even if the machine dies on the way.

        Args:
            path: where to write; folders in between are made.
            run_fingerprint: what the training is made of, by name; `load` refuses a file of another one.

        Raises:
            StorageError: if it cannot be written; whatever was at ``path`` is as before.
        """
        numbers = {"losses": self.losses, "base_scores": self.base_scores}
        tensors = {name: torch.tensor(one, dtype=torch.float64) for name, one in numbers.items()}
        for number, lora in enumerate(self.finished):
            tensors |= _flat(f"finished.{number}", lora.layers)
        for number, lora in enumerate(self.under):
            tensors |= _flat(f"under.{number}", lora.layers)
        tensors |= _parts("layers", self.layers) | _parts("average", self.average)
        tensors |= _flat("best", {} if self.best is None else self.best.layers)
        header = {
            "version": _VERSION,
            "step": str(self.step),
            "looks": json.dumps([as_json(look) for look in self.validations]),
            "optimizer": json.dumps(_without_tensors(self.optimizer, "optimizer", tensors)),
        }
        remedy = (
            "Those before it are whole: make room and call train again with the same arguments to go on from the last."
        )
        with atomic_write(path, what="the checkpoint", remedy=remedy) as partial:
            save_tensors(tensors, partial, {**header, **run_fingerprint})

    @classmethod
    def load(cls, path: Path, *, run_fingerprint: Mapping[str, str]) -> "TrainingState":
        """Read what `save` wrote.

        Raises:
            StorageError: if it is no checkpoint, or one of another training, naming what differs.
        """
        try:
            stored, header = load_tensors(path)
        except OSError as fault:
            raise StorageError(f"{path} is no checkpoint: {fault}. Delete it to go on from the one before.") from None
        tensors = {
            name: tensor.clone() for name, tensor in stored.items()
        }  # not mapped to a file that is deleted later
        if header.get("version") != _VERSION:
            raise StorageError(
                f"{path} is no checkpoint of this version of artaug (its version: {header.get('version')}, expected "
                f"{_VERSION}). Give the training another folder."
            )
        unlike = [name for name in run_fingerprint if header.get(name) != run_fingerprint[name]]
        if unlike:
            told = "; ".join(f"{name}: {header.get(name)} there, {run_fingerprint[name]} here" for name in unlike)
            raise StorageError(
                f"{path} belongs to another training ({told}). Give this one another folder, or the arguments of that one."
            )
        return cls(
            step=int(header["step"]),
            losses=tuple(tensors.pop("losses").tolist()),
            finished=_loras(tensors, "finished"),
            under=_loras(tensors, "under"),
            layers=_by_layer(tensors, "layers"),
            average=_by_layer(tensors, "average"),
            base_scores=tuple(tensors.pop("base_scores").tolist()),
            validations=tuple(ValidationResult(**look) for look in json.loads(header["looks"])),
            best=LoRA(layers) if (layers := _layers(tensors, "best")) else None,
            optimizer=_with_tensors(json.loads(header["optimizer"]), tensors),
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where a training writes down where it stands, so that it goes on after a kill as if nothing had happened.

    A training that finds checkpoints of its own in the folder goes on from the last one; one that finds those of
    another training refuses to run. Each file appears whole or not at all.

    Raises:
        InvalidValueError: unless both numbers are whole and at least 1.

    >>> import artaug as aa
    >>> aa.Checkpoints(folder="runs/first/training", every=50)
    Checkpoints(folder='runs/first/training', every=50, keep=2)
    """

    folder: str | Path
    """Made if it is not there."""
    every: int = 100
    """Steps between two files."""
    keep: int = 2
    """How many of the newest files stay."""

    def __post_init__(self) -> None:
        numbers: tuple[object, ...] = (self.every, self.keep)
        if not all(isinstance(one, int) and one >= 1 for one in numbers):
            raise InvalidValueError(
                f"Checkpoints(every={self.every!r}, keep={self.keep!r}): need whole numbers of at least 1, steps between "
                "two files and files that stay."
            )

    def newest(self, *, run_fingerprint: Mapping[str, str]) -> TrainingState | None:
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
        for leftover in Path(self.folder).glob("step-*.partial"):  # of a training that was killed while it wrote
            leftover.unlink()

    def _files(self) -> list[Path]:
        return sorted(Path(self.folder).glob("step-*.safetensors"))


def _parts(prefix: str, layers: Mapping[str, AdapterTensors]) -> dict[str, Tensor]:
    return {f"{prefix}|{name}|{part}": one for name, parts in layers.items() for part, one in parts.items()}


def _by_layer(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """What `_parts` spread out; layers and parts are found by name, so order does not matter."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, *path = key.split("|")
        if kind == prefix:
            name, part = path
            found.setdefault(name, {})[part] = tensor
    return found


def _flat(prefix: str, layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    sides = ((name, side, getattr(one, side)) for name, one in layers.items() for side in ("down", "up"))
    return {f"{prefix}.{name}.{side}": factor.clone() for name, side, factor in sides}  # two may share one


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, LowRank]:
    """The layers under a prefix; safetensors sorts its keys, and layers are found by name, so order does not matter."""
    names = [name[len(prefix) + 1 : -len(".down")] for name in tensors if name.startswith(f"{prefix}.")]
    mine = dict.fromkeys(name for name in names if f"{prefix}.{name}.down" in tensors)
    return {name: LowRank(tensors[f"{prefix}.{name}.down"], tensors[f"{prefix}.{name}.up"]) for name in mine}


def _loras(tensors: Mapping[str, Tensor], prefix: str) -> tuple[LoRA, ...]:
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith(f"{prefix}.")})
    return tuple(LoRA(_layers(tensors, f"{prefix}.{number}")) for number in numbers)


def _without_tensors(nested: Nested, name: str, tensors: dict[str, Tensor]) -> Nested:
    """What JSON can hold of a nested thing; its tensors go to ``tensors``."""
    match nested:
        case Tensor():
            tensors[name] = nested.detach().cpu().clone()
            return {_HELD: name}
        case Mapping():
            pairs = [[key, _without_tensors(one, f"{name}.{key}", tensors)] for key, one in nested.items()]
            return {"pairs": pairs}  # an optimizer's keys are numbers, too, which JSON would make strings
        case str() | int() | float() | None:
            return nested
        case Sequence():
            items = [_without_tensors(one, f"{name}.{number}", tensors) for number, one in enumerate(nested)]
            return {"items": items, "tuple": isinstance(nested, tuple)}
        case _:
            pass
    raise StorageError(
        f"the optimizer keeps a {type(nested).__name__} at {name!r}, which a checkpoint without pickle cannot hold. "
        "Expected tensors, numbers, strings, lists and dicts: train without checkpoints, or with another optimizer."
    )


def _with_tensors(nested: Nested, tensors: Mapping[str, Tensor]) -> Nested:
    match nested:
        case {"__tensor__": name}:
            return tensors[name]
        case {"pairs": pairs}:
            return {key: _with_tensors(one, tensors) for key, one in pairs}
        case {"items": items, "tuple": frozen}:
            found = [_with_tensors(one, tensors) for one in items]
            return tuple(found) if frozen else found
        case _:
            return nested

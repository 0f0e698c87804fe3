"""Where models are while a run goes on: all where they were loaded, or one object's at a time on the device."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import final

import torch
from torch import nn

from artaug._internal.annotations import Seam, checked
from artaug._internal.arguments import Faults
from artaug._internal.contracts import contract_error
from artaug._internal.devices import check_placement, resolve_device
from artaug._internal.locking import all_held, locks_of
from artaug._internal.modules import unwrap
from artaug._internal.offloading import bring, device_of, pin, take_off, unmovable_reason, unpin
from artaug.errors import ModelError


class Placement(Seam):
    """Where models are during a run: `Resident` or `OneAtATime`."""

    @abstractmethod
    def opened(self, *owners: object) -> AbstractContextManager["Placement"]:
        """The placement for the length of a run, a ``with`` block: models that wait do so in host memory.

        After the block every model is where it was before. Blocks may lie inside each other; the outermost counts.

        Args:
            owners: all that will compute, as far as it is known: synthesizers, critics, scorers, filters.
        """

    @abstractmethod
    def stage(self, *owners: object) -> AbstractContextManager[None]:
        """A ``with`` block in which these objects compute: their models are on the device."""

    @abstractmethod
    def check(self, owner: str, owners: Mapping[str, object]) -> None:
        """Refuse models that cannot be placed so.

        Args:
            owner: the function that was called, for the error's text.
            owners: what will compute, by the name of its argument.

        Raises:
            ModelError: naming a model that cannot be moved, and why.
            InvalidValueError: with a line for each, if there are several.
            ContractError: if ``models`` of one is no sequence of modules.
        """


@checked
@final
@dataclass(frozen=True)
class Resident(Placement):
    """All models stay where their owners put them: the fastest, where they fit into the device's memory together."""

    def opened(self, *owners: object) -> AbstractContextManager[Placement]:
        return nullcontext(self)

    def stage(self, *owners: object) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self, owner: str, owners: Mapping[str, object]) -> None:
        pass


@checked
@final
@dataclass(frozen=True)
class OneAtATime(Placement):
    """A stage brings its models to the device when it begins, and they leave it when it ends; the others wait in host memory.

    What an object computes with is its ``models`` property (of a synthesizer, critic, scorer or filter); models that it
    does not name stay where they are, as do those on another GPU than ``device``. If only one object of a run has any, they
    come to the device once and stay. The weights must fit into host memory, all of them.

    Models cannot be moved if hooks move them already (``enable_model_cpu_offload``, a ``device_map`` of several devices), if
    their weights are in 8 bits of bitsandbytes or sharded, or if they are compiled with CUDA graphs: `improve` and `enhance`
    refuse those before they begin. What a stage changes in a model's weights is kept, unless it does so through ``.data``.

    Raises:
        InvalidValueError: for a ``device`` that torch does not have.

    >>> import artaug as aa
    >>> aa.OneAtATime(device="cpu")
    OneAtATime(device='cpu', pin_memory=True)
    """

    device: str | torch.device | None = None
    """Where stages compute. None: where the first model that is not on the CPU is; if all are, the accelerator that torch
    finds; without one, the CPU."""
    pin_memory: bool = True
    """Keep waiting weights in pinned host memory, from which a CUDA device reads faster. The system cannot swap it out."""

    def __post_init__(self) -> None:
        if self.device is not None:
            check_placement("OneAtATime", dtype="auto", device=self.device)

    @contextmanager
    def opened(self, *owners: object) -> Iterator[Placement]:
        modules = _modules(owners)
        session = _Session(self.resolve(modules), pin_memory=self.pin_memory)
        try:
            session.adopt(modules)
            yield session
        finally:
            session.close()

    @contextmanager
    def stage(self, *owners: object) -> Iterator[None]:
        with self.opened(*owners) as session, session.stage(*owners):
            yield

    def check(self, owner: str, owners: Mapping[str, object]) -> None:
        faults = Faults(owner)
        with faults.collected():
            self.resolve([])
        for name, value in owners.items():
            with faults.collected():
                for module in models_of(value):
                    if (reason := unmovable_reason(module)) is not None:
                        raise ModelError(
                            f"{owner}(placement={self!r}): the {type(unwrap(module)).__name__} of {name} "
                            f"({type(value).__name__}) cannot be moved: {reason}, or leave the placement out."
                        )
        faults.raise_any()

    def resolve(self, modules: Sequence[nn.Module]) -> torch.device:
        """The device of stages, in a run with these models.

        Raises:
            ModelError: if this machine has no such device.
        """
        devices = (device_of(module) for module in modules)
        on_accelerator = next((device for device in devices if device is not None and device.type != "cpu"), None)
        if self.device is None and on_accelerator is not None:
            return on_accelerator
        return torch.empty(0, device=resolve_device(self.device or "auto")).device  # with its index, as a tensor has it


@dataclass(eq=False)
class _Session(Placement):
    """A `OneAtATime` during a run."""

    device: torch.device
    pin_memory: bool
    _homes: dict[nn.Module, torch.device] = field(default_factory=dict)
    """Where each model was before the run, in the order in which they came."""
    _on_device: list[nn.Module] = field(default_factory=list)
    _in_use: list[nn.Module] = field(default_factory=list)
    """By stages that have not ended; a stage may lie inside another."""
    _pinned: list[nn.Parameter] = field(default_factory=list)

    def opened(self, *owners: object) -> AbstractContextManager[Placement]:
        self.adopt(_modules(owners))
        return nullcontext(self)

    @contextmanager
    def stage(self, *owners: object) -> Iterator[None]:
        modules = self.adopt(_modules(owners))
        # A part of a model that is in use is on the device, and stays there when this stage ends.
        used = {part for module in self._in_use for part in module.modules()}
        mine = [module for module in modules if module not in used]
        idle = [module for module in self._on_device if module not in used and module not in mine]
        if not mine:
            yield
            return
        with all_held(locks_of([unwrap(module) for module in (*idle, *mine)])):
            self._take_off(idle)
            self._in_use += mine
            try:
                self._bring(mine)
                yield
            finally:
                self._in_use = [module for module in self._in_use if module not in mine]
                if set(self._homes) != set(mine):  # else nothing waits for the device
                    self._take_off(mine)
                    self._bring(self._in_use)  # a part of which may have left it just now

    def check(self, owner: str, owners: Mapping[str, object]) -> None:
        pass  # the placement was asked before it was opened

    def adopt(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Note models that were not known, and take them off the device; return those that are to be moved."""
        new: list[nn.Module] = []
        for module in modules:
            if module in self._homes or (home := self._home(module)) is None or home not in {_CPU, self.device}:
                continue
            self._homes[module] = home
            if home == self.device != _CPU:
                new.append(module)
        with all_held(locks_of([unwrap(module) for module in new])):
            self._take_off(new)
        return [module for module in modules if module in self._homes]

    def close(self) -> None:
        """Bring every model to where it was before the run."""
        with all_held(locks_of([unwrap(module) for module in self._homes])), ExitStack() as stack:
            for module, home in reversed(self._homes.items()):  # a stack: all of them, the first one first
                stack.callback(module.to, home)
            stack.callback(unpin, self._pinned)
            self._take_off(list(self._on_device))

    def _home(self, module: nn.Module) -> torch.device | None:
        """Where a model is, or was before the run if it is a part of one that is known already, or has one as a part."""
        related = (
            home for known, home in self._homes.items() if module in set(known.modules()) or known in module.modules()
        )
        return next(related, device_of(module))

    def _bring(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            if module not in self._on_device:
                self._on_device.append(module)
            if self.pin_memory and self.device.type == "cuda":
                self._pinned += pin(module)
            bring(module, self.device)

    def _take_off(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            take_off(module)
            self._on_device = [other for other in self._on_device if other is not module]


_CPU = torch.device("cpu")


def models_of(owner: object) -> tuple[nn.Module, ...]:
    """The models that an object computes with; none for one without a ``models`` property.

    Raises:
        ContractError: if its ``models`` is no sequence of modules.
    """
    models = () if isinstance(owner, type) else getattr(owner, "models", ())
    if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
        raise contract_error(
            type(owner).__name__,
            "models",
            received=f"{models!r:.120}",
            inputs="",
            expected="a tuple of torch.nn.Module",
        )
    return tuple(models)


def _modules(owners: Sequence[object]) -> list[nn.Module]:
    """The models of several objects, each once."""
    return list(dict.fromkeys(module for owner in owners for module in models_of(owner)))

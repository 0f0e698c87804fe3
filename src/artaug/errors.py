"""Every error artaug raises on purpose.

Each is an `ArtAugError` and also the builtin that fits, so that both ``except ArtAugError`` and
``except ValueError`` catch it. What a user's object raises is wrapped once, in a `PartError`; other bugs and out-of-memory
errors are never wrapped.

```
ArtAugError
├── InvalidValueError (ValueError)       an argument or a field has a value that is not allowed
│   ├── GeometryError                    a box or a mask that does not describe a part of an image
│   └── PromptError                      no prompts, or one that cannot be used
├── ContractError (TypeError)            a user's object returned something its seam does not allow
├── PartError (RuntimeError)             a user's object raised
│   ├── CriticError                      a critic raised instead of abstaining
│   └── ScoringError                     a scorer or a judge raised, perhaps on some pictures of a comparison only
├── ModelError (ValueError)              a folder, pipeline or size the adapter cannot work with
├── GuideError (RuntimeError)            a guide cannot be installed, or a region would have no effect
├── LoRAError (ValueError)               a malformed LoRA file or value
│   └── LoRAMismatchError                a LoRA that names layers the model does not have
├── TokensError (ValueError)             a malformed file or value of trained tokens, or one that fits no text encoder
├── NonFiniteError (ArithmeticError)     NaN or infinity where numbers were expected
│   └── TrainingDivergedError            the loss or its gradient is not finite
├── StorageError (OSError)               a file of artaug's own could not be written, or is not what it should be
├── UndecidedError (LookupError)         a pair that no person has decided on yet
├── HubError (RuntimeError)               the Hub refused something, or could not be reached
├── ClusterError (RuntimeError)          a cluster cannot be reached, lacks what is asked for, or its workers die
│   └── WorkerDiedError                  the process that worked on a call died each time
├── NothingToLearnError (RuntimeError)   no pair was kept, so there is nothing to train on
└── MissingExtraError (ImportError)      an optional package is not installed
```
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class ArtAugError(Exception):
    """Base class of every error artaug raises on purpose. Every one can be pickled, with its attributes.

    Attributes:
        result: where `enhance` raised it, the `Enhancement` of the rounds that had finished, their LoRAs included;
            elsewhere None.
    """

    result: Any = None  # of a floor above

    def __reduce__(self) -> "tuple[Any, ...]":
        # An exception is unpickled by a call with its args, its message that is, and some classes take other arguments.
        # That error would be raised in a thread of the parent's process pool, which then waits for ever.
        return _restore, (type(self), self.args), vars(self)


def _restore(cls: type[ArtAugError], args: tuple[Any, ...]) -> ArtAugError:
    """An error as it was when it was pickled: made by the builtin's constructor, not by that of its own class."""
    error = cls.__new__(cls, *args)
    super(ArtAugError, error).__init__(*args)
    return error


class InvalidValueError(ArtAugError, ValueError):
    """An argument or a field has a value that is not allowed."""


class GeometryError(InvalidValueError):
    """A box or a mask that does not describe a part of an image."""


class PromptError(InvalidValueError):
    """An empty list of prompts, or a prompt that cannot be used."""


class ContractError(ArtAugError, TypeError):
    """An object of the user's (a critic, planner, synthesizer, scorer, filter, ...) broke the contract of its seam."""


class PartError(ArtAugError, RuntimeError):
    """An object of the user's (a synthesizer, planner, scorer, filter, ...) raised; its exception is the cause.

    What passes by itself, such as a timeout, has been tried again for ten minutes before. An `ArtAugError` that such an object
    raises is not wrapped: it gets a note that names the object and its prompts.
    """


class CriticError(PartError):
    """A critic raised an exception where it should have returned an `Abstention`."""


class ModelError(ArtAugError, ValueError):
    """A model folder, pipeline or picture size that the adapter cannot work with."""


class GuideError(ArtAugError, RuntimeError):
    """A guide cannot be installed, or a region would have no effect."""


class LoRAError(ArtAugError, ValueError):
    """A LoRA file or value that is malformed."""


class LoRAMismatchError(LoRAError):
    """A LoRA names layers, or has shapes, that the model does not have."""


class TokensError(ArtAugError, ValueError):
    """A malformed file or value of trained tokens, or one that fits no text encoder of a model."""


class NonFiniteError(ArtAugError, ArithmeticError):
    """NaN or infinity appeared where finite numbers were expected."""


class TrainingDivergedError(NonFiniteError):
    """The training loss, or its gradient, is not finite.

    Attributes:
        step: the step, counted from 1, that was not taken.
        loss: its loss.
        gradient_norm: the norm of its gradient.
    """

    def __init__(self, step: int, loss: float, *, gradient_norm: float = math.nan) -> None:
        what = f"the gradient norm was {gradient_norm}" if math.isfinite(loss) else f"the loss was {loss}"
        super().__init__(
            f"{what} at step {step}. Lower the learning rate, check the pairs for broken images, or load a model in float16, "
            "which ends at 65,504, in bfloat16; the step was not taken, and a checkpoint of the steps before it can be used."
        )
        self.step = step
        self.loss = loss
        self.gradient_norm = gradient_norm


class StorageError(ArtAugError, OSError):
    """A file of artaug's own (a checkpoint, a cache) could not be written, or does not hold what it should."""


class ScoringError(PartError):
    """A scorer or a judge raised; in a comparison, perhaps on some pictures after others had been scored.

    Attributes:
        comparison: the `Comparison` of all that was scored, ``failures`` included; None if that is too little for one, and
            outside a comparison.
        scores: by arm and scorer all numbers there are, NaN for those there are not.
    """

    def __init__(
        self,
        message: str,
        *,
        comparison: Any = None,  # noqa: ANN401 - of a floor above
        scores: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    ) -> None:
        super().__init__(message)
        self.comparison: Any = comparison
        self.scores: Mapping[str, Mapping[str, Sequence[float]]] = scores or {}


class UndecidedError(ArtAugError, LookupError):
    """A filter needs a person's decisions, and some pairs have none yet.

    Attributes:
        undecided: how many pairs.
    """

    def __init__(self, undecided: int, *, total: int, path: str) -> None:
        super().__init__(
            f"{path!r} has no decision on {undecided} of {total} pairs yet. Show them with "
            "artaug.ManualReview(path).serve(pairs); decisions made so far are kept."
        )
        self.undecided = undecided


class HubError(ArtAugError, RuntimeError):
    """The Hub refused something, could not be reached, or does not hold what it should.

    Attributes:
        status: the HTTP status of its answer, if there was one.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class NothingToLearnError(ArtAugError, RuntimeError):
    """No pair was kept, so a trainer has nothing to learn from."""


class ClusterError(ArtAugError, RuntimeError):
    """A cluster cannot be reached, has not what is asked for, or its workers die one after the other."""


class WorkerDiedError(ClusterError):
    """The process that worked on a call died each time: killed, out of memory, or with its node."""


class MissingExtraError(ArtAugError, ImportError):
    """An optional package is not installed.

    Attributes:
        package: its name.
        extra: the name of the extra of artaug that brings it, or None if none does.
    """

    def __init__(self, required_by: str, *, package: str, extra: str | None = None) -> None:
        requirement = package if extra is None else f'"artaug[{extra}]"'
        super().__init__(f"{required_by} needs the {package} package. Run: pip install {requirement}")
        self.package = package
        self.extra = extra

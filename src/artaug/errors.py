"""Every error artaug raises on purpose.

Each is an `ArtAugError` and also the builtin that fits, so both ``except ArtAugError`` and
``except ValueError`` do what they say. Bugs, and running out of memory, are never wrapped.

```
ArtAugError
├── InvalidValueError (ValueError)       a value type was given something it cannot mean
│   ├── GeometryError                    a box or a mask that is none
│   └── PromptError                      no prompts, or one that cannot be used
├── SeamError (TypeError)                a critic, planner, scorer or filter returned the wrong thing
├── CriticError (RuntimeError)           a critic raised instead of abstaining
├── ModelError (ValueError)              a folder, pipeline or size the adapter cannot work with
├── GuideError (RuntimeError)            a guide cannot be installed, or a region would go unread
├── LoRAError (ValueError)               a LoRA file or value that is none
│   └── LoRAMismatchError                a LoRA that names layers the model does not have
├── NonFiniteError (ArithmeticError)     NaN or infinity where numbers were expected
│   └── TrainingDivergedError            the loss stopped being a number
├── NothingToLearnError (RuntimeError)   no pair was kept, so there is nothing to train on
└── MissingExtraError (ImportError)      an optional package is not installed
```
"""


class ArtAugError(Exception):
    """Base class of every error artaug raises on purpose."""


class InvalidValueError(ArtAugError, ValueError):
    """A value type was given something it cannot mean."""


class GeometryError(InvalidValueError):
    """A box or a mask that does not describe a part of an image."""


class PromptError(InvalidValueError):
    """An empty list of prompts, or a prompt that cannot be used."""


class SeamError(ArtAugError, TypeError):
    """A critic, planner, scorer, filter or synthesizer returned something its seam does not allow."""


class CriticError(ArtAugError, RuntimeError):
    """A critic raised an exception where it should have returned an `Abstention`."""


class ModelError(ArtAugError, ValueError):
    """A model folder, pipeline or picture size that the adapter cannot work with."""


class GuideError(ArtAugError, RuntimeError):
    """A guide cannot be installed, or would leave a region unread."""


class LoRAError(ArtAugError, ValueError):
    """A LoRA file or value that is malformed."""


class LoRAMismatchError(LoRAError):
    """A LoRA names layers, or has shapes, that the model does not have."""


class NonFiniteError(ArtAugError, ArithmeticError):
    """NaN or infinity appeared where finite numbers were expected."""


class TrainingDivergedError(NonFiniteError):
    """The training loss stopped being a finite number.

    Attributes:
        step: the step, counted from 1, whose loss was not finite.
        loss: that loss.
    """

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"the loss was {loss} at step {step}. Lower the learning rate (or check the pairs for broken images)."
        )
        self.step = step
        self.loss = loss


class NothingToLearnError(ArtAugError, RuntimeError):
    """No pair was kept, so a trainer has nothing to learn from."""


class MissingExtraError(ArtAugError, ImportError):
    """An optional package is not installed.

    Attributes:
        extra: the name of the extra that brings the package.
    """

    def __init__(self, wanted_by: str, *, package: str, extra: str) -> None:
        super().__init__(f'{wanted_by} needs the {package} package. Run: pip install "artaug[{extra}]"')
        self.extra = extra

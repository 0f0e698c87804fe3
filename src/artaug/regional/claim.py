"""One denoiser, one guide: who steers what, so that two guides never meet in one run."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from artaug.errors import GuideError
from artaug.regional.guide import Guide

_STEERED: WeakKeyDictionary[nn.Module, Guide] = WeakKeyDictionary()


@contextmanager
def exclusive(module: nn.Module, guide: Guide) -> Iterator[None]:
    """Hold a denoiser for one guide inside a ``with`` block; every guide's ``steering`` begins with it.

    Raises:
        GuideError: if another guide holds it, naming both.
    """
    if (holder := _STEERED.get(module)) is not None:
        raise GuideError(
            f"{guide!r} cannot steer a {type(module).__name__} that {holder!r} is steering. "
            "Draw with one guide at a time: a run has to end before the next begins on the same model."
        )
    _STEERED[module] = guide
    try:
        yield
    finally:
        del _STEERED[module]

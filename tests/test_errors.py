"""The tree of errors, as the module draws it."""

import builtins
import inspect
import re

import pytest

import artaug as aa
from artaug import errors

DRAWN = re.findall(r"(\w+Error)(?: \((\w+)\))? ", errors.__doc__.partition("```")[2])
CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)}


def test_the_tree_draws_every_error():
    assert {name for name, _ in DRAWN} | {"ArtAugError"} == set(CLASSES)


@pytest.mark.parametrize(("name", "builtin"), DRAWN)
def test_an_error_is_also_the_builtin_that_fits(name, builtin):
    assert issubclass(CLASSES[name], aa.ArtAugError)
    if builtin:
        assert issubclass(CLASSES[name], getattr(builtins, builtin))


def test_divergence_says_when_and_what_to_do():
    error = aa.TrainingDivergedError(37, float("nan"))
    assert str(error).startswith("the loss was nan at step 37. Lower the learning rate")
    assert (error.step, str(error.loss)) == (37, "nan")


def test_a_missing_extra_says_what_to_run():
    error = aa.MissingExtraError("VLMCritic", package="llguidance", extra="vlm")
    assert str(error) == 'VLMCritic needs the llguidance package. Run: pip install "artaug[vlm]"'
    assert error.extra == "vlm"

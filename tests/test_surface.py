"""What `import artaug` offers, and what it does not load."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import artaug

PACKAGES = ["critics", "diffusion", "evaluation.suites", "hub", "playground", "regional", "scorers", "training"]
HEAVY = {"accelerate", "diffusers", "matplotlib", "openai", "peft", "ray", "transformers"}
REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"


def loaded_by(statement):
    """The top-level modules a fresh interpreter holds after the statement."""
    program = f"import sys; {statement}; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return set(done.stdout.split())


def test_the_public_names_are_sorted_and_unique():
    assert artaug.__all__ == sorted(set(artaug.__all__))


@pytest.mark.parametrize("name", artaug.__all__)
def test_a_public_name_exists_and_says_it_comes_from_artaug(name):
    exported = getattr(artaug, name)
    if inspect.isclass(exported) or inspect.isfunction(exported):
        assert exported.__module__ == "artaug"


@pytest.mark.parametrize("package", ["artaug", *(f"artaug.{name}" for name in PACKAGES)])
def test_every_public_name_stands_in_the_reference(package):
    written = set(re.findall(r"^\.\. auto\w+:: (\S+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE))
    asked = {f"{'artaug' if name in artaug.__all__ else package}.{name}" for name in import_module(package).__all__}
    assert asked <= written


def test_importing_artaug_loads_nothing_heavy():
    assert not loaded_by("import artaug") & HEAVY


def test_the_guard_against_heavy_imports_can_fail():
    assert loaded_by("import artaug, transformers") & HEAVY == {"transformers"}

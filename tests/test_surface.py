"""What `import artaug` offers, and what it does not load."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import artaug
from support.reference import documented

PACKAGES = [
    "critics",
    "diffusion",
    "evaluation.suites",
    "hub",
    "judges",
    "playground",
    "recipes",
    "regional",
    "regional.attention_losses",
    "scorers",
    "testing",
    "training",
]
HEAVY = {"accelerate", "diffusers", "matplotlib", "openai", "peft", "ray", "transformers"}
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
root = importlib.import_module(sys.argv[1])
for module in [root.__name__, *(found.name for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."))]:
    scope = {}
    exec(f"import {module} as imported", scope)
    if scope["imported"] is not sys.modules[module]:
        print(f"{module} is hidden by {scope['imported']!r}")
"""


def loaded_by(statement):
    """The top-level modules a fresh interpreter holds after the statement."""
    program = f"import sys; {statement}; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return set(done.stdout.split())


def test_the_public_names_are_sorted_and_unique():
    assert artaug.__all__ == sorted(set(artaug.__all__))


@pytest.mark.parametrize("name", artaug.__all__)
def test_a_public_name_exists_and_is_defined_in_artaug(name):
    exported = getattr(artaug, name)
    if inspect.isclass(exported) or inspect.isfunction(exported):
        assert exported.__module__ == "artaug"


@pytest.mark.parametrize("package", ["artaug", *(f"artaug.{name}" for name in PACKAGES)])
def test_every_public_name_stands_in_the_reference(package):
    public = {f"{'artaug' if name in artaug.__all__ else package}.{name}" for name in import_module(package).__all__}
    assert public <= set(documented(r"\w+"))


def test_no_name_stands_in_the_reference_twice():
    names = documented(r"\w+")
    assert sorted(set(names)) == sorted(names)


def hidden_modules(package, *, folder):
    """The modules of a package that ``import package.module as name`` does not give, in a fresh interpreter."""
    command = [sys.executable, "-c", IMPORT_EVERYTHING, package]
    done = subprocess.run(command, capture_output=True, check=True, text=True, cwd=folder)
    return done.stdout.splitlines()


def test_every_package_and_module_imports_by_its_dotted_name(tmp_path):
    assert hidden_modules("artaug", folder=tmp_path) == []


def test_the_guard_against_hidden_modules_can_fail(tmp_path):
    (tmp_path / "shadowed").mkdir()
    (tmp_path / "shadowed" / "inner.py").write_text("def inner(): ...")
    (tmp_path / "shadowed" / "__init__.py").write_text("from shadowed.inner import inner")
    (found,) = hidden_modules("shadowed", folder=tmp_path)
    assert found.startswith("shadowed.inner is hidden by <function inner at")


def test_importing_artaug_loads_nothing_heavy():
    assert not loaded_by("import artaug") & HEAVY


def test_the_guard_against_heavy_imports_can_fail():
    assert loaded_by("import artaug, transformers") & HEAVY == {"transformers"}

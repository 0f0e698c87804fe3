"""The house in order: one version, short modules."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import artaug

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))


def test_package_metadata_and_pyproject_agree_on_the_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert artaug.__version__ == importlib.metadata.version("artaug") == declared


def test_the_changelog_names_every_release():
    if "dev" not in artaug.__version__:
        assert f"\n## {artaug.__version__} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_can_be_read_alone(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300, f"{path.name} has {len(lines)} lines: split it by what it is about"

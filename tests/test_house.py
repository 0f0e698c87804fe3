"""The structure of the package: floors, no circles, one name for one thing, a first line in every file, one version."""

import ast
import dataclasses
import graphlib
import importlib
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

import pytest
from tools.draw_house import PICTURE, draw
from tools.measure_house import importers, read, repeated_names

import artaug as aa
from artaug.diffusion import Family
from artaug.images.similarity import ImageSimilarity
from artaug.regional import Denoiser

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = read(ROOT / "src" / "artaug")
ONE_METHOD = (
    aa.Synthesizer,
    aa.Critic,
    aa.RegionPlanner,
    aa.Scorer,
    aa.PairwiseJudge,
    aa.PairFilter,
    aa.Guide,
    aa.LatentGuide,
    aa.Objective,
    aa.Fuser,
    aa.Optimizer,
    ImageSimilarity,
)
SEAMS = (*ONE_METHOD, aa.Adapter, Family, Denoiser)


def floors():
    """The room of every floor, from the lowest (0) to the highest, as import-linter reads them."""
    contract = next(
        contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    )
    return {
        room.strip(" ()"): floor
        for floor, layer in enumerate(reversed(contract["layers"]))
        for room in re.split(r"[|:]", layer)
    }


def upward_imports(modules, floor_of):
    """Imports of a room on a higher floor, or of another room on the same floor that the layer does not join."""
    joined = {"pairs", "synthesis", "plan", "critique"}  # these may know each other
    return [
        f"{importer} imports {imported}"
        for imported, importing in importers(modules).items()
        for importer in importing
        if imported and (low := imported.split(".")[0]) != (high := importer.split(".")[0])
        if floor_of[low] > floor_of[high] or (floor_of[low] == floor_of[high] and not {low, high} <= joined)
    ]


def first_line(module):
    """The first line of a module's docstring, or nothing."""
    return (ast.get_docstring(module.tree) or "").partition("\n")[0]


def is_sentence(line):
    """Whether a line says something: three words at least, and an end."""
    return len(line.split()) >= 3 and line.endswith((".", "?"))


def external_imports(modules):
    """The top-level packages that modules import, at the top or inside functions."""
    nodes = [node for module in modules for node in ast.walk(module.tree)]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in names}


def package(folder, **sources):
    """A package of modules with these texts, read as the real one is."""
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return read(folder)


def check_no_circle(modules):
    """Raise graphlib.CycleError where modules import each other in a circle."""
    graphlib.TopologicalSorter({name: names - {""} for name, names in importers(modules).items()}).prepare()


def test_package_metadata_and_pyproject_agree_on_the_version():
    declared = PYPROJECT["project"]["version"]
    assert aa.__version__ == importlib.metadata.version("artaug") == declared


def test_the_changelog_names_every_release():
    if "dev" not in aa.__version__:
        assert f"\n## {aa.__version__} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_room_has_a_floor():
    rooms = {module.room for module in MODULES} - {""}
    assert rooms <= set(floors())


def test_an_import_points_down_only():
    assert upward_imports(MODULES, floors()) == []


def test_the_test_of_floors_can_fail(tmp_path):
    modules = package(tmp_path, plan="from artaug.run import x", run="")
    assert upward_imports(modules, floors()) == ["plan imports run"]


def test_no_modules_import_each_other_in_a_circle():
    check_no_circle(MODULES)


def test_the_test_of_circles_can_fail(tmp_path):
    modules = package(tmp_path, one="from artaug.two import x", two="from artaug import one")
    with pytest.raises(graphlib.CycleError):
        check_no_circle(modules)


def test_a_class_name_stands_in_one_module():
    assert repeated_names(MODULES) == {}


def test_the_test_of_class_names_can_fail(tmp_path):
    modules = package(tmp_path, one="class Row: ...", two="from typing import TypeAlias\n_Row: TypeAlias = int")
    assert repeated_names(modules) == {"Row": ["one", "two"]}


def test_the_first_line_of_a_module_states_its_subject():
    assert {module.name: line for module in MODULES if not is_sentence(line := first_line(module))} == {}


@pytest.mark.parametrize("line", ["", "Utilities.", "No end to this sentence"])
def test_the_test_of_first_lines_can_fail(line):
    assert not is_sentence(line)


def test_a_declared_dependency_is_imported():
    distributions = {re.split(r"[>=\[]", line)[0] for line in PYPROJECT["project"]["dependencies"]}
    named_otherwise = {"pillow": "PIL"}
    assert {named_otherwise.get(name, name) for name in distributions} <= external_imports(MODULES)


def test_the_picture_of_the_rooms_is_that_of_the_code():
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run: python tools/draw_house.py"


def built_in_parts():
    """Every class of the package that fills a seam, but for the seams and the abstract classes between."""
    for module in MODULES:
        importlib.import_module(f"artaug.{module.name}".rstrip("."))
    pending, concrete = list(SEAMS), []
    while pending:
        subclasses = [cls for cls in pending.pop().__subclasses__() if cls.__module__.split(".")[0] == "artaug"]
        pending += subclasses
        concrete += [cls for cls in subclasses if not inspect.isabstract(cls)]
    return {cls.__qualname__: cls for cls in concrete}


def test_a_built_in_part_is_frozen_and_final():
    parts = built_in_parts()
    assert {"PhotometricCritic", "GreedyPlanner", "ConcatFuser", "Flux", "RegionalAttention"} <= set(parts)
    assert [name for name, cls in parts.items() if not getattr(cls, "__final__", False)] == []
    frozen = {name for name, cls in parts.items() if dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen}
    assert set(parts) - frozen == set()


@pytest.mark.parametrize("seam", [*ONE_METHOD], ids=lambda seam: seam.__name__)
def test_a_seam_has_one_abstract_method(seam):
    assert len(seam.__abstractmethods__) == 1

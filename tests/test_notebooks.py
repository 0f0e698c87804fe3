"""Notebooks are kept without outputs, since the documentation executes them, find its pages and are found from them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
GALLERY = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
LONGEST_CELL = 30


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_a_notebook_holds_nothing_that_running_it_leaves(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{n:02}" for n in range(len(notebook["cells"]))]
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]


def test_a_notebook_says_what_there_is_at_its_end_and_where_to_go_next_and_has_short_cells(notebook):
    first, *others = notebook["cells"]
    title, _, *text = first["source"]
    assert title.startswith("# ")
    assert "at the end" in "".join(text).lower()
    assert others[-1]["source"][0] == "## Where to go next\n"
    long = [cell["id"] for cell in others if cell["cell_type"] == "code" and len(cell["source"]) > LONGEST_CELL]
    assert not long


def test_a_notebook_links_to_files_that_are_there(notebook):
    text = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / "examples" / link).is_file()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_in_the_gallery(path):
    assert f"]({path.name})" in GALLERY

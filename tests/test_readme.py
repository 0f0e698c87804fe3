"""Every Python fence of the README and the docs runs, page by page, from top to bottom.

A fence that cannot run here (it needs 12 billion weights, say) stands under `<!-- not executed: the reason -->`. It is
compiled all the same, and what it takes from artaug has to exist.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import artaug

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "extend").glob("*.md")])
FENCE = re.compile(
    r"^(?:<!-- not executed: (?P<reason>.+) -->\n\n?)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def check_names(tree):
    """Import what the code imports from artaug, and look up every `aa.Name`."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "artaug":
                exec(ast.unparse(node), {})
            case ast.Attribute(value=ast.Name(id="aa"), attr=name):
                assert hasattr(importlib.import_module("artaug"), name), f"artaug has no {name}"


def run(page):
    """Run the fences of a page in one namespace, with the page's line numbers in tracebacks."""
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    for fence in FENCE.finditer(text):
        code = "\n" * text.count("\n", 0, fence.start("code")) + fence["code"]
        if fence["reason"]:
            check_names(ast.parse(code, filename=page))
        else:
            exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_fences_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_hides_behind_no_other_name(page):
    assert not re.search(r"^```(py|python3|pycon|Python|python .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_table_of_parts_names_methods_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\(([^)]*)\)`", readme, re.MULTILINE)
    assert len(rows) >= 10
    for part, method, parameters in rows:
        function = getattr(getattr(artaug, part), method)
        assert list(inspect.signature(function).parameters)[1:] == re.findall(r"\w+", parameters), part


@pytest.mark.parametrize(
    ("fence", "error"),
    [
        pytest.param("```python\nassert 1 == 2\n```\n", AssertionError, id="executed"),
        pytest.param("<!-- not executed: big -->\n```python\nx = = 1\n```\n", SyntaxError, id="compiled"),
        pytest.param(
            "<!-- not executed: big -->\n```python\nfrom artaug import nonsense\n```\n", ImportError, id="imported"
        ),
        pytest.param("<!-- not executed: big -->\n```python\naa.Nonsense()\n```\n", AssertionError, id="looked-up"),
    ],
)
def test_a_broken_fence_fails(fence, error, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(fence, encoding="utf-8")
    with pytest.raises(error):
        run(page)

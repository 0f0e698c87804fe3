"""Every Python fence of the README and the docs runs, page by page, from top to bottom.

A fence that cannot run here (it needs 12 billion weights, say) stands under `<!-- executed by tests/test_x.py: how -->`, where
that test runs it as it is printed, or `<!-- not executed: the reason -->`. It is compiled all the same, what it takes from
artaug has to exist, and its calls have to fit the signatures.
"""

import inspect
import re
from pathlib import Path

import pytest

import artaug
from support.fences import FENCE, run

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "docs/extend", "docs/family", "docs/reference")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_fences_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_fence_of_a_page_is_looked_at(page):
    text = page.read_text(encoding="utf-8")
    assert len(FENCE.findall(text)) == len(re.findall(r"^[ >\t]*(?:```+|~~~+) *python", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_hides_behind_no_other_name(page):
    assert not re.search(r"^```(py|python3|pycon|Python|python .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_a_test_that_is_said_to_execute_a_fence_reads_the_page():
    said = {
        (fence["test"], page.relative_to(ROOT).as_posix())
        for page in PAGES
        for fence in FENCE.finditer(page.read_text(encoding="utf-8"))
        if fence["test"]
    }
    assert len(said) >= 8
    for test, page in said:
        source = (ROOT / test).read_text(encoding="utf-8")
        assert f'"{page}"' in source or f'/ "{Path(page).name}"' in source, f"{test} does not read {page}"


def test_the_table_of_parts_names_methods_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\(([^)]*)\)`", readme, re.MULTILINE)
    assert len(rows) >= 10
    for part, method, parameters in rows:
        function = getattr(getattr(artaug, part), method)
        assert list(inspect.signature(function).parameters)[1:] == re.findall(r"\w+", parameters), part


UNREAD = "<!-- not executed: {} -->\n```python\n{}```\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("```python\nassert 1 == 2\n```\n", AssertionError, id="executed"),
        pytest.param(UNREAD.format("big", "x = = 1\n"), SyntaxError, id="compiled"),
        pytest.param(UNREAD.format("big", "from artaug import nonsense\n"), ImportError, id="imported"),
        pytest.param(UNREAD.format("big", "aa.Nonsense()\n"), AssertionError, id="looked-up"),
        pytest.param(UNREAD.format("big", "aa.Box(0, 0, 1, 1, 1)\n"), TypeError, id="too-many-arguments"),
        pytest.param(UNREAD.format("big", "aa.Plan('a cone', nonsense=1)\n"), TypeError, id="unknown-argument"),
        pytest.param(UNREAD.format("big", "aa.Plan('a cone').nonsense\n"), AssertionError, id="attribute-of-a-call"),
        pytest.param(
            UNREAD.format(
                "big", "from artaug.critics import Cached\ncritic = Cached(x, folder=y)\ncritic.nonsense()\n"
            ),
            AssertionError,
            id="method-of-a-variable",
        ),
        pytest.param(
            "```python\nimport artaug as aa\nplan = aa.Plan('a cone')\n```\n"
            + UNREAD.format("big", "plan.nonsense()\n"),
            AssertionError,
            id="method-of-an-executed-variable",
        ),
    ],
)
def test_a_broken_fence_fails(text, error, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(error):
        run(page)


@pytest.mark.parametrize("place", range(3))
def test_a_fence_between_two_comments_is_executed(place, tmp_path):
    planted = ["```python\npass\n```\n"] * 3
    planted[place] = "```python\nraise ZeroDivisionError\n```\n"
    page = tmp_path / "page.md"
    unread = UNREAD.format("big", "pass\n")
    page.write_text(f"{planted[0]}\n{unread}\n{planted[1]}\n{unread}\n{planted[2]}", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        run(page)

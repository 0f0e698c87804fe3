"""The table of the family: 80 systems, each with one standing, and what works has an example that runs."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

import artaug
from support.fences import FENCE

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "family.md").read_text(encoding="utf-8")
NEIGHBOURS = 26
ROOMS = ("diffusion", "regional.attention_losses", "scorers", "critics", "hub", "training", "playground", "recipes")
NOT_OURS = {"own_noise=True", "logit_normal=True"}  # settings of the trainer, looked for there


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


ROWS = [cells(line) for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
STANDING = Counter(row[4] for row in ROWS)


def section(page, slug):
    """The text below a heading, by the name that links give it; nothing if there is none."""
    text = page.read_text(encoding="utf-8")
    headings = list(
        re.finditer(
            r"^#{1,3} (.+)$", re.sub(r"```.*?```", lambda code: "~" * len(code[0]), text, flags=re.DOTALL), re.MULTILINE
        )
    )
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        if re.sub(r"[^\w -]", "", heading[1].lower()).replace(" ", "-") == slug:
            return text[heading.end() : following.start() if following else None]
    return ""


def example(row):
    """The page and the section that a row links to."""
    page, slug = re.fullmatch(r"\[[^\]]+\]\(([\w/-]+\.md)#([\w-]+)\)", row[6]).groups()
    return DOCS / page, slug


def test_every_system_has_one_row_in_order():
    assert [int(row[0]) for row in ROWS] == list(range(1, 81))
    assert len({row[1] for row in ROWS}) == 80


def test_the_page_counts_what_its_table_says():
    assert set(STANDING) <= {"works", "not yet", "neighbour"}
    assert STANDING["neighbour"] == NEIGHBOURS
    for standing, count in STANDING.items():
        (counted,) = re.findall(rf"\*\*{standing}\*\*:[^*]*?(\d+) systems\.", PAGE)
        assert int(counted) == count, standing


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_a_row_says_what_it_takes_and_only_what_works_has_an_example(row):
    assert row[3]
    assert row[5]
    assert bool(row[6]) == (row[4] == "works")


@pytest.mark.parametrize("row", [row for row in ROWS if row[4] == "works"], ids=lambda row: row[1])
def test_what_works_has_an_example_that_is_executed(row):
    page, slug = example(row)
    fences = list(FENCE.finditer(section(page, slug)))
    assert any(not fence["reason"] for fence in fences), f"{page.name}#{slug}"
    if page.parent.name == "family":
        text = section(page, slug)
        assert "arxiv.org/abs/" in text or "aclanthology.org" in text
        assert "*The paper's:*" in text
        assert "*Ours:*" in text
        assert all("assert " in fence["code"] for fence in fences), "an example has to show that it does what it says"


def test_every_section_of_the_examples_is_in_the_table():
    linked = {example(row) for row in ROWS if row[4] == "works"}
    for page in (DOCS / "family").glob("*.md"):
        for heading in re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            assert (page, slug) in linked, f"{page.name}: {heading}"


def test_what_the_table_names_exists():
    rooms = [artaug, *(importlib.import_module(f"artaug.{room}") for room in ROOMS)]
    names = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[5])}
    for name in names - NOT_OURS:
        first, *rest = name.split(".")
        owners = [getattr(room, first) for room in rooms if hasattr(room, first)]
        assert owners, name
        assert not rest or any(
            hasattr(owner, rest[0]) or rest[0] in getattr(owner, "__dataclass_fields__", {}) for owner in owners
        ), name
    settings = artaug.DifferentialLoRATrainer.__dataclass_fields__
    assert {name.partition("=")[0] for name in NOT_OURS & names} <= set(settings)

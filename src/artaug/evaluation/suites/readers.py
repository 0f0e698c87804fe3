"""Suites from the files their authors publish. Nothing is downloaded."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from artaug.errors import ArtAugError, PromptError
from artaug.evaluation.suites.suite import Case, Clause, ObjectCheck, Question, QuestionCheck, Suite

_COUNTING, _SURE = "counting", 0.9
_DPG = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_ONEIG = {"anime": "Anime_Stylization", "human": "Portrait", "object": "General_Object"}


def read_geneval(path: str | Path) -> Suite:
    """Read GenEval's ``evaluation_metadata.jsonl`` (Ghosh et al. 2023): a prompt a line, with what to find.

    A line has ``prompt``, ``tag`` (the category) and ``include``, perhaps ``exclude``: lists of ``class``, ``count`` and
    perhaps ``color`` and ``position``. Detections count from a confidence of 0.3, under the tag ``counting`` of 0.9; the
    overall score is the mean over the tags. The published suite has 553 prompts and draws 4 pictures of each.

    Raises:
        PromptError: for another format, naming the line.
    """
    path = Path(path)
    cases = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                cases.append(_objects(json.loads(line)))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ArtAugError) as fault:
                raise PromptError(
                    f"{path.name!r}, line {number} is no line of GenEval ({_told(fault)}): {line:.120}. Expected JSON with "
                    "prompt, tag and include."
                ) from fault
    return Suite("GenEval", tuple(cases), mean_over="categories")


def read_dpg(path: str | Path) -> Suite:
    """Read DPG-Bench's ``dpg_bench.csv`` (Hu et al. 2024, ELLA): a question a line, several a prompt.

    Categories are those of the questions (``entity``, ``attribute``, ``relation``, ``global``, ``other``), counted by
    their answers alone, as published; the overall score is the mean over prompts, which tables print times 100. The
    published suite has 1065 prompts and draws 4 pictures of each. All lines are read; the program published with it
    leaves out the first.

    Raises:
        PromptError: for another format, naming the line.
    """
    path = Path(path)
    reader = csv.DictReader(io.StringIO(_text(path)))
    if missing := [column for column in _DPG if column not in (reader.fieldnames or ())]:
        raise PromptError(f"{path.name!r} has the columns {reader.fieldnames}, and DPG-Bench has {missing} too.")
    texts: dict[str, str] = {}
    asked: dict[str, list[Question]] = {}
    for row in reader:
        try:
            parents = [int(number) for number in row["dependency"].split(",")]
            texts.setdefault(row["item_id"], row["text"])
            asked.setdefault(row["item_id"], []).append(
                Question(
                    number=int(row["proposition_id"]),
                    text=row["question_natural_language"],
                    parents=tuple(number for number in parents if number),
                    category=row["tuple"].partition("(")[0].partition("-")[0].strip(),
                )
            )
        except (ValueError, AttributeError) as fault:
            raise PromptError(
                f"{path.name!r}, line {reader.line_num} is no question ({_told(fault)}): {row}."
            ) from fault
    try:
        cases = [Case(texts[item], QuestionCheck(tuple(asked[item]), cascade=True)) for item in asked]
    except ArtAugError as fault:
        raise PromptError(f"{path.name!r}: {fault}") from fault
    return Suite("DPG-Bench", tuple(cases))


def read_oneig(prompts: str | Path, questions: Iterable[str | Path]) -> Suite:
    """Read the alignment part of OneIG-Bench (Chang et al. 2025): a table of prompts, and lists of questions.

    Args:
        prompts: ``OneIG-Bench.csv`` with ``category``, ``id`` and ``prompt_en`` (or ``prompt_cn``).
        questions: any of ``anime.json``, ``human.json`` and ``object.json`` of ``Q_D``, or their ``_zh``: by id a
            ``question`` and a ``dependency`` by number. Prompts without questions are left out.

    Raises:
        PromptError: for another format, or questions without a prompt.
    """
    table = _oneig_prompts(Path(prompts))
    cases = []
    for path in map(Path, questions):
        category = _ONEIG.get(path.stem.removesuffix("_zh"), path.stem)
        try:
            asked = json.loads(_text(path))
            for key, item in asked.items():
                if (category, key) not in table:
                    raise PromptError(f"{Path(prompts).name!r} has no prompt {key!r} of {category!r}")
                cases.append(Case(table[category, key], _asked(item), category))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as fault:
            raise PromptError(
                f"{path.name!r} is no list of questions of OneIG: {_told(fault)}. Expected JSON that maps ids to "
                "question and dependency."
            ) from fault
    return Suite("OneIG alignment", tuple(cases))


def _objects(line: Mapping[str, Any]) -> Case:
    tag = line["tag"]
    check = ObjectCheck(
        tuple(map(_clause, line.get("include", ()))),
        tuple(map(_clause, line.get("exclude", ()))),
        **({"confidence": _SURE} if tag == _COUNTING else {}),
    )
    return Case(line["prompt"], check, tag)


def _clause(clause: Mapping[str, Any]) -> Clause:
    position = clause.get("position")
    return Clause(
        label=clause["class"],
        count=clause["count"],
        colour=clause.get("color"),
        position=None if position is None else tuple(position),
    )


def _oneig_prompts(path: Path) -> dict[tuple[str, str], str]:
    reader = csv.DictReader(io.StringIO(_text(path)))
    headings: Sequence[str] = reader.fieldnames or ()
    words = next((name for name in ("prompt_en", "prompt_cn") if name in headings), None)
    if words is None or not {"category", "id"} <= set(headings):
        raise PromptError(f"{path.name!r} has the columns {list(headings)}. Expected category, id and prompt_en.")
    return {(row["category"], row["id"]): row[words] for row in reader}


def _asked(item: Mapping[str, Any]) -> QuestionCheck:
    """Questions and dependencies by number, each as JSON or as a text that holds JSON."""
    asked, rests = (
        json.loads(part) if isinstance(part, str) else part for part in (item["question"], item["dependency"])
    )
    parents = {int(number): tuple(int(one) for one in many if int(one)) for number, many in rests.items()}
    return QuestionCheck(
        tuple(Question(int(number), text, parents.get(int(number), ())) for number, text in asked.items())
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError(f"{path.name!r} is not UTF-8 text.") from None


def _told(fault: Exception) -> str:
    return f"there is no {fault}" if isinstance(fault, KeyError) else str(fault)

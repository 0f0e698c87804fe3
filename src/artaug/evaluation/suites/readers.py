"""Readers of published suites: GenEval, DPG-Bench and OneIG, from files on the user's disk. Nothing is downloaded."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from artaug.errors import ArtAugError, PromptError
from artaug.evaluation.suites.suite import Case, Clause, ObjectCheck, Question, QuestionCheck, Suite

_GENEVAL_COUNTING, _COUNTING_CONFIDENCE = "counting", 0.9
_DPG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_ONEIG_CATEGORIES = {"anime": "Anime_Stylization", "human": "Portrait", "object": "General_Object"}


def read_geneval(path: str | Path) -> Suite:
    """Read GenEval's ``evaluation_metadata.jsonl`` (Ghosh et al. 2023): one prompt a line, with the objects to find.

    A line has ``prompt``, ``tag`` (the category) and ``include``, perhaps ``exclude``: lists of ``class``, ``count`` and
    perhaps ``color`` and ``position``. Detections count above a confidence of 0.3, under the tag ``counting`` above 0.9;
    the overall score is the mean over the tags. The published suite has 553 prompts and 4 pictures of each.

    Raises:
        PromptError: for another format, naming the line.
    """
    path = Path(path)
    cases = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                cases.append(_geneval_case(json.loads(line)))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ArtAugError) as error:
                raise PromptError(
                    f"{path.name!r}, line {number} is not a line of GenEval ({_describe(error)}): {line:.120}. Expected "
                    "JSON with prompt, tag and include."
                ) from error
    return Suite("GenEval", tuple(cases), mean_over="categories")


def read_dpg(path: str | Path) -> Suite:
    """Read DPG-Bench's ``dpg_bench.csv`` (Hu et al. 2024, ELLA): one question a line, several for each prompt.

    Categories are those of the questions (``entity``, ``attribute``, ``relation``, ``global``, ``other``), counted by
    their answers alone, as published; the overall score is the mean over prompts, which tables print times 100. The
    published suite has 1065 prompts and 4 pictures of each. All lines are read; the program published with it leaves
    out the first.

    Raises:
        PromptError: for another format, naming the line.
    """
    path = Path(path)
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    if missing := [column for column in _DPG_COLUMNS if column not in (reader.fieldnames or ())]:
        raise PromptError(f"{path.name!r} has the columns {reader.fieldnames}. DPG-Bench has {missing} too.")
    prompts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for row in reader:
        try:
            # "0" stands for no parent.
            parents = [int(number) for number in row["dependency"].split(",")]
            prompts.setdefault(row["item_id"], row["text"])
            questions.setdefault(row["item_id"], []).append(
                Question(
                    number=int(row["proposition_id"]),
                    text=row["question_natural_language"],
                    parents=tuple(number for number in parents if number),
                    category=row["tuple"].partition("(")[0].partition("-")[0].strip(),
                )
            )
        except (ValueError, AttributeError) as error:
            raise PromptError(
                f"{path.name!r}, line {reader.line_num} is not a question ({_describe(error)}): {row}."
            ) from error
    try:
        cases = [Case(prompts[item], QuestionCheck(tuple(questions[item]), cascade=True)) for item in questions]
    except ArtAugError as error:
        raise PromptError(f"{path.name!r}: {error}") from error
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
    prompts_by_id = _read_oneig_prompts(Path(prompts))
    cases = []
    for path in map(Path, questions):
        category = _ONEIG_CATEGORIES.get(path.stem.removesuffix("_zh"), path.stem)
        try:
            for prompt_id, item in json.loads(_read_text(path)).items():
                if (category, prompt_id) not in prompts_by_id:
                    raise PromptError(f"{Path(prompts).name!r} has no prompt {prompt_id!r} of {category!r}")
                cases.append(Case(prompts_by_id[category, prompt_id], _oneig_check(item), category))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise PromptError(
                f"{path.name!r} is not a list of questions of OneIG: {_describe(error)}. Expected JSON that maps ids to "
                "question and dependency."
            ) from error
    return Suite("OneIG alignment", tuple(cases))


def _geneval_case(line: Mapping[str, Any]) -> Case:
    tag = line["tag"]
    check = ObjectCheck(
        tuple(map(_geneval_clause, line.get("include", ()))),
        tuple(map(_geneval_clause, line.get("exclude", ()))),
        **({"confidence": _COUNTING_CONFIDENCE} if tag == _GENEVAL_COUNTING else {}),
    )
    return Case(line["prompt"], check, tag)


def _geneval_clause(clause: Mapping[str, Any]) -> Clause:
    position = clause.get("position")
    return Clause(
        label=clause["class"],
        count=clause["count"],
        color=clause.get("color"),
        position=None if position is None else tuple(position),
    )


def _read_oneig_prompts(path: Path) -> dict[tuple[str, str], str]:
    """The prompts by category and id."""
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    headings: Sequence[str] = reader.fieldnames or ()
    column = next((name for name in ("prompt_en", "prompt_cn") if name in headings), None)
    if column is None or not {"category", "id"} <= set(headings):
        raise PromptError(f"{path.name!r} has the columns {list(headings)}. Expected category, id and prompt_en.")
    return {(row["category"], row["id"]): row[column] for row in reader}


def _oneig_check(item: Mapping[str, Any]) -> QuestionCheck:
    """Questions and dependencies, each a mapping by number, as JSON or as a text that holds JSON."""
    texts, dependencies = (
        json.loads(part) if isinstance(part, str) else part for part in (item["question"], item["dependency"])
    )
    parents = {
        int(number): tuple(int(parent) for parent in listed if int(parent)) for number, listed in dependencies.items()
    }
    return QuestionCheck(
        tuple(Question(int(number), text, parents.get(int(number), ())) for number, text in texts.items())
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError(f"{path.name!r} is not UTF-8 text.") from None


def _describe(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)

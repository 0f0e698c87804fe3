"""Readers of published suites: GenEval, DPG-Bench and OneIG, from files on the user's disk. Nothing is downloaded."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from artaug._internal.annotations import checked
from artaug._internal.decoding import decode_json
from artaug.errors import ArtAugError, PromptError
from artaug.evaluation.prompts.skipping import check_skipped
from artaug.evaluation.suites.suite import Case, Clause, ObjectCheck, Question, QuestionCheck, Suite

_GENEVAL_COUNTING, _COUNTING_CONFIDENCE = "counting", 0.9
_DPG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_ONEIG_CATEGORIES = {
    "anime": "Anime_Stylization",
    "human": "Portrait",
    "object": "General_Object",
    "multilingualism": "Multilingualism",
}


@checked
def read_geneval(path: str | Path) -> Suite:
    """Read GenEval's ``evaluation_metadata.jsonl`` (Ghosh et al. 2023): one prompt a line, with the objects to find.

    A line has ``prompt``, ``tag`` (the category) and ``include``, perhaps ``exclude``: lists of ``class``, ``count`` and
    perhaps ``color`` and ``position``. Detections count above a confidence of 0.3, under the tag ``counting`` above 0.9;
    the overall score is the mean over the tags. The published suite has 553 prompts and 4 pictures of each. A line that
    cannot be read is left out, with a warning that names it.

    Raises:
        PromptError: for another format: if half of the lines cannot be read.
    """
    path = Path(path)
    cases, skipped = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                cases.append(_geneval_case(decode_json(line)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                skipped.append(
                    f"line {number} is not a line of GenEval ({_describe(error)}): {line:.120}. Expected JSON with prompt, "
                    "tag and include"
                )
    check_skipped(path, skipped, read=len(cases), stacklevel=2)
    return Suite("GenEval", tuple(cases), mean_over="categories")


@checked
def read_dpg(path: str | Path) -> Suite:
    """Read DPG-Bench's ``dpg_bench.csv`` (Hu et al. 2024, ELLA): one question a line, several for each prompt.

    Categories are those of the questions (``entity``, ``attribute``, ``relation``, ``global``, ``other``), counted by
    their answers alone, as published; the overall score is the mean over prompts, which tables print times 100. The
    published suite has 1065 prompts and 4 pictures of each. A prompt with a question that cannot be read, or whose
    parent does not exist, is left out, with a warning that names it; the published program leaves out the latter too.

    Two things differ from the program published with it, and change no expected value: it leaves out the first line,
    which is read here; and its category scores count the last of a prompt's four pictures, here all of them count.

    Raises:
        PromptError: for another format: missing columns, or half of the prompts cannot be read.
    """
    path = Path(path)
    reader = _read_table(path)
    if missing := [column for column in _DPG_COLUMNS if column not in (reader.fieldnames or ())]:
        raise PromptError(f"{path.name!r} has the columns {reader.fieldnames}. DPG-Bench has {missing} too.")
    prompts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    skipped: dict[str, str] = {}
    for row in _rows(reader, path):
        item = row["item_id"]
        prompts.setdefault(item, row["text"])
        try:
            questions.setdefault(item, []).append(_dpg_question(row))
        except (ValueError, TypeError, AttributeError) as error:
            skipped.setdefault(item, f"line {reader.line_num} is not a question ({_describe(error)}): {row}")
    cases = []
    for item, text in prompts.items():
        if item not in skipped:
            try:
                cases.append(Case(text, QuestionCheck(tuple(questions[item]), cascade=True)))
            except ArtAugError as error:
                skipped[item] = f"{item!r}: {error}"
    check_skipped(path, [*skipped.values()], read=len(cases), stacklevel=2)
    return Suite("DPG-Bench", tuple(cases))


@checked
def read_oneig(prompts: str | Path, questions: Iterable[str | Path]) -> Suite:
    """Read the alignment part of OneIG-Bench (Chang et al. 2025): a table of prompts, and lists of questions.

    A question that depends on itself, or on one that does not exist, does so without effect, as in the published
    program. A prompt whose questions cannot be read is left out, with a warning that names it.

    Args:
        prompts: ``OneIG-Bench.csv`` with ``category``, ``id`` and ``prompt_en``, or ``OneIG-Bench-ZH.csv`` with
            ``prompt_cn``.
        questions: any of ``anime.json``, ``human.json`` and ``object.json`` of ``Q_D``, or with the Chinese table their
            ``_zh`` and ``multilingualism_zh.json``: by id a ``question`` and a ``dependency`` by number. Prompts without
            questions are left out.

    Raises:
        PromptError: for another format: a file that is not JSON by ids, or half of its prompts cannot be read.
    """
    table = Path(prompts)
    prompts_by_id = _read_oneig_prompts(table)
    cases: list[Case] = []
    for path in map(Path, questions):
        category = _ONEIG_CATEGORIES.get(path.stem.removesuffix("_zh"), path.stem)
        read, skipped = [], []
        for prompt_id, item in _read_oneig_questions(path).items():
            try:
                if (category, prompt_id) not in prompts_by_id:
                    raise PromptError(f"{table.name!r} has no prompt {prompt_id!r} of {category!r}")
                read.append(Case(prompts_by_id[category, prompt_id], _oneig_check(item), category))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                skipped.append(f"{prompt_id!r}: {_describe(error)}")
        check_skipped(path, skipped, read=len(read), stacklevel=2)
        cases += read
    return Suite("OneIG alignment", tuple(cases))


def _geneval_case(line: Mapping[str, Any]) -> Case:
    tag = line["tag"].strip()
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


def _dpg_question(row: Mapping[str, str]) -> Question:
    """One line; a parent of 0 stands for none, and a question that depends on itself does so without effect."""
    number = int(row["proposition_id"])
    parents = [int(parent) for parent in row["dependency"].split(",")]
    return Question(
        number=number,
        text=row["question_natural_language"],
        parents=tuple(parent for parent in parents if parent not in (0, number)),
        category=row["tuple"].partition("(")[0].partition("-")[0].strip(),
    )


def _read_oneig_prompts(path: Path) -> dict[tuple[str, str], str]:
    """The prompts by category and id."""
    reader = _read_table(path)
    headings: Sequence[str] = reader.fieldnames or ()
    column = next((name for name in ("prompt_en", "prompt_cn") if name in headings), None)
    if column is None or not {"category", "id"} <= set(headings):
        raise PromptError(f"{path.name!r} has the columns {list(headings)}. Expected category, id and prompt_en.")
    return {
        ((row["category"] or "").strip(), (row["id"] or "").strip()): row[column] or "" for row in _rows(reader, path)
    }


def _read_oneig_questions(path: Path) -> Mapping[str, Any]:
    try:
        items = decode_json(_read_text(path))
    except ValueError as error:
        items = error
    if not isinstance(items, dict):
        described = items if isinstance(items, Exception) else f"a JSON {type(items).__name__}"
        raise PromptError(
            f"{path.name!r} is not a list of questions of OneIG: {described}. Expected JSON that maps ids to question and "
            "dependency."
        )
    return items


def _oneig_check(item: Mapping[str, Any]) -> QuestionCheck:
    """Questions and dependencies, each a mapping by number, as JSON or as a text that holds JSON."""
    texts, dependencies = (
        decode_json(part) if isinstance(part, str) else part for part in (item["question"], item["dependency"])
    )
    # The published files have questions that depend on themselves; its program only ever lowers the score of one whose
    # parent scores 0, so that has no effect, and it goes past a parent that does not exist.
    numbers = {int(number) for number in texts}
    parents = {
        int(number): tuple(int(parent) for parent in listed if int(parent) in numbers and int(parent) != int(number))
        for number, listed in dependencies.items()
    }
    return QuestionCheck(
        tuple(Question(int(number), text, parents.get(int(number), ())) for number, text in texts.items())
    )


def _read_table(path: Path) -> "csv.DictReader[str]":
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    try:
        reader.fieldnames  # noqa: B018 - it reads the first line
    except csv.Error as error:
        raise PromptError(f"{path.name!r} is no table: {error}.") from error
    return reader


def _rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise PromptError(f"{path.name!r}, line {reader.line_num} is no line of a table: {error}.") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError(f"{path.name!r} is not UTF-8 text.") from None


def _describe(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)

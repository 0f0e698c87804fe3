"""Suites as their authors publish them, and files of other formats."""

import itertools
import json

import pytest

import artaug as aa
from artaug.evaluation.suites import (
    Case,
    Clause,
    ObjectCheck,
    Question,
    QuestionCheck,
    read_dpg,
    read_geneval,
    read_oneig,
)

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "couch", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a couch",
    },
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
]
DPG = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
partiprompts23,"A dog, red.",,1,0,entity,whole,entity - whole (dog),Is there a dog?
partiprompts23,"A dog, red.",,2,1,attribute,color,"attribute - color (dog, red)",Is the dog red?
partiprompts23,"A dog, red.",,3,"1, 2",relation,spatial,"relation - spatial (dog, here)",Is it here?
vrd7,A cat.,,1,0,entity,whole,entity - whole (cat),Is there a cat?
"""


def written(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_geneval(tmp_path):
    suite = read_geneval(written(tmp_path, "evaluation_metadata.jsonl", "\n".join(map(json.dumps, GENEVAL)) + "\n"))
    assert suite.name == "GenEval"
    assert suite.mean_over == "categories"
    assert suite.prompts.categories == ("single_object", "counting", "position", "colors")
    assert [case.check for case in suite.cases] == [
        ObjectCheck((Clause("bench"),)),
        ObjectCheck((Clause("clock", 2),), (Clause("clock", 3),), confidence=0.9),
        ObjectCheck((Clause("couch"), Clause("dog", position=("left of", 0)))),
        ObjectCheck((Clause("cup", color="red"),)),
    ]


def test_dpg_bench(tmp_path):
    suite = read_dpg(written(tmp_path, "dpg_bench.csv", DPG))
    first = QuestionCheck(
        (
            Question(1, "Is there a dog?", (), "entity"),
            Question(2, "Is the dog red?", (1,), "attribute"),
            Question(3, "Is it here?", (1, 2), "relation"),
        ),
        cascade=True,
    )
    second = QuestionCheck((Question(1, "Is there a cat?", (), "entity"),), cascade=True)
    assert suite.cases == (Case("A dog, red.", first), Case("A cat.", second))
    assert suite.mean_over == "prompts"


@pytest.mark.parametrize("as_text", [False, True], ids=["json", "json-in-text"])
def test_oneig(tmp_path, as_text):
    table = written(
        tmp_path,
        "OneIG-Bench.csv",
        "category,id,prompt_en,type\nPortrait,000,a tall man,NP\nPortrait,001,a boy,NP\nGeneral_Object,000,a cup,NP\n",
    )
    item = {"question": {"1": "Is there a man?", "2": "Is he tall?"}, "dependency": {"1": [0], "2": [1]}}
    people = {"000": {key: json.dumps(part) if as_text else part for key, part in item.items()}}
    cups = {"000": {"question": {"1": "Is there a cup?"}, "dependency": {"1": [0]}}}
    suite = read_oneig(
        table,
        [
            written(tmp_path, "human_zh.json", json.dumps(people)),
            written(tmp_path, "object.json", json.dumps(cups)),
        ],
    )
    man = QuestionCheck((Question(1, "Is there a man?"), Question(2, "Is he tall?", (1,))))
    cup = QuestionCheck((Question(1, "Is there a cup?"),))
    assert suite.cases == (Case("a tall man", man, "Portrait"), Case("a cup", cup, "General_Object"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[1", "line 1 is not a line of GenEval", id="no-json"),
        pytest.param(json.dumps(GENEVAL[0]) + "\n\n{}\n", "line 3 .*there is no 'tag'", id="no-tag"),
        pytest.param('{"tag": "x", "prompt": "y", "include": [{"class": "dog"}]}', "no 'count'", id="no-count"),
        pytest.param('{"tag": "x", "prompt": "y", "include": []}', "passed by every picture", id="no-clause"),
        pytest.param('{"tag": "x", "include": [{"class": "dog", "count": 1}]}', "no 'prompt'", id="no-prompt"),
        pytest.param('["a dog"]', "is not a line of GenEval", id="a-list"),
        pytest.param("", "need at least one case", id="empty"),
    ],
)
def test_a_file_that_is_not_geneval_is_refused(tmp_path, text, message):
    with pytest.raises(aa.PromptError, match=message):
        read_geneval(written(tmp_path, "a.jsonl", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("item_id,text\n", r"DPG-Bench has \['proposition_id'", id="no-column"),
        pytest.param(DPG.replace('3,"1, 2"', "3,one"), "line 4 is not a question", id="no-number"),
        pytest.param(
            DPG.replace('3,"1, 2"', "3,9"), "has parents that are not among the other questions", id="no-parent"
        ),
        pytest.param(DPG.splitlines()[0], "need at least one case", id="no-row"),
    ],
)
def test_a_file_that_is_not_dpg_bench_is_refused(tmp_path, text, message):
    with pytest.raises(aa.PromptError, match=message):
        read_dpg(written(tmp_path, "a.csv", text))


@pytest.mark.parametrize(
    ("table", "questions", "message"),
    [
        pytest.param("category,prompt_en\n", "{}", "Expected category, id and prompt_en", id="no-id"),
        pytest.param("category,id,text\n", "{}", "Expected category, id and prompt_en", id="no-prompt"),
        pytest.param("category,id,prompt_en\n", '{"7": {}}', "no prompt '7' of 'Portrait'", id="another-prompt"),
        pytest.param("category,id,prompt_en\n", "{}", "need at least one case", id="nothing"),
        pytest.param("category,id,prompt_en\n", "[]", "is not a list of questions of OneIG", id="a-list"),
        pytest.param("category,id,prompt_en\n", "{", "is not a list of questions of OneIG", id="no-json"),
        pytest.param("category,id,prompt_en\nPortrait,7,x\n", '{"7": {"question": {}}}', "no 'dependency'", id="half"),
    ],
)
def test_a_file_that_is_not_oneig_is_refused(tmp_path, table, questions, message):
    with pytest.raises(aa.PromptError, match=message):
        read_oneig(written(tmp_path, "a.csv", table), [written(tmp_path, "human.json", questions)])


def oneig(folder, name, items, table):
    """The suite of ``items``, whose questions and dependencies are texts that hold JSON, as in the published files."""
    published = {
        prompt_id: {
            key: json.dumps(part, ensure_ascii=False)
            for key, part in zip(("question", "dependency"), parts, strict=True)
        }
        for prompt_id, parts in items.items()
    }
    return read_oneig(
        written(folder, "OneIG-Bench.csv", table), [written(folder, name, json.dumps(published, ensure_ascii=False))]
    )


def published_oneig_score(answers, dependency):
    """What OneIG's alignment_score.py computes of one picture: a question scores 0 if a parent that exists does."""
    filtered = dict(answers)
    for number, parents in dependency.items():
        if any(parent in answers and not answers[parent] for parent in parents if parent):
            filtered[number] = False
    return sum(filtered.values()) / len(filtered)


@pytest.mark.parametrize("answers", list(itertools.product([False, True], repeat=3)))
def test_oneigs_questions_that_depend_on_themselves_or_on_none_that_exists_score_as_published(tmp_path, answers):
    questions = {"1": "Is there a cup?", "2": "Is it red?", "3": "Is it full?"}
    dependency = {"1": [0], "2": [2, 1], "3": [3, 7]}
    suite = oneig(
        tmp_path, "object.json", {"000": (questions, dependency)}, "category,id,prompt_en\nGeneral_Object,000,a cup\n"
    )
    (case,) = suite.cases
    right = case.check.apply_dependencies(answers)
    numbered = dict(zip((1, 2, 3), answers, strict=True))
    expected = published_oneig_score(numbered, {int(number): parents for number, parents in dependency.items()})
    assert sum(right) / len(right) == expected


def test_oneigs_multilingual_prompts_are_those_of_the_chinese_table(tmp_path):
    table = "category,id,prompt_cn\nMultilingualism,000,颁奖典礼现场\nPortrait,000,高个子男人\n"
    suite = oneig(tmp_path, "multilingualism_zh.json", {"000": ({"1": "现场是颁奖典礼"}, {"1": [0]})}, table)
    check = QuestionCheck((Question(1, "现场是颁奖典礼"),))
    assert suite.cases == (Case("颁奖典礼现场", check, "Multilingualism"),)


def test_a_prompt_of_oneig_that_cannot_be_read_is_left_out_and_named(tmp_path):
    good = ({"1": "Is there a man?"}, {"1": [0]})
    items = {"000": good, "001": ({"1": "Is there a boy?"}, {"one": [0]}), "002": good, "009": good}
    table = "category,id,prompt_en\n" + "".join(f"Portrait,00{number},a man {number}\n" for number in range(4))
    items["003"] = good
    with pytest.warns(UserWarning, match=r"2 of 5 prompts are left out.*'001': .*'one'.*'009': .*no prompt '009'"):
        suite = oneig(tmp_path, "human.json", items, table)
    assert [case.prompt for case in suite.cases] == ["a man 0", "a man 2", "a man 3"]


def test_a_file_of_which_no_more_than_half_can_be_read_is_of_another_format(tmp_path):
    lines = [json.dumps(line) for line in GENEVAL]
    with pytest.warns(UserWarning, match=r"'a.jsonl': 1 of 5 prompts are left out.*line 3 is not a line of GenEval"):
        suite = read_geneval(written(tmp_path, "a.jsonl", "\n".join([*lines[:2], "{}", *lines[2:]])))
    assert len(suite.cases) == 4
    with pytest.raises(aa.PromptError, match="line 5 is not a line of GenEval"):
        read_geneval(written(tmp_path, "a.jsonl", "\n".join([*lines, *["{}"] * 4])))


def test_a_prompt_of_dpg_bench_with_an_odd_question_is_left_out_and_the_others_are_read(tmp_path):
    dogs = DPG + DPG.split("\n", 1)[1].replace("vrd7", "vrd8").replace("23", "24").replace('3,"1, 2"', "3,9")
    odd = dogs.replace("vrd8,A cat.,,1", "vrd8,A cat.,,one")
    with pytest.warns(UserWarning, match=r"1 of 4 prompts are left out.*partiprompts24.*parents that are not among"):
        assert len(read_dpg(written(tmp_path, "a.csv", dogs)).cases) == 3
    with pytest.raises(aa.PromptError, match=r"line 9 is not a question.*'partiprompts24'"):
        read_dpg(written(tmp_path, "a.csv", odd))


def test_a_question_of_dpg_bench_that_depends_on_itself_does_so_without_effect(tmp_path):
    itself = read_dpg(written(tmp_path, "a.csv", DPG.replace('3,"1, 2"', '3,"1, 2, 3"')))
    assert itself.cases == read_dpg(written(tmp_path, "b.csv", DPG)).cases


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(aa.PromptError, match="is not UTF-8 text"):
        read_geneval(tmp_path / "a.jsonl")

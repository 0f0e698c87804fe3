"""Suites as their authors publish them, and files of other formats."""

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


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(aa.PromptError, match="is not UTF-8 text"):
        read_geneval(tmp_path / "a.jsonl")

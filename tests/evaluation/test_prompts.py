"""Prompt sets as published, and files of other formats."""

import json

import pytest

import artaug as aa


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_partiprompts(tmp_path):
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        'a sign that says "Stop\tArtifacts\tWriting\t',
        "bond\tAbstract\tBasic\tx",
    ]
    found = aa.PromptSet.read(written(tmp_path, "PartiPrompts.tsv", "\r\n".join(rows)))
    assert found == aa.PromptSet(('a sign that says "Stop', "bond"), ("Artifacts", "Abstract"))


def test_drawbench(tmp_path):
    text = 'Prompts,Category\nA red coloured car.,Colors\n"A cat, asleep, under ""Home"".",Text\n'
    found = aa.PromptSet.read(written(tmp_path, "DrawBench.csv", "\ufeff" + text))
    assert list(found) == ["A red coloured car.", 'A cat, asleep, under "Home".']
    assert found.categories == ("Colors", "Text")


def test_blanks_around_a_category_are_not_part_of_its_name(tmp_path):
    text = "Prompts,Category\nA cat.,Gary Marcus et al. \nA dog.,Gary Marcus et al.\n"
    found = aa.PromptSet.read(written(tmp_path, "DrawBench.csv", text))
    assert found.categories == ("Gary Marcus et al.",) * 2
    listed = aa.PromptSet.read(written(tmp_path, "a.json", json.dumps([{"prompt": "a fox", "category": " Animals"}])))
    assert listed.categories == ("Animals",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.tsv",
            "Prompt\tCategory\na\tb\n\tAbstract\nc\td\n",
            "1 of 3 prompts are left out.* line 3: the column Prompt",
        ),
        ("a.json", '["a", {"text": "b"}, "c"]', r"1 of 3 prompts are left out.* item 1 is \{'text': 'b'\}"),
    ],
)
def test_a_row_without_a_prompt_is_left_out_and_named(tmp_path, name, text, message):
    with pytest.warns(UserWarning, match=message):
        assert tuple(aa.PromptSet.read(written(tmp_path, name, text))) == ("a", "c")


def test_hpd(tmp_path):
    styles = aa.PromptSet.read(written(tmp_path, "anime.json", json.dumps(["a fox", "a 海"])))
    assert (tuple(styles), styles.categories) == (("a fox", "a 海"), ("anime", "anime"))
    listed = aa.PromptSet.read(
        written(tmp_path, "test.json", json.dumps([{"prompt": "a fox", "image_path": ["1.jpg"]}]))
    )
    assert (tuple(listed), listed.categories) == (("a fox",), ("",))


def test_plain_text(tmp_path):
    assert tuple(aa.PromptSet.read(written(tmp_path, "mine.txt", "a fox\n\na hen\n"))) == ("a fox", "a hen")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompts.parquet", "x", "'prompts.parquet' has an unknown format. Expected PartiPrompts"),
        ("a.csv", "text,kind\na,b\n", r"has the columns \['text', 'kind'\]. Expected Prompt or Prompts among them"),
        ("a.csv", "", r"has the columns \[\]"),
        ("a.tsv", "Prompt\tCategory\n\tAbstract\n", "'a.tsv', line 2: the column Prompt is empty"),
        ("a.tsv", "Prompt\tCategory\n", "holds no prompts"),
        ("a.json", "[1", "'a.json' is not JSON"),
        ("a.json", '{"a": 1}', "holds a JSON dict. Expected a list"),
        ("a.json", '["a", {"text": "b"}]', r"item 1 is \{'text': 'b'\}"),
        ("a.json", "[]", "holds no prompts"),
        ("a.txt", "\n \n", "holds no prompts"),
    ],
)
def test_a_file_that_is_not_a_prompt_set_is_refused(tmp_path, name, text, message):
    with pytest.raises(aa.PromptError, match=message):
        aa.PromptSet.read(written(tmp_path, name, text))


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(aa.PromptError, match="is not UTF-8 text"):
        aa.PromptSet.read(tmp_path / "a.txt")


def test_the_everyday_set_has_six_prompts_of_each_category():
    everyday = aa.PromptSet.everyday()
    assert len(set(everyday)) == len(everyday) == 48
    assert {len(everyday.in_category(category)) for category in everyday.categories} == {6}


def test_a_sample_is_a_part_in_order_and_repeatable():
    everyday = aa.PromptSet.everyday()
    sample = everyday.sample(10, seed=3)
    assert sample == everyday.sample(10, seed=3) != everyday.sample(10, seed=4)
    assert [prompt for prompt in everyday if prompt in set(sample)] == list(sample)
    assert everyday[2:4] == (everyday[2], everyday[3])


def test_a_sample_has_at_least_one_prompt_and_at_most_all():
    everyday = aa.PromptSet.everyday()
    assert everyday.sample(48) == everyday
    assert len(everyday.sample(1)) == 1
    with pytest.raises(aa.InvalidValueError, match="cannot sample 0 of 48"):
        everyday.sample(0)


def test_unknown_categories_and_wrong_sizes_are_refused():
    everyday = aa.PromptSet.everyday()
    with pytest.raises(aa.InvalidValueError, match=r"no prompt is of category 'Cars'\. There are: \['Animals'"):
        everyday.in_category("Cars")
    with pytest.raises(aa.InvalidValueError, match="cannot sample 49 of 48"):
        everyday.sample(49)
    with pytest.raises(aa.PromptError, match="received 1 prompts and 0 categories"):
        aa.PromptSet(("a",), ())
    with pytest.raises(aa.PromptError, match="prompt number 0 of the set is ' '"):
        aa.PromptSet((" ",), ("",))

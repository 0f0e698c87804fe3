"""What artaug prints is ASCII where the words are its own: an output that is not UTF-8 raises `UnicodeEncodeError` for more."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.test_pickling import public_values, sample

import artaug as aa
from artaug import playground
from artaug.evaluation.suites import Case, Question, QuestionCheck, QuestionScore, Suite, evaluate
from artaug.testing import FixedScorer, SwatchSynthesizer

ROOT = Path(__file__).parents[1]
IS_NOT_PRINTED = (
    "critics/replies/",
    "critics/conversation.py",
    "serving/chat.py",
    "serving/choices.py",
    "serving/logprobs.py",
    "report/",
    "testing/loop.py",
    "_internal/values.py",
    "diffusion/families/tokenized.py",
)
"""What models read and write, HTML (which says that it is UTF-8), a prompt in Japanese, a range of characters, and one of no meaning."""


def literals(source):
    """The strings of a module with their lines, docstrings left out."""
    tree = ast.parse(source)
    documented = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # docstrings, of fields too
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value


def not_ascii(source):
    return [(line, text) for line, text in literals(source) if not text.isascii()]


MODULES = [
    path
    for folder in ("src/artaug", "examples", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.relative_to(ROOT / folder).as_posix().startswith(IS_NOT_PRINTED)
]


def test_every_string_that_may_be_shown_is_ascii():
    found = {str(path): strings for path in MODULES if (strings := not_ascii(path.read_text(encoding="utf-8")))}
    assert not found


def test_a_string_that_is_not_ascii_is_found_and_a_docstring_is_left():
    source = '"""An arrow →."""\nx = 1\n"""Of x: …"""\ndef f():\n    """More →."""\n    return f"{x} … {x}"\n'
    assert not_ascii(source) == [(6, " … ")]


@pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in public_values() if "__str__" in vars(cls)])
def test_the_text_of_a_public_value_is_ascii(cls):
    assert str(sample(cls)).isascii()


def test_an_output_that_is_not_utf_8_shows_the_results_of_a_run():
    finished = subprocess.run(
        [sys.executable, "-c", "from tests.test_printing import show_results; show_results()"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr
    assert "* The training pairs were filtered by this scorer" in finished.stdout
    assert "compare round 1: " in finished.stderr  # the bar
    assert all(text in finished.stdout for text in ("95% interval, 1 picture a prompt", "kept  ###", "too dark by ..."))


def show_results():
    """Print what examples/quickstart.py prints, and the other results that are made to be printed."""
    shown: list[object] = []
    prompts, scorer = playground.prompts(4, seed=0), FixedScorer(0.5)
    comparison = aa.compare(
        SwatchSynthesizer(), {"round 1": SwatchSynthesizer()}, prompts, scorers=[scorer], filtered_by=[scorer.name]
    )
    shown.append(comparison.table())
    shown.append(comparison)
    suite = Suite("colors", tuple(Case(prompt, QuestionCheck((Question(1, "red?"),))) for prompt in prompts))
    shown.append(evaluate(QuestionScore(suite=suite, vqa=scorer), SwatchSynthesizer()))
    picture = SwatchSynthesizer().synthesize(aa.Plan("a"), seed=0)
    pair = aa.ImagePair.unchanged(picture, prompt="a", seed=0)
    kept = aa.Kept(pair, aa.Verdict(keep=True, reason="good", scores={}))
    skipped = [aa.Skipped("b", number, f"too dark by {number}", "plan") for number in range(2)]
    shown.append(aa.Funnel.of([kept, *skipped]))
    sys.stdout.write("\n".join(map(str, shown)))


def long_run(prompts, words, *, rounds=2):
    """A run whose every text is long, and whose pictures are noise of 512 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    pictures = Image.fromarray(noise), Image.fromarray(noise[::-1].copy())
    plan = aa.Plan(words, tuple(aa.Region(aa.Box(0, 0, 1, 1), f"{words} {index}") for index in range(8)))
    attempts = []
    for number in range(prompts):
        pair = aa.ImagePair(prompt=f"{number} {words}", seed=number, before=pictures[0], after=pictures[1], plan=plan)
        verdict = aa.Verdict(keep=number % 3 == 0, reason=f"{words} {number}", scores={f"{words} gain": 1.0})
        skipped = aa.Skipped(words, number, f"{'abcdefg'[number % 7] * (1 + number % 11)} {words}")
        attempts.append((aa.Kept(pair, verdict), aa.Dropped(pair, verdict), skipped)[number % 3])
    lora = aa.LoRA({f"layer{index}": aa.LowRank(torch.ones(1, 2), torch.ones(2, 1)) for index in range(prompts)})
    training = aa.TrainingResult(lora=lora, losses=(0.5,) * prompts, pairs=1, steps=prompts, seconds=1.0)
    finished = [
        aa.Round(
            number=number + 1,
            attempts=tuple(attempts),
            training=training,
            lora=lora,
            seconds={"draw": 1.0},
            gain=None,
            accepted=True,
        )
        for number in range(rounds)
    ]
    return aa.Enhancement(rounds=tuple(finished), stop_reason=words)


def shown_values(run):
    """Everything of a run that a notebook may end a cell with."""
    kept, dropped, skipped = run.rounds[0].attempts[:3]
    suggestion = aa.Suggestion(aa.Box(0, 0, 1, 1), skipped.prompt, skipped.reason)
    critique = aa.Critique((suggestion,) * len(run.rounds[0].attempts), skipped.reason, (skipped.reason,) * 20)
    funnel = aa.Funnel.of(run.rounds[0].attempts)
    values = [
        run,
        run.rounds[0],
        run.rounds[0].training,
        kept,
        dropped,
        skipped,
        kept.pair,
        kept.pair.plan,
        kept.verdict,
    ]
    return [*values, suggestion, critique, aa.Abstention(skipped.reason), funnel, *funnel.steps]


def test_the_repr_of_a_run_and_of_all_in_it_is_short_whatever_its_size():
    for value in shown_values(long_run(200, "a long text " * 100, rounds=40)):
        assert len(repr(value)) <= 300, type(value)


def test_a_notebook_page_of_a_run_does_not_grow_with_the_run():
    small, large = long_run(40, "a long text " * 30, rounds=2), long_run(400, "a long text " * 300, rounds=60)
    pages = [
        (type(one), len(one._repr_html_()), len(other._repr_html_()))
        for one, other in zip(shown_values(small), shown_values(large), strict=True)
        if hasattr(one, "_repr_html_")
    ]
    assert {kind.__name__ for kind, *_ in pages} >= {"Enhancement", "Round", "Kept", "Dropped", "ImagePair", "Critique"}
    assert [kind for kind, before, after in pages if after > before + 20_000] == []


def test_a_page_of_a_run_shows_its_rounds_where_prompts_were_lost_and_a_few_kept_pairs():
    page = long_run(40, "a text")._repr_html_()
    assert page.count("<tr><td>") == 2
    assert "a text 6" in page
    assert "redrawn" in page
    assert page.count("<b>kept</b>") == 3
    assert aa.Enhancement(rounds=(), stop_reason="a < b")._repr_html_().endswith("<p><small>a &lt; b</small></p>")


def test_a_repr_that_is_cut_still_tells_values_apart_and_a_brief_one_is_whole():
    words = "a long text " * 100
    assert repr(aa.Skipped(f"{words}x", 0, "why")) != repr(aa.Skipped(f"{words}y", 0, "why"))
    assert repr(aa.Verdict(keep=True, reason="it rose", scores={})) == "Verdict(keep=True, reason='it rose', scores={})"

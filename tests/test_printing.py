"""What artaug prints is ASCII where the words are its own: an output that is not UTF-8 raises `UnicodeEncodeError` for more."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_pickling import public_values, sample

import artaug as aa
from artaug import playground
from artaug.evaluation.suites import Case, Question, QuestionCheck, QuestionScore, Suite, evaluate
from artaug.testing import FixedScorer, SwatchSynthesizer

ROOT = Path(__file__).parents[1]
IS_NOT_PRINTED = ("critics/replies/", "critics/conversation.py", "report/", "testing/loop.py", "_internal/values.py")
"""What models read and write, HTML (which says that it is UTF-8), a prompt in Japanese, and a range of characters."""


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
    assert "compare: round 1" in finished.stderr  # the bar of tqdm
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

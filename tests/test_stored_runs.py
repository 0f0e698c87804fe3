"""A run in a folder shows what it holds: while it goes, after it was left half way, and when it has ended."""

import json
import shutil
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug._internal.segments import read_segment, write_segment
from artaug.diffusion import DiffusersSynthesizer
from artaug.run.storage.store import RunRecord
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from support.tiny_flux import TINY_SIZE, tiny_flux

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
PROMPTS = ["a kitchen", "a harbour", "a garden", "a moor", "a pond"]
HELD_OUT = [f"held-out picture {number}" for number in range(6)]


class Brightness(aa.Scorer):
    """The mean of a picture."""

    def score(self, image, prompt):
        return float(np.asarray(image.convert("L")).mean())


class Choosy(aa.Critic):
    """Abstains on one prompt, and fails for a while at another until it is asked again."""

    def __init__(self):
        self.failed = set()

    def critique(self, image, prompt):
        if prompt == "a moor":
            return aa.Abstention("it is too dark")
        if prompt == "a harbour" and prompt not in self.failed:
            self.failed.add(prompt)
            return aa.Abstention("timeout", transient=True)
        return ADVICE


def improved(store, **options):
    defaults = {"synthesizer": SwatchSynthesizer(), "critic": FixedCritic(ADVICE), "keep": FixedFilter(keep=True)}
    fixed = {"planner": aa.GreedyPlanner(), "seed": 0, "batch_size": 2, "store": store, "check": "arguments"}
    return aa.improve(PROMPTS, **(defaults | fixed | options))


@pytest.fixture(scope="module")
def enhanced(tmp_path_factory):
    """The result of a run of two rounds as it was returned, and its folder."""
    store = tmp_path_factory.mktemp("run") / "first"
    synthesizer = DiffusersSynthesizer(
        pipeline=tiny_flux(), guide=aa.OutputMix(), width=TINY_SIZE, height=TINY_SIZE, steps=1, max_sequence_length=32
    )
    result = aa.enhance(
        PROMPTS,
        synthesizer=synthesizer,
        critic=FixedCritic(ADVICE),
        planner=aa.GreedyPlanner(),
        keep=FixedFilter(keep=True),
        trainer=aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2, learning_rate=1e-2),
        stop=aa.StopRule(Brightness(), HELD_OUT, at_least=-1e6),
        rounds=2,
        batch_size=2,
        progress=False,
        store=store,
    )
    return result, store


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"critic": Choosy()},
        {"keep": aa.TopFraction(Brightness(), fraction=0.5)},
        {"critic": Choosy(), "keep": aa.TopFraction(Brightness(), fraction=0.5)},
    ],
    ids=["plain", "put off", "judged at the end", "both"],
)
def test_attempts_are_those_that_improve_gave_in_the_same_order(tmp_path, options):
    given = list(improved(tmp_path, **options))
    run = aa.Run.open(tmp_path)
    assert list(run.attempts()) == given == list(run.attempts(1))
    assert list(run.pairs()) == [attempt.pair for attempt in given if isinstance(attempt, aa.Kept)]
    assert run.funnel() == aa.Funnel.of(given)
    assert sorted(candidate.prompt for candidate in run.candidates()) == sorted(PROMPTS)


def test_a_run_that_was_left_half_way_shows_its_finished_chunks(tmp_path):
    attempts = improved(tmp_path)
    given = list(islice(attempts, 3))
    run = aa.Run.open(tmp_path)
    assert run.is_running is True
    assert "this process" in run.owner
    assert [attempt.pair.prompt for attempt in run.attempts()] == PROMPTS[:4]
    assert list(run.attempts())[:3] == given
    attempts.close()
    assert run.is_running is False
    assert run.owner is None
    assert run.rounds == ()
    assert "improve" in repr(run)


def test_a_run_that_was_killed_shows_what_it_has(tmp_path):
    script = f"""
import os, signal, artaug as aa
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
advice = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
parts = {{"synthesizer": SwatchSynthesizer(), "critic": FixedCritic(advice), "keep": FixedFilter(keep=True)}}
attempts = aa.improve({PROMPTS}, **parts, planner=aa.GreedyPlanner(), seed=0, batch_size=2, store={str(tmp_path)!r})
next(attempts)
os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode != 0
    run = aa.Run.open(tmp_path)
    assert [attempt.pair.prompt for attempt in run.attempts()] == PROMPTS[:2]
    assert run.is_running in {False, None}  # None where the system does not say which processes run
    assert run.result.stop_reason == "improve was called, which trains nothing"


def test_pairs_that_wait_for_the_end_of_the_round_are_no_attempts_yet(tmp_path):
    attempts = improved(tmp_path, keep=aa.TopFraction(Brightness(), fraction=0.5))
    next(attempts)
    attempts.close()
    (tmp_path / "round-1" / "verdicts.json").unlink()
    run = aa.Run.open(tmp_path)
    assert list(run.attempts()) == []
    assert len(list(run.candidates())) == len(PROMPTS)


def test_all_candidates_are_there_with_their_pictures(tmp_path):
    given = list(improved(tmp_path, candidates=aa.BestOf(3, Brightness())))
    candidates = list(aa.Run.open(tmp_path).candidates(1))
    assert sorted(candidate.member for candidate in candidates) == [(index, n) for index in range(5) for n in range(3)]
    by_seed = {candidate.seed: candidate for candidate in candidates}
    for attempt in given:
        assert by_seed[attempt.pair.seed].outcome() == attempt.pair
    assert all(candidate.before.load().size == candidate.after.load().size for candidate in candidates)


def test_looking_writes_nothing(enhanced, tmp_path):
    _, store = enhanced
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    run = aa.Run.open(store)
    list(run.attempts())
    run.report(tmp_path / "report.html")
    assert run._repr_html_()
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_the_result_is_what_enhance_returned(enhanced):
    result, store = enhanced
    run = aa.Run.open(str(store))
    assert run.result.summary() == result.summary()
    assert run.result.stop_reason == result.stop_reason
    assert run.lora.digest == result.lora.digest
    for returned in result.rounds:
        found = run.round(returned.number)
        assert found.lora.digest == returned.lora.digest
        assert found.training.losses == returned.training.losses
        assert found.comparison == returned.comparison == run.comparison(returned.number)
        assert found.comparison.rows == (returned.gain,)
        assert list(found.attempts) == list(returned.attempts)
    assert [call.settings["rounds"] for call in run.calls] == ["2"]


def test_the_comparison_of_a_round_keeps_its_pictures_on_disk(enhanced):
    result, store = enhanced
    images = aa.Run.open(store).comparison(2).base.images
    assert len(images) == len(HELD_OUT)
    assert isinstance(images[0], Image.Image)
    files = result.rounds[1].comparison.base.images.files
    assert [image.tobytes() for image in images] == [file.load().tobytes() for file in files]
    assert all(store in file.path.parents for file in files)
    assert len(images[1:3]) == 2


def test_the_report_of_a_run_from_disk_is_that_of_the_process_that_ran_it(enhanced, tmp_path):
    result, store = enhanced
    comparison = result.rounds[-1].comparison
    ran = aa.write_report(tmp_path / "ran" / "report.html", result=result, comparison=comparison)
    run = aa.Run.open(store)
    found = run.report(tmp_path / "found" / "report.html", comparison=run.comparison(2))
    assert ran.read_bytes() == found.read_bytes()


def test_the_report_of_a_run_that_is_under_way_shows_its_pairs(tmp_path):
    attempts = improved(tmp_path / "run", critic=Choosy())
    next(attempts)
    attempts.close()
    run = aa.Run.open(tmp_path / "run")
    so_far = list(run.attempts())
    page = run.report(tmp_path / "report.html", images="inline")
    given = aa.write_report(tmp_path / "given.html", attempts=so_far, images="inline")
    for text in (page.read_text(encoding="utf-8"), given.read_text(encoding="utf-8")):
        assert "nothing is trained on them yet" in text
        assert so_far[0].pair.prompt in text


def test_a_report_of_a_run_on_disk_opens_only_the_pictures_it_shows(tmp_path, monkeypatch):
    list(improved(tmp_path / "run"))
    opened = []
    load = aa.ImageFile.load
    monkeypatch.setattr(aa.ImageFile, "load", lambda file: opened.append(file.digest) or load(file))
    aa.Run.open(tmp_path / "run").report(tmp_path / "report.html", max_pairs=2, images="folder")
    assert len(opened) == len(set(opened)) == 4


def test_pictures_that_are_read_anew_each_time_are_not_confused_in_a_report(tmp_path):
    """A picture that is freed gives its place in memory, and so its ``id``, to the next one."""
    given = list(improved(tmp_path / "run"))
    in_memory = [
        aa.Kept(attempt.pair.holding(attempt.pair.before, attempt.pair.after), attempt.verdict) for attempt in given
    ]
    pages = [
        aa.write_report(tmp_path / name / "report.html", attempts=attempts, images="auto")
        for name, attempts in (("disk", given), ("memory", in_memory))
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_the_list_of_pairs_is_what_image_folders_of_datasets_need(tmp_path):
    """Each line names pictures by ``..._file_name``, relative to the ``metadata.jsonl``, and has the same columns.

    https://huggingface.co/docs/datasets/image_dataset#imagefolder
    """
    keep = aa.TopFraction(Brightness(), fraction=0.5)
    given = list(improved(tmp_path, keep=keep, critic=Choosy()))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [attempt for attempt in given if not isinstance(attempt, aa.Skipped)]
    assert len({tuple(row) for row in rows}) == 1
    assert [(row["prompt"], row["kept"], row["round"]) for row in rows] == [
        (attempt.pair.prompt, isinstance(attempt, aa.Kept), 1) for attempt in pairs
    ]
    for row, attempt in zip(rows, pairs, strict=True):
        for side in ("before", "after"):
            with Image.open(tmp_path / row[f"{side}_file_name"]) as image:
                assert image.convert("RGB").tobytes() == getattr(attempt.pair, side).tobytes()
    assert not [path for path in tmp_path.rglob("metadata.*") if path.parent != tmp_path]
    assert aa.pairs_from_folder(tmp_path) == list(aa.Run.open(tmp_path).pairs())


def test_a_list_of_pairs_that_is_gone_is_written_by_the_next_call(tmp_path):
    list(improved(tmp_path))
    text = (tmp_path / "metadata.jsonl").read_bytes()
    (tmp_path / "metadata.jsonl").unlink()
    list(improved(tmp_path))
    assert (tmp_path / "metadata.jsonl").read_bytes() == text


def test_a_round_without_a_kept_pair_has_its_reason(tmp_path):
    with pytest.raises(aa.NothingToLearnError, match="round 1 kept none of 5 prompts: 5 dropped") as raised:
        aa.enhance(
            PROMPTS,
            synthesizer=DiffusersSynthesizer(
                pipeline=tiny_flux(), guide=aa.OutputMix(), width=TINY_SIZE, height=TINY_SIZE, steps=1
            ),
            critic=FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=False),
            trainer=aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2),
            progress=False,
            store=tmp_path,
        )
    result = aa.Run.open(tmp_path).result
    assert result.rounds == ()
    assert str(raised.value).startswith(result.stop_reason)


def test_a_folder_without_a_run_is_refused_with_what_to_open(tmp_path):
    with pytest.raises(aa.StorageError, match="no such folder"):
        aa.Run.open(tmp_path / "nothing")
    list(improved(tmp_path / "second"))
    with pytest.raises(aa.StorageError, match="There are runs in it: second"):
        aa.Run.open(tmp_path)
    with pytest.raises(aa.InvalidValueError, match="folder"):
        aa.Run.open(3)


def test_a_round_that_is_not_there_is_named(enhanced):
    run = aa.Run.open(enhanced[1])
    for wrong in (0, 3, -1):
        for look in (run.attempts, run.pairs, run.candidates, run.round, run.comparison, run.funnel):
            with pytest.raises(aa.InvalidValueError, match=r"1, 2"):
                look(wrong)


def test_damage_is_an_error_that_names_the_file(enhanced, tmp_path):
    store = tmp_path / "copy"
    shutil.copytree(enhanced[1], store)
    chunk = store / "round-1" / "attempts" / "0-00001.json"
    chunk.write_bytes(chunk.read_bytes().replace(b"a bright", b"a darker"))
    attempts = aa.Run.open(store).attempts()
    assert [next(attempts).pair.prompt for _ in range(2)] == PROMPTS[:2]
    with pytest.raises(aa.StorageError, match=r"0-00001\.json"):
        next(attempts)
    comparison = store / "round-1" / "comparison.json"
    comparison.write_bytes(comparison.read_bytes()[:-9])
    with pytest.raises(aa.StorageError, match=r"comparison\.json"):
        aa.Run.open(store).comparison(1)


def test_a_run_of_a_later_version_is_refused(tmp_path):
    list(improved(tmp_path))
    record = read_segment(tmp_path / "run.json", RunRecord, what="", remedy="")
    write_segment(tmp_path / "run.json", RunRecord(99, record.calls), what="", remedy="")
    with pytest.raises(aa.StorageError, match="version 99"):
        aa.Run.open(tmp_path)

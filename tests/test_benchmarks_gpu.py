"""What a lent GPU is asked: every job can be sent to a process, the first minutes hold what matters, results are kept."""

import ast
import json
import pickle
from pathlib import Path

import pytest
from benchmarks import _gpu_jobs as gpu_jobs
from benchmarks import _gpu_tests as gpu_tests
from benchmarks import _record as record
from benchmarks import _schedule as schedule
from benchmarks import gpu

from support.tiny_geometry import TINY

ROOT = Path(__file__).parents[1]
JOBS = gpu_jobs.jobs(rehearse=False)


def test_a_rehearsal_has_the_jobs_of_a_gpu_and_all_can_be_sent_to_a_process():
    rehearsed = gpu_jobs.jobs(rehearse=True)
    names = [(job.name, job.benchmark, job.cudnn_attention) for job in JOBS]
    assert [(job.name, job.benchmark, job.cudnn_attention) for job in rehearsed] == names
    assert len(set(names)) == len(names)
    assert all(pickle.loads(pickle.dumps(job)).name == job.name for job in [*JOBS, *rehearsed])


def test_one_command_of_nine_and_a_half_minutes_has_time_for_the_grid_the_training_and_2048_pixels():
    names = [job.name for job in JOBS]
    needed = JOBS[: names.index("grid: 2,048 px, R = 4") + 1]
    assert {"training: 1,024 px", "training: 512 px"} < {job.name for job in needed}
    assert sum(job.seconds for job in needed) + gpu.START_SECONDS <= 9.5 * 60


def test_prices_come_one_by_one_with_the_fit_of_all_of_them_at_the_end(monkeypatch):
    compiled = []
    monkeypatch.setattr(gpu_jobs.attention_costs, "flex_rows", lambda _costs, points: compiled.append(points) or [])
    points = gpu_jobs.price_points(6, 4, geometry=TINY, regions=(2,))
    *measured, fitted = gpu_jobs.price_rows(points)
    assert {(row["image_tokens"], row["rows"]) for row in measured} == {(36, 1), (16, 1), (36, 4), (16, 4)}
    assert all(row["seconds"] > 0 for row in measured)
    assert fitted["way"] == "fit"
    assert {"kernel", "score", "backward", "merged_backward"} <= set(fitted)
    assert [point.side for (point,) in compiled] == [6, 4]


def test_every_test_that_needs_a_gpu_is_in_a_file_that_is_run():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    }
    assert set(gpu_jobs.FILES) == marked


def test_the_guards_are_tests_that_exist():
    for guard in gpu_jobs.GUARDS:
        path, _, name = guard.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_row_for_each_test_and_what_pytest_cannot_run_raises(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text("def test_good(): ...\n\ndef test_bad():\n    assert 1 == 2\n")
    options = ("-q", "-p", "no:randomly", "-c", str(tmp_path / "none.ini"), "-o", "addopts=")
    (tmp_path / "none.ini").write_text("[pytest]\n")
    rows = list(gpu_tests.rows((*options, str(path))))
    assert [(row["test"].partition("::")[2], row["outcome"]) for row in rows] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
    ]
    assert "assert 1 == 2" in rows[1]["message"]
    with pytest.raises(RuntimeError, match="pytest ended with code 5"):
        list(gpu_tests.rows((*options, "-k", "absent", str(path))))


def training_row(method):
    return {
        "method": method,
        "dtype": "bfloat16",
        "storage": "plain",
        "pixels": 512,
        "batch": 1,
        "recomputing": True,
        "seconds_per_step": 0.5,
        "ratio_to_sft": 1.0,
        "peak_to_script": 1.0,
    }


def log_of(path):
    """A log of a finished job, one that was stopped, and one that was skipped."""
    log = schedule.Log(path)
    for name, benchmark, state, rows in (
        ("training: 512 px", "training", "finished", [training_row("SupervisedFineTuning")]),
        ("training: 1,024 px", "training", "failed", []),
        ("tests", "gpu_tests", "stopped", [{"test": "a", "outcome": "failed", "seconds": 1.0, "message": "no"}]),
        ("grid", "regional", "skipped", []),
    ):
        log.write("job", {"job": name, "benchmark": benchmark, "estimate": 1})
        if state != "skipped":
            log.write("environment", {"job": name, "environment": {"gpu": "a card", "quick": False}})
        for row in rows:
            log.write("row", {"job": name, "row": row})
        message = "Traceback\nOutOfMemoryError: too much" if state == "failed" else ""
        log.write("end", {"job": name, "state": state, "seconds": 2.0, "message": message})
    return log.path


def test_what_was_measured_is_kept_as_each_benchmark_writes_it_and_what_is_missing_is_named(tmp_path):
    gpu.keep(log_of(tmp_path / gpu.LOG), tmp_path / "card")
    written = {path.name: path for path in (tmp_path / "card").iterdir()}
    assert set(written) == {"training.json", "training.png", "gpu_tests.json", "gpu.json"}
    kept = json.loads(written["training.json"].read_text())
    assert kept["rows"] == [training_row("SupervisedFineTuning")]
    assert kept["environment"]["gpu"] == "a card"
    assert kept["environment"]["cut_short"] == "before all of training: 1,024 px was measured"
    jobs = json.loads(written["gpu.json"].read_text())["rows"]
    assert [(row["job"], row["state"], row["rows"]) for row in jobs] == [
        ("training: 512 px", "finished", 1),
        ("training: 1,024 px", "failed", 0),
        ("tests", "stopped", 1),
        ("grid", "skipped", 0),
    ]
    assert jobs[1]["message"] == "OutOfMemoryError: too much"


def test_the_summary_names_what_failed_and_ends_with_the_jobs(tmp_path):
    summary = gpu.summary(log_of(tmp_path / gpu.LOG))
    assert "0 of 1 did not fail\na" in summary
    assert summary.splitlines()[-1].split()[:2] == ["grid", "skipped"]


def test_a_gpu_that_is_not_there_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "Use --rehearse" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_machine_and_the_setting_of_attention_are_recorded(monkeypatch):
    settings = []
    monkeypatch.setattr(gpu.torch.backends.cuda, "enable_cudnn_sdp", settings.append)
    job = schedule.Job(name="a", benchmark="a", seconds=1, rows=list, cudnn_attention=False)
    found = gpu.environment(job, quick=True, commit="abc")
    assert settings == [False]
    assert (found["commit"], found["quick"]) == ("abc", True)
    assert set(record.environment()) | {"cudnn", "card"} <= set(found)

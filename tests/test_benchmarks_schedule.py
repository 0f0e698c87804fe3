"""Jobs on a GPU that is lent for minutes: in order, what fits, and nothing that was measured is lost."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from benchmarks import _schedule as schedule

from support import fake_jobs

START_S = 0.5


def run(path, jobs, *, minutes=1.0):
    schedule.run(jobs, schedule.Log(path), minutes=minutes, start_seconds=START_S, prepare=fake_jobs.prepare)
    return schedule.attempts(path)


def job(name, rows, *, seconds=1.0):
    return schedule.Job(name=name, benchmark="fake", seconds=seconds, rows=rows)


def test_jobs_run_in_order_and_share_a_process_until_one_fails_which_ends_none_of_the_others(tmp_path):
    counted = [job(f"count {number}", partial(fake_jobs.rows, number)) for number in (1, 2, 3)]
    broken = job("broken", fake_jobs.breaks_after_a_row)
    killed = job("killed", fake_jobs.kills_itself)
    done = run(tmp_path / "log", [counted[0], counted[1], broken, killed, counted[2]])
    assert [(attempt.name, attempt.state, len(attempt.rows)) for attempt in done.values()] == [
        ("count 1", "finished", 1),
        ("count 2", "finished", 2),
        ("broken", "failed", 1),
        ("killed", "failed", 1),
        ("count 3", "finished", 3),
    ]
    assert schedule.last_line(done["broken"].message) == "RuntimeError: CUDA out of memory"
    assert "breaks_after_a_row" in done["broken"].message
    assert done["killed"].message == "its process ended with code -9"
    first, second, broken_in, _, third = (attempt.environment["process"] for attempt in done.values())
    assert first == second == broken_in != third
    assert done["count 1"].rows[0]["process"] == first
    assert all(attempt.seconds >= 0 for attempt in done.values())


def test_a_job_that_does_not_fit_is_skipped_and_a_smaller_one_after_it_runs(tmp_path):
    jobs = [job("large", partial(fake_jobs.rows, 1), seconds=1000), job("small", partial(fake_jobs.rows, 1))]
    done = run(tmp_path / "log", jobs)
    assert [attempt.state for attempt in done.values()] == ["skipped", "finished"]
    assert done["large"].message == "needs 1000 s, 60 s are left"  # half a second of start is rounded away
    assert done["large"].rows == ()


def test_the_end_of_the_time_stops_a_job_and_what_it_started_and_its_rows_stay(tmp_path):
    pid_file = tmp_path / "pid"
    done = run(tmp_path / "log", [job("long", partial(fake_jobs.rows_and_a_child, pid_file), seconds=3)], minutes=0.1)
    assert (done["long"].state, done["long"].message) == ("stopped", "the time was up")
    assert done["long"].rows == ({"row": 0},)
    assert ended(int(pid_file.read_text()))


def ended(pid):
    """Whether a process ends within a few seconds; one that waits to be collected has ended."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_job_that_hangs_does_not_take_the_time_of_the_others(tmp_path):
    done = run(tmp_path / "log", [job("hangs", fake_jobs.hangs, seconds=0.1), job("next", partial(fake_jobs.rows, 1))])
    assert (done["hangs"].state, done["next"].state) == ("failed", "finished")
    assert done["hangs"].message.startswith("had not ended after")


def test_a_row_that_json_cannot_hold_fails_its_job_alone(tmp_path):
    jobs = [job("odd", fake_jobs.row_of_no_json), job("next", partial(fake_jobs.rows, 1))]
    done = run(tmp_path / "log", jobs)
    assert (done["odd"].state, done["next"].state) == ("failed", "finished")
    assert "not JSON serializable" in done["odd"].message


def test_another_run_takes_up_what_is_missing_and_repeats_nothing(tmp_path):
    jobs = [
        job("done", partial(fake_jobs.rows, 1)),
        job("broken", fake_jobs.breaks_after_a_row),
        job("large", partial(fake_jobs.rows, 2), seconds=100),
    ]
    assert [attempt.state for attempt in run(tmp_path / "log", jobs).values()] == ["finished", "failed", "skipped"]
    length = len(list(schedule.events(tmp_path / "log")))
    again = run(tmp_path / "log", jobs, minutes=5)
    assert [attempt.state for attempt in again.values()] == ["finished", "failed", "finished"]
    new = list(schedule.events(tmp_path / "log"))[length:]
    assert {event["job"] for event in new} == {"large"}


KILLED = """
import sys
from pathlib import Path
from benchmarks import _schedule as schedule
from support import fake_jobs

if __name__ == "__main__":
    job = schedule.Job(name="long", benchmark="fake", seconds=60, rows=fake_jobs.a_row_and_silence)
    first = schedule.Job(name="first", benchmark="fake", seconds=1, rows=fake_jobs.three_rows)
    log = schedule.Log(Path(sys.argv[1]))
    schedule.run([first, job], log, minutes=5, start_seconds=1, prepare=fake_jobs.prepare)
"""


def test_rows_are_on_the_disk_when_the_scheduler_is_killed_and_another_run_goes_on(tmp_path):
    script, path = tmp_path / "killed.py", tmp_path / "log"
    script.write_text(KILLED)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, script, path], env={**os.environ, "PYTHONPATH": paths})
    wait_for(lambda: path.exists() and path.read_text().count('"event": "row"') == 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with path.open("a") as file:
        file.write('{"event": "row", "job": "long", "ro')  # as if it had died while writing
    done = schedule.attempts(path)
    assert [(attempt.state, len(attempt.rows)) for attempt in done.values()] == [("finished", 3), ("stopped", 1)]
    assert done["long"].message == "the scheduler was killed"
    assert ended(done["long"].environment["process"])

    finished = run(path, [job("first", fake_jobs.hangs), job("long", partial(fake_jobs.rows, 2))])
    assert [(attempt.state, len(attempt.rows)) for attempt in finished.values()] == [("finished", 3), ("finished", 2)]
    assert sum(line[-3:] == '"ro' for line in path.read_text().splitlines()) == 1


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that within a minute")


def test_an_attempt_that_was_cut_off_does_not_replace_a_better_one(tmp_path):
    log = schedule.Log(tmp_path / "log")
    for state, rows in (("stopped", 2), ("stopped", 1), ("skipped", 0)):
        log.write("job", {"job": "a", "benchmark": "fake", "estimate": 1})
        for number in range(rows):
            log.write("row", {"job": "a", "row": {"row": number}})
        log.write("end", {"job": "a", "state": state, "seconds": 1, "message": ""})
    assert len(schedule.attempts(log.path)["a"].rows) == 2


def test_two_jobs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="jobs with one name: a"):
        run(tmp_path / "log", [job("a", fake_jobs.hangs)] * 2)

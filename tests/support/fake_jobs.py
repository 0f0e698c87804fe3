"""Jobs for the scheduler of GPU benchmarks that need no GPU, in a module that a new process finds."""

import os
import signal
import subprocess
import sys
import time


def prepare(_job):
    return {"process": os.getpid()}


def rows(count):
    for number in range(count):
        yield {"row": number, "process": os.getpid()}


def three_rows():
    return rows(3)


def breaks_after_a_row():
    yield {"row": 0}
    raise RuntimeError("CUDA out of memory")


def kills_itself():
    yield {"row": 0}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(600)
    yield {}


def a_row_and_silence():
    yield {"row": 0}
    time.sleep(600)


def rows_and_a_child(pid_file):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pid_file.write_text(str(child.pid))
    yield {"row": 0}
    time.sleep(600)


def row_of_no_json():
    yield {"row": object()}

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gradaug_hf.utils.processes import run_to_end
from tests.helpers.small_training import start, status_of

# A launcher that a signal ends at once, and a training that writes a checkpoint first.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())"
TRAINING = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def write(number, frame):
    time.sleep(0.5)
    (folder / "checkpoint").write_text(signal.Signals(number).name)
    sys.exit(128 + number)
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, write)
(folder / "started").touch()
while True:
    time.sleep(0.01)
"""


def run(words: list[str], log: Path) -> int:
    """Run a command in a process that is to be signalled, and give the id of that."""

    def run_and_exit() -> None:
        os.setsid()
        with open(log, "w") as file:
            sys.exit(run_to_end(words, file))

    return start(run_and_exit)


def wait_for(file: Path) -> None:
    until = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < until, f"{file} was not written"
        time.sleep(0.01)


def test_a_command_ends_with_its_code_and_its_log(tmp_path):
    assert status_of(run([sys.executable, "-c", "print(1); raise SystemExit(3)"], tmp_path / "log")) == 3
    assert (tmp_path / "log").read_text() == "1\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_to_one_process_ends_it_once_all_that_it_started_have_ended(tmp_path, number, status):
    (tmp_path / "training.py").write_text(TRAINING)
    words = [sys.executable, "-c", LAUNCHER, str(tmp_path / "training.py"), str(tmp_path)]
    pid = run(words, tmp_path / "log")
    wait_for(tmp_path / "started")
    os.kill(pid, number)
    assert status_of(pid) == status
    assert (tmp_path / "checkpoint").read_text() == number.name


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        ends = [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP); print(2)"]
        assert status_of(run(ends, tmp_path / "log")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)

"""Commands that are run to their end, also where a signal ends them."""

import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def run_to_end(words: Sequence[str], log: IO[str]) -> int:
    """Run a command and return its exit code.

    A signal that comes meanwhile goes on to the command and to what it has started. It ends this process once all of
    them are over: a training writes a checkpoint first, for which its launcher does not wait.

    Args:
        words: the command.
        log: file that takes what it prints.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: after SIGHUP or SIGTERM, with the status that shells give.
    """
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            _send(process, number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    reader, writer = os.pipe()  # all that run have its reading end as their standard input
    try:
        with open(reader) as stdin:
            process = subprocess.Popen(
                words, stdin=stdin, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        for number in received:  # before it had started
            _send(process, number)
        code = process.wait()
        if received:
            _wait_for_readers(writer)
    finally:
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
    return code


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # all are over
        os.killpg(process.pid, number)


def _wait_for_readers(writer: int) -> None:
    """Wait until nobody holds the reading end of a pipe."""
    poll = select.poll()
    poll.register(writer, 0)  # that there are no readers is always reported
    poll.poll()

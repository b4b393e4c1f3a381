"""Command lines that answer what is wrong in one line."""

import json
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from gradaug_hf.utils.launch import process_state

RED, PLAIN = "\033[1;31m", "\033[0m"


class BriefParser(ArgumentParser):
    """Parse flags, and answer a wrong one in one line with the flag nearest to it, without all others."""

    elsewhere: Mapping[str, str] = {}  # flags of sibling commands, with what to do instead

    def parse_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None) -> Namespace:
        """Parse flags, and end the process if one is not known or its value has a wrong type."""
        found, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return found

    def refuse(self, unknown: Sequence[str]) -> None:
        """End the process if there are words that no flag takes."""
        if not unknown:
            return
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            self.error(f"{' '.join(unknown)} follows no flag that takes it")
        if flags[0] in self.elsewhere:
            self.error(f"{flags[0]} is no flag of this command: {self.elsewhere[flags[0]]}")
        near = get_close_matches(flags[0], self._option_string_actions, n=1)
        self.error(f"{flags[0]} is no flag; " + (f"near it: {near[0]}" if near else "--help lists them"))

    def error(self, message: str) -> NoReturn:
        """End the process with one line."""
        line = marked(f"error: {message}")
        tell_launcher(line)
        self.exit(2, f"{line}\n" if is_first_process() else None)


@contextmanager
def errors_as_messages(*kinds: type[Exception], of_one_process: bool = False) -> Iterator[None]:
    """End the process with the message of an error that the user can do something about, without a trace.

    Args:
        kinds: of errors that are such; others are raised.
        of_one_process: whether a process may be the only one with the error, so that each says its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except kinds as error:
        line = marked(f"error: {error}")
        tell_launcher(line)
        speaks = of_one_process or process_state().is_main_process
        raise SystemExit(line if speaks else 1) from error


def tell_launcher(line: str) -> None:
    """Write why this process ends to the file from which torch's launcher takes the last of the lines that it prints.

    So the reason is shown even if the launcher, as another process has ended, ends the one that was to print it.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def is_first_process() -> bool:
    """Return whether this process is alone or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def marked(line: str) -> str:
    """Return a line in red for a terminal, where it has to be found among those that a launcher adds."""
    return f"{RED}{line}{PLAIN}" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else line

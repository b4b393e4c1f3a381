"""A process that cannot import gradaug_hf, and has imported timm and transformers once for all that its forks run."""

import json
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, traceback
sys.modules["gradaug_hf"] = None
import timm, torch
from transformers import AutoModelForImageClassification, pipeline
for line in sys.stdin:
    code, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print("\\0", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Elsewhere:
    """Runs code where gradaug_hf is not installed, each time in a fork of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, *arguments: str | Path) -> str:
        """What the code prints, which finds the arguments in `sys.argv`."""
        self.process.stdin.write(json.dumps([code, [*map(str, arguments)]]) + "\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line.startswith("\0"):
                assert line == "\0 0\n", "the code failed: its error was printed"
                return "".join(lines)
            lines.append(line)
        raise RuntimeError("the process without gradaug_hf has ended")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

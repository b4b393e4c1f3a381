"""Versions, device and command of a run, as they may be shown to others."""

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from gradaug_hf.version import __version__

VERSIONS_OF = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets")
# A path of this machine: absolute, or up from the working folder. Neither a URL nor a Hub id is one.
MACHINE_PATH = re.compile(r"""(?<![\w.:/~-])(?:~|\.\.)?/[^\s"',\]}]*""")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that it stands on."""
    return {
        "python": platform.python_version(),
        "gradaug_hf": __version__,
        **{name: version(name) for name in VERSIONS_OF},
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() or "CPU"


def launched_script() -> list[str] | None:
    """Return this process's script and its arguments; None in a notebook and in an interactive session."""
    return sys.argv if hasattr(sys.modules["__main__"], "__file__") else None


def public_command(argv: Sequence[str]) -> str:
    """Return a command line without secrets and without the folders of this machine.

    Args:
        argv: script and arguments. Of a path that is absolute or leads out of the working folder only its last part
            is kept; a flag whose name ends in `token` is left out with its value.
    """
    words, is_secret = [], False
    for word in argv:
        is_flag = word.startswith("--")
        if is_secret and not is_flag:
            is_secret = False
            continue
        is_secret = is_flag and word.lower().endswith("token")
        if not (is_secret or (is_flag and word.partition("=")[0].lower().endswith("token"))):
            word = MACHINE_PATH.sub(lambda path: Path(path[0]).name, word)
            words.append(TOKEN.sub("hf_...", word))
    return shlex.join(words)

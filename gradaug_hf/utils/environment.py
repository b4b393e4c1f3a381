"""Versions, device and command of a run, as they may be shown to others."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
        argv: script and arguments. Paths become those of `public_text`; a flag whose name ends in `token` is left out
            with its value.
    """
    words, is_secret = [], False
    for word in argv:
        is_flag = word.startswith("--")
        if is_secret and not is_flag:
            is_secret = False
            continue
        is_secret = is_flag and word.lower().endswith("token")
        if not (is_secret or (is_flag and word.partition("=")[0].lower().endswith("token"))):
            words.append(public_text(word))
    return shlex.join(words)


def public_text(text: str) -> str:
    """Return a text without tokens and without the folders of this machine.

    A path below the working folder becomes relative to it; of one that is elsewhere only the last part is kept.
    """
    if text.startswith(("/", "~/", "../")):
        return TOKEN.sub("hf_...", _public_path(text))
    return TOKEN.sub("hf_...", MACHINE_PATH.sub(lambda path: _public_path(path[0]), text))


def public_settings(value: Any) -> Any:
    """Return settings, which may be nested, with texts as `public_text` gives them."""
    if type(value) is str:
        return public_text(value)
    if isinstance(value, Mapping):
        return {name: public_settings(each) for name, each in value.items()}
    return [public_settings(each) for each in value] if isinstance(value, (list, tuple)) else value


def _public_path(path: str) -> str:
    place, here = Path(os.path.abspath(Path(path).expanduser())), Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) else place.name

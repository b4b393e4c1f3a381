"""A process that never imports gradaug_hf, in which extracted sub-networks must run."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

LOOP = """
import sys
import torch
for folder in map(str.strip, sys.stdin):
    saved = torch.load(folder + "/subnet.pt", weights_only=False)
    with torch.no_grad():
        torch.save(saved["network"](saved["images"]), folder + "/output.pt")
    print("imported gradaug_hf" if "gradaug_hf" in sys.modules else "done", flush=True)
"""


class Outside:
    """Runs networks in a process of their own.

    Args:
        folder: where networks and outputs are exchanged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """The output of a network as the other process, which knows it only from a file, computes it."""
        torch.save({"network": network, "images": images}, self.folder / "subnet.pt")
        self.process.stdin.write(f"{self.folder}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        (self.folder / "subnet.pt").unlink()
        if answer != "done":
            raise RuntimeError(answer or "the network does not run in a process without gradaug_hf")
        return torch.load(self.folder / "output.pt")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

"""Running means of the losses and the sub-networks of a training, for the log."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradaug_hf.objective.objective import Pass


class RunningMeans:
    """Means of named values since they were last taken; tensors stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor | float) -> None:
        """Count one more value of each name."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_passes(self, passes: Sequence[Pass], side: int, num_blocks: int) -> None:
        """Count the losses and the sub-networks of a batch."""
        full, *others = passes
        self.add(loss_full=full.loss.detach())
        if others:
            self.add(loss_subnets=sum(p.loss.detach() for p in others))
        for p in others:
            self.add(subnet_width=p.subnet.width, subnet_resolution=p.subnet.resolution or side)
            if num_blocks:
                self.add(subnet_depth=1 - len(p.dropped) / num_blocks)

    def take(self) -> dict[str, Tensor | float]:
        """Return the means, and start counting again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state(self) -> dict[str, list[Any]]:
        """Return the sum, its dtype if it is a tensor, and the count of each name, for JSON and `load`."""
        return {
            name: [
                float(total),
                str(total.dtype).removeprefix("torch.") if isinstance(total, Tensor) else None,
                self._counts[name],
            ]
            for name, total in self._sums.items()
        }

    def load(self, state: dict[str, list[Any]], device: torch.device) -> None:
        """Go on counting from a `state`."""
        for name, (total, dtype, count) in state.items():
            tensor = None if dtype is None else torch.tensor(total, dtype=getattr(torch, dtype), device=device)
            self._sums[name] = total if tensor is None else tensor
            self._counts[name] = count

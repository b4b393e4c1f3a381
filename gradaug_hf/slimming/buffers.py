"""Keep the buffers of a model as they are through a sub-network's pass, whatever writes to them.

What a trace saw written are a sub-network's own (`patching.py`). This is for the rest: code that writes in some steps
only, or goes around the attributes of its module. A copy of each buffer is made once, and again only after the full
model has written to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BufferCopy(NamedTuple):
    """Hold a copy of a buffer.

    Args:
        source: the full model's buffer.
        value: the copy, or what a sub-network's forward has put in its place.
        version: how often the source had been written to when it was copied.
    """

    source: Tensor
    value: Any
    version: int

    def is_of(self, source: Tensor) -> bool:
        """Return True unless the full model's buffer is another one, or was written to, since it was copied."""
        return torch.compiler.is_compiling() or (self.source is source and self.version == version_of(source))


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, or 0 where nobody counts (compiled code, inference mode)."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


@dataclass(eq=False)
class BufferGuard:
    """Restore the buffers of a model after a sub-network's pass.

    Args:
        modules: those with buffers other than the statistics of batch norms, which a sub-network never writes.
        saved: the copies, by the identity of the buffers.
    """

    modules: list[nn.Module]
    saved: dict[int, BufferCopy] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "BufferGuard":
        return cls([module for module in model.modules() if module._buffers and not isinstance(module, _BatchNorm)])

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules, "saved": {}}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give every buffer its object and its values back when the context ends."""
        before = [(module._buffers, name, self._save(buffer)) for module, name, buffer in self._buffers()]
        self.saved = {id(saved.source): saved for _, _, saved in before}
        try:
            yield
        finally:
            for buffers, name, saved in before:
                buffers[name] = saved.source
                if not saved.is_of(saved.source):
                    with torch.no_grad():
                        saved.source.copy_(saved.value)

    def _buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module in self.modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    yield module, name, buffer

    def _save(self, buffer: Tensor) -> BufferCopy:
        saved = self.saved.get(id(buffer))
        if saved is None or not saved.is_of(buffer):
            saved = BufferCopy(buffer, buffer.detach().clone(), version_of(buffer))
        return saved

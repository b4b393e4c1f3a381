"""Report which layers of a model are sliced, and why the others are not."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from torch import nn

from gradaug_hf.slimming.analysis.axes import Unit, iter_units
from gradaug_hf.slimming.analysis.planning import Plan
from gradaug_hf.slimming.analysis.tracing import Axes
from gradaug_hf.slimming.patterns import Pattern, Width, is_sliced, pattern_size


@dataclass(frozen=True)
class TiedUnit:
    """Name channels that are kept or left out together.

    Args:
        size: number of channels at full width.
        members: the parameters whose dimensions they are, as "name[dimension]".
    """

    size: int
    members: tuple[str, ...]


@dataclass
class SlicingReport:
    """Say which layers `make_slimmable` found to slice; printing it gives a table.

    Args:
        units: tied channels, in the order of the model.
        refused: layer that is not sliced at all -> reason in plain words.
        products: (layer, patterns) of each operation with multiply-adds; their number is the product of the sizes.
        parameters: name -> patterns of each parameter.
        batch: images in the traced batch, by which multiply-adds are divided.

    Examples:
        >>> report = slicing_report(make_slimmable(model))
        >>> report.macs(width=0.5) < report.macs()
        True
    """

    units: list[TiedUnit] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    products: list[tuple[str, tuple[Pattern, ...]]] = field(default_factory=list)
    parameters: dict[str, tuple[Pattern, ...]] = field(default_factory=dict)
    batch: int = 1

    def macs(self, width: float = 1.0, divisor: int = 1) -> int:
        """Return the multiply-adds for one image at a width multiplier."""
        return sum(_count(patterns, Width(width, divisor)) for _, patterns in self.products) // self.batch

    def params(self, width: float = 1.0, divisor: int = 1) -> int:
        """Return the number of parameters at a width multiplier."""
        return sum(_count(patterns, Width(width, divisor)) for patterns in self.parameters.values())

    @property
    def sliced_macs(self) -> float:
        """Return the share of the multiply-adds in operations that shrink with the width, 0..1."""
        return _sliced_share([patterns for _, patterns in self.products])

    @property
    def sliced_params(self) -> float:
        """Return the share of the parameters in tensors that shrink with the width, 0..1."""
        return _sliced_share(list(self.parameters.values()))

    def __str__(self) -> str:
        lines = [
            f"sliced: {self.sliced_macs:.1%} of the multiply-adds, {self.sliced_params:.1%} of the parameters",
            f"full width: {self.macs():,} multiply-adds, {self.params():,} parameters",
            "",
            f"{'tied channels':>13}  members",
            *(f"{unit.size:>13}  {_shorten(unit.members)}" for unit in self.units),
        ]
        if self.refused:
            lines += ["", "at full width:", *(f"  {layer}: {reason}" for layer, reason in self.refused.items())]
        return "\n".join(lines)


def make_report(network: nn.Module, plan: Plan, batch: int) -> SlicingReport:
    """Describe a plan."""
    trace = plan.trace
    stored = {f"{module}.{name}" if module else name: axes for (module, name), axes in trace.stored.items()}
    axes = {name: stored[name] for name, _ in network.named_parameters()}
    parameters = {name: plan.patterns(own) for name, own in axes.items()}
    members: dict[Unit, list[str]] = {}
    for name, own in axes.items():
        for dim, axis in enumerate(own):
            for unit in plan.sliced_units([axis]):
                members.setdefault(unit, []).append(f"{name}[{dim}]")
    return SlicingReport(
        units=[TiedUnit(unit.size, tuple(names)) for unit, names in members.items()],
        refused=_refused(network, axes, parameters),
        products=[(product.module_name, plan.patterns(product.axes)) for product in trace.products],
        parameters=parameters,
        batch=batch,
    )


def _refused(network: nn.Module, axes: dict[str, Axes], parameters: dict[str, tuple[Pattern, ...]]) -> dict[str, str]:
    refused: dict[str, str] = {}
    for module_name, module in network.named_modules():
        own = [name for name, _ in module.named_parameters(module_name, recurse=False) if name in parameters]
        if own and not any(is_sliced(pattern) for name in own for pattern in parameters[name]):
            reasons = (unit.reason for unit in iter_units(axis for name in own for axis in axes[name]))
            refused[module_name] = next(filter(None, reasons), "its dimensions are no channels")
    return refused


def _count(patterns: Iterable[Pattern], width: Width) -> int:
    return prod(pattern_size(pattern, width) for pattern in patterns)


def _sliced_share(items: list[tuple[Pattern, ...]]) -> float:
    full = Width()
    total = sum(_count(patterns, full) for patterns in items)
    return sum(_count(patterns, full) for patterns in items if any(map(is_sliced, patterns))) / max(total, 1)


def _shorten(names: tuple[str, ...], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")

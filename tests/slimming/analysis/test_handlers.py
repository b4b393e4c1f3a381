"""Zero-padded channels: followed where they are the first channels of the result, whole anywhere else."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaug_hf
from tests.helpers.oracle import kept_entries, relative_error, zeroed

NARROW, WIDE = 10, 23


class Padded(nn.Module):
    """A residual network whose shortcut is padded to the channels of its residual."""

    def __init__(self, pad: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.pad = pad
        self.stem, self.bn = nn.Conv2d(3, NARROW, 3), nn.BatchNorm2d(NARROW)
        self.inner, self.residual = nn.Conv2d(NARROW, 16, 1), nn.Conv2d(16, WIDE, 1)
        self.head = nn.Linear(WIDE, 5)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.bn(self.stem(x))
        residual = self.residual(self.inner(shortcut).relu())
        return self.head((residual + self.pad(shortcut, residual.size(1))).mean((2, 3)))


def behind(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.size(1)))


def in_front(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, channels - x.size(1), 0))


def with_ones(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.size(1)), value=1)


def behind_two_pieces(x: Tensor, channels: int) -> Tensor:
    return behind(torch.cat([x, x], 1), channels)


def behind_two_groups(x: Tensor, channels: int) -> Tensor:
    return behind(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), channels)


def by_a_constant(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, WIDE - NARROW))


def slimmable_with_oracle(pad: Callable[[Tensor, int], Tensor], width: float) -> tuple[nn.Module, Tensor, Tensor]:
    """The slimmable network, its output at a width, and that of the full network with left-out channels zeroed."""
    torch.manual_seed(0)
    network = Padded(pad).double().eval()
    for tensor in (network.bn.weight, network.bn.bias, network.bn.running_mean):
        nn.init.normal_(tensor)
    model = gradaug_hf.make_slimmable(copy.deepcopy(network), input_size=6)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad(), gradaug_hf.at_width(model, width):
        return model, model(x), zeroed(network, kept_entries(model, width))(x)


@pytest.mark.parametrize("width", [0.3, 0.5, 0.8, 0.95])
def test_zeros_behind_the_channels_are_padded_to_the_kept_ones_of_the_result(width: float):
    model, output, expected = slimmable_with_oracle(behind, width)
    assert gradaug_hf.slicing_report(model).sliced_macs == 1
    assert relative_error(output, expected) < 1e-12


def test_padded_channels_and_those_padded_to_are_rounded_each_for_itself():
    model, _, _ = slimmable_with_oracle(behind, 0.5)
    subnet = gradaug_hf.extract_subnet(model, 0.75)
    assert subnet.stem.out_channels == 8  # 7.5
    assert subnet.residual.out_channels == 17  # 17.25
    assert subnet.head.in_features == 17


@pytest.mark.parametrize(
    ("pad", "reason"),
    [
        (in_front, "padded in front by constant_pad_nd"),
        (with_ones, "padded with a number by constant_pad_nd"),
        (behind_two_pieces, "padded behind several pieces by constant_pad_nd"),
        (behind_two_groups, "padded behind several pieces by constant_pad_nd"),
    ],
)
def test_channels_padded_in_another_way_stay_whole(pad: Callable[[Tensor, int], Tensor], reason: str):
    model, output, expected = slimmable_with_oracle(pad, 0.5)
    report = gradaug_hf.slicing_report(model)
    assert reason in report.refused["stem"]
    assert [unit.size for unit in report.units] == [16]
    assert relative_error(output, expected) < 1e-12


def test_channels_padded_by_a_constant_number_stay_whole():
    model, output, expected = slimmable_with_oracle(by_a_constant, 0.5)
    assert "a narrower model does not run" in gradaug_hf.slicing_report(model).refused["stem"]
    assert relative_error(output, expected) < 1e-12


def test_padding_of_space_leaves_the_channels_sliced():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConstantPad2d((1, 0, 0, 2), 0.5), nn.Conv2d(8, 5, 3), nn.Flatten())
    report = gradaug_hf.slicing_report(gradaug_hf.make_slimmable(network, input_size=6))
    assert [unit.size for unit in report.units] == [8]

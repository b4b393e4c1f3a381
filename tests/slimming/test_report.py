import pytest
import timm
import torch
from torch import nn

import gradaug_hf


class Tiny(nn.Module):
    """Two convolutions with a residual sum, counted by hand below."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def test_counts_agree_with_counting_by_hand():
    report = gradaug_hf.slicing_report(gradaug_hf.make_slimmable(Tiny(), input_size=4))
    assert report.macs() == 16 * (8 * 3 * 9 + 8 * 8 * 9) + 8 * 5
    assert report.macs(0.5) == 16 * (4 * 3 * 9 + 4 * 4 * 9) + 4 * 5
    assert report.params() == 8 * 3 * 9 + 8 + 8 * 8 * 9 + 8 * 5 + 5
    assert report.params(0.5) == 4 * 3 * 9 + 4 + 4 * 4 * 9 + 4 * 5 + 5
    assert report.sliced_macs == 1
    assert report.sliced_params == pytest.approx(1 - 5 / report.params())  # all but the classifier's bias


def test_tied_channels_are_listed_with_their_members():
    report = gradaug_hf.slicing_report(gradaug_hf.make_slimmable(Tiny(), input_size=4))
    (unit,) = report.units
    assert unit.size == 8
    members = ("stem.weight[0]", "stem.bias[0]", "block.weight[0]", "block.weight[1]", "head.weight[1]")
    assert sorted(unit.members) == sorted(members)


def test_multiply_adds_of_resnet50_are_the_published_4_1_billion():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    report = gradaug_hf.slicing_report(gradaug_hf.make_slimmable(model))
    assert report.macs() == pytest.approx(4.1e9, rel=0.01)
    assert report.params() == 25_557_032


def test_printing_shows_shares_units_and_reasons():
    printed = str(gradaug_hf.slicing_report(gradaug_hf.make_slimmable(Tiny(), input_size=4)))
    assert "sliced: 100.0% of the multiply-adds" in printed
    assert "stem.weight[0]" in printed

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.colors import to_rgb

from gradaug_hf.objective.sampling import Part, Subnet
from gradaug_hf.objective.transforms import RandomQuarterTurn, transform_for_subnet
from gradaug_hf.reports.history import evaluations
from gradaug_hf.reports.plots import (
    NEEDS_MATPLOTLIB,
    SeenBatch,
    batch_figure,
    can_plot,
    plot_training,
    training_figure,
    widths_figure,
)

HISTORY = [
    {"loss": 2.5, "loss_full": 2.25, "loss_subnets": 0.25, "epoch": 1.0, "step": 5},
    {"eval_loss": 2.0, "eval_top1": 0.25, "eval_top5": 0.75, "epoch": 1.0, "step": 5},
    {"loss": 1.5, "loss_full": 1.375, "loss_subnets": 0.125, "epoch": 2.0, "step": 10},
    {"eval_loss": 1.75, "eval_top1": 0.5, "eval_top5": 1.0, "epoch": 2.0, "step": 10},
    {"eval_width0.5_loss": 2.0, "eval_width0.5_top1": 0.375, "eval_width0.5_top5": 0.875, "epoch": 2.0, "step": 10},
]
BATCH = SeenBatch(torch.rand(9, 3, 32, 32), [Subnet(0.75, 24), Subnet(0.5, 28)])


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}


def test_curves_show_the_parts_of_the_loss_and_the_accuracies_over_the_epochs():
    losses, accuracies = training_figure(HISTORY, evaluations(HISTORY)).axes
    assert lines(losses) == {
        "whole objective": [(1, 2.5), (2, 1.5)],
        "full network": [(1, 2.25), (2, 1.375)],
        "sub-networks": [(1, 0.25), (2, 0.125)],
        "evaluation": [(1, 2.0), (2, 1.75)],
    }
    assert lines(accuracies) == {"top-1 accuracy": [(1, 25), (2, 50)], "top-5 accuracy": [(1, 75), (2, 100)]}


def test_curves_of_a_plain_training_without_evaluation_are_its_loss():
    (losses,) = training_figure([{"loss": 2.0, "epoch": 0.5, "step": 1}], []).axes
    assert lines(losses) == {"training": [(0.5, 2.0)]}


def test_curves_of_several_evaluation_sets_are_named_after_them():
    history = [
        {f"eval_{name}_loss": 1.0, f"eval_{name}_top1": 0.5, "epoch": 1.0, "step": 5} for name in ("day", "night")
    ]
    losses, accuracies = training_figure(history, evaluations(history, ["day", "night"])).axes
    assert list(lines(losses)) == ["evaluation, day", "evaluation, night"]
    assert list(lines(accuracies)) == ["top-1 accuracy, day", "top-1 accuracy, night"]


def test_accuracy_is_plotted_against_width():
    measured = [e for e in evaluations(HISTORY) if e.step == 10]
    (axes,) = widths_figure(measured).axes
    assert lines(axes) == {"top-1 accuracy": [(0.5, 37.5), (1, 50)], "top-5 accuracy": [(0.5, 87.5), (1, 100)]}


def test_lines_are_told_apart_without_colour():
    for axes in training_figure(HISTORY, evaluations(HISTORY)).axes:
        looks = [(line.get_linestyle(), line.get_marker(), line.get_color()) for line in axes.lines]
        for look in zip(*looks, strict=True):
            assert len(set(look)) == len(looks)
        assert all(len(set(to_rgb(colour))) == 1 for _, _, colour in looks)


def test_each_row_shows_the_images_of_a_pass_at_their_resolution():
    full, first, second = batch_figure(BATCH).axes
    assert [axes.get_title(loc="left") for axes in (full, first, second)] == [
        "full network: width 1, 32×32 pixels",
        "sub-network: width 0.75, 24×24 pixels",
        "sub-network: width 0.5, 28×28 pixels",
    ]
    for axes, side in (full, 32), (first, 24), (second, 28):
        assert len(axes.images) == 8
        assert all(image.get_array().shape == (side, side, 3) for image in axes.images)
        left, right, bottom, top = axes.images[0].get_extent()
        assert (right - left, bottom - top) == (side, side)
    low, high = BATCH.images[:8].min(), BATCH.images[:8].max()
    seen = (transform_for_subnet(BATCH.images[:8], BATCH.subnets[0]) - low) / (high - low)
    shown = torch.tensor(np.asarray(first.images[3].get_array()))
    torch.testing.assert_close(shown, seen[3].permute(1, 2, 0))


def test_rows_show_what_a_transform_did_and_how_many_blocks_were_dropped():
    subnet = Subnet(resolution=32, seed=2, survival=0.5)
    batch = SeenBatch(torch.rand(2, 1, 32, 32), [subnet], RandomQuarterTurn(), num_blocks=6)
    _, row = batch_figure(batch).axes
    dropped = len(subnet.dropped_blocks(6))
    assert row.get_title(loc="left") == f"sub-network: width 1, 32×32 pixels, {dropped} of 6 blocks dropped"
    turned = transform_for_subnet(batch.images, subnet, RandomQuarterTurn())[0, 0]
    shown = torch.tensor(np.asarray(row.images[0].get_array()))
    torch.testing.assert_close(shown, (turned - batch.images.min()) / (batch.images.max() - batch.images.min()))


def test_only_what_was_measured_is_plotted(tmp_path):
    def names(files: list[Path]) -> list[str]:
        assert all(PIL.Image.open(file).format == "PNG" for file in files)
        return [file.name for file in files]

    full = HISTORY[:4]
    assert names(plot_training([], [], None, tmp_path)) == []
    assert names(plot_training(full, evaluations(full), None, tmp_path)) == ["curves.png"]
    everything = plot_training(HISTORY, evaluations(HISTORY), BATCH, tmp_path / "new")
    assert names(everything) == ["curves.png", "widths.png", "subnets.png"]


def test_without_matplotlib_one_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not can_plot()
    with pytest.raises(ModuleNotFoundError, match=NEEDS_MATPLOTLIB):
        plot_training(HISTORY, evaluations(HISTORY), BATCH, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_titles_say_which_share_of_the_batch_and_of_the_patches_was_seen():
    subnet = Subnet(0.5, 16, part=Part(0, 1 / 3, seed=1), tokens=0.4)
    _, row = batch_figure(replace(BATCH, subnets=[subnet])).axes
    assert row.get_title(loc="left") == "sub-network: width 0.5, 16×16 pixels, 33% of the batch, 40% of the patches"

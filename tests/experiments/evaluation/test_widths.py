import time

import torch
from torch import nn

from gradaug_hf.experiments.evaluation import widths
from gradaug_hf.experiments.evaluation.widths import WidthResult, cpu_latency, plot_widths, widths_side_by_side
from tests.helpers.pictures import pixels_of_each_grey

RESULTS = {
    "plain": {
        1.0: WidthResult(0.9, 1.0, 2_000_000, 30_000, 1.25, 0.1),
        0.5: WidthResult(0.3, 0.8, 500_000, 8_000, 0.5, 0.0),
    },
    "gradaug": {
        1.0: WidthResult(0.8, 1.0, 2_000_000, 30_000, 1.25, 0.0),
        0.5: WidthResult(0.7, 0.9, 500_000, 8_000, 0.5, 0.0),
    },
}


class Waits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, 3, 8, 8)
        assert torch.get_num_threads() == 1
        time.sleep(0.01)
        start = time.thread_time()
        while time.thread_time() < start + 0.02:
            pass
        return x


def test_latency_is_the_computing_time_of_one_image_on_one_thread_in_milliseconds(monkeypatch):
    monkeypatch.setattr(widths, "TIMED", 0.1)
    latency, spread = cpu_latency(Waits().eval(), 8)
    assert 20 <= latency < 30
    assert spread >= 0


def test_table_has_the_models_of_a_width_below_each_other():
    assert widths_side_by_side(RESULTS).splitlines() == [
        "| model   | width | top-1 % | top-5 % | multiply-adds (M) | parameters (k) | ms per image |",
        "|---------|------:|--------:|--------:|------------------:|---------------:|-------------:|",
        "| plain   |     1 |   90.00 |  100.00 |              2.00 |           30.0 |  1.25 ± 0.10 |",
        "| gradaug |     1 |   80.00 |  100.00 |              2.00 |           30.0 |  1.25 ± 0.00 |",
        "| plain   |   0.5 |   30.00 |   80.00 |              0.50 |            8.0 |  0.50 ± 0.00 |",
        "| gradaug |   0.5 |   70.00 |   90.00 |              0.50 |            8.0 |  0.50 ± 0.00 |",
    ]


def test_plot_needs_no_colour(tmp_path):
    plot_widths(RESULTS, tmp_path / "plot.png", "two networks")
    strokes = pixels_of_each_grey(tmp_path / "plot.png")
    assert min(strokes[0], strokes[153]) > 1000


def test_one_network_and_one_width_are_plotted(tmp_path):
    plot_widths({"plain": {1.0: RESULTS["plain"][1.0]}}, tmp_path / "plot.png", "one network")
    assert (tmp_path / "plot.png").stat().st_size > 1000

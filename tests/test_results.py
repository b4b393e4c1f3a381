import json
import sys

import numpy as np
import PIL.Image
import torch

from gradaug_hf.results import Result, plot_curves, results_table, save_results

PLAIN = Result("plain", 0.87654, 0.99, 160, 12.34, 800.4, [(80, 0.5), (160, 0.87654)])
GRADAUG = Result("gradaug", 0.9, 1.0, 160, 34.0, 812.6, [(80, 0.4), (160, 0.9)])


def test_table_has_one_row_for_each_run():
    assert results_table([PLAIN, GRADAUG]).splitlines() == [
        "| method  | top-1 % | top-5 % | steps | seconds | peak memory MiB |",
        "|---------|--------:|--------:|------:|--------:|----------------:|",
        "| plain   |   87.65 |   99.00 |   160 |    12.3 |             800 |",
        "| gradaug |   90.00 |  100.00 |   160 |    34.0 |             813 |",
    ]


def test_json_holds_results_settings_command_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--seed", "3"])
    file = tmp_path / "results.json"
    save_results([PLAIN, GRADAUG], file, {"seed": 3}, torch.device("cpu"))
    content = json.loads(file.read_text())
    assert [run["method"] for run in content["runs"]] == ["plain", "gradaug"]
    assert content["runs"][0]["top1"] == 0.87654
    assert content["runs"][1]["curve"] == [[80, 0.4], [160, 0.9]]
    assert content["settings"] == {"seed": 3}
    assert content["command"] == "recipe.py --seed 3"
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]


def test_plot_draws_each_curve_in_a_lightness_of_its_own(tmp_path):
    file = tmp_path / "curves.png"
    plot_curves([PLAIN, GRADAUG], file, "two runs")
    with PIL.Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] >= 480
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    shades, counts = np.unique(pixels[..., 0], return_counts=True)
    strokes = dict(zip(shades.tolist(), counts.tolist(), strict=True))
    assert strokes[0] > 1000
    assert strokes[153] > 1000

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from gradaug_hf.cli import main
from gradaug_hf.experiments.results import load_runs, results_table, save_results
from gradaug_hf.reports.runs import Result

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


def finished(folder: Path, result: Result, seed: int, model: str = "net") -> str:
    folder.mkdir()
    settings = {"model": model, "dataset_name": "some/set", "seed": seed}
    save_results([result], folder / "results.json", settings, torch.device("cpu"))
    return str(folder)


def test_runs_that_differ_in_their_seed_become_a_mean_and_a_deviation(tmp_path, capsys):
    folders = [
        finished(tmp_path / "a", replace(PLAIN, top1=0.5, top5=0.9, seconds=10.0), seed=0),
        finished(tmp_path / "b", GRADAUG, seed=0),
        finished(tmp_path / "c", replace(PLAIN, top1=0.6, top5=0.9, seconds=12.0), seed=1),
        finished(tmp_path / "d", replace(PLAIN, steps=320), seed=0),
    ]
    main(["results", *folders, "--plot", str(tmp_path / "all.png")])
    assert capsys.readouterr().out.splitlines()[:5] == [
        "| method  | model | data     | steps | seeds |      top-1 % |      top-5 % |    seconds | peak memory MiB |",
        "|---------|-------|----------|------:|------:|-------------:|-------------:|-----------:|----------------:|",
        # 100 * sqrt((0.05**2 + 0.05**2) / (2 - 1)) = 7.07
        "| plain   | net   | some/set |   160 |     2 | 55.00 ± 7.07 | 90.00 ± 0.00 | 11.0 ± 1.4 |             800 |",
        "| gradaug | net   | some/set |   160 |     1 |        90.00 |       100.00 |       34.0 |             813 |",
        "| plain   | net   | some/set |   320 |     1 |        87.65 |        99.00 |       12.3 |             800 |",
    ]
    with PIL.Image.open(tmp_path / "all.png") as image:
        assert image.format == "PNG"


def test_what_was_saved_is_read_again(tmp_path):
    result = replace(GRADAUG, widths=[(0.9, 0.5, 0.75)])
    (run,) = load_runs(Path(finished(tmp_path / "a", result, seed=7)))
    assert (run.model, run.data, run.seed) == ("net", "some/set", 7)
    assert run.result == replace(result, curve=[[80, 0.4], [160, 0.9]], widths=[[0.9, 0.5, 0.75]])


def test_results_without_widths_of_the_quickstart_can_be_read(tmp_path):
    content = {"settings": {"model": "wrn16_2", "dataset_name": None, "seed": 0}, "runs": []}
    for method in ("plain", "gradaug"):
        run = {"method": method, "top1": 0.5, "top5": 1.0, "steps": 9, "seconds": 1.0, "peak_memory": 1.0, "curve": []}
        content["runs"].append(run)
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert [run.result.method for run in load_runs(tmp_path)] == ["plain", "gradaug"]
    assert {run.data for run in load_runs(tmp_path)} == {"handwritten digits"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "does not hold the results of a run"),
        ('{"settings": {}, "runs": []}', "does not hold the results of a run: KeyError('model')"),
        ('{"settings": {"model": "m", "dataset_name": "d", "seed": 0}, "runs": [{}]}', "missing 7 required"),
    ],
)
def test_folder_without_results_ends_in_one_message(tmp_path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        main(["results", str(tmp_path)])


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folders = [finished(tmp_path / name, PLAIN, seed=3) for name in ("a", "b")]
    with pytest.raises(SystemExit, match="are both of method 'plain', net, 160 steps and seed 3"):
        main(["results", *folders])

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from gradaug_hf.cli import main
from gradaug_hf.experiments.results import check_free, load_runs, results_table, save_results, widths_table
from gradaug_hf.reports import plots
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


def finished(folder: Path, result: Result, seed: int, model: str = "net", data: str = "some/set") -> str:
    folder.mkdir()
    settings = {"model": model, "dataset_name": data, "seed": seed}
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


def test_runs_on_two_datasets_stand_in_two_panels(tmp_path, monkeypatch, capsys):
    plotted = []
    monkeypatch.setattr(plots, "plot_spreads", lambda *given: plotted.append(given))
    folders = [
        finished(tmp_path / "a", PLAIN, seed=0),
        finished(tmp_path / "b", GRADAUG, seed=0),
        finished(tmp_path / "c", replace(PLAIN, top1=0.25), seed=0, data="other/set"),
    ]
    main(["results", *folders, "--plot", str(tmp_path / "all.png")])
    ((labels, panels, _),) = plotted
    assert labels == ["plain, net, 160 steps", "gradaug, net, 160 steps"]
    assert panels == {"some/set": [[0.87654], [0.9]], "other/set": [[0.25], []]}


def test_top5_of_few_classes_is_a_dash(tmp_path, capsys):
    few = replace(PLAIN, top5=None, widths=[(0.9, 0.5, None)])
    assert "|       - |" in results_table([few])
    main(["results", finished(tmp_path / "a", few, seed=0), "--plot", str(tmp_path / "all.png")])
    assert "|       - |" in capsys.readouterr().out
    assert load_runs(tmp_path / "a")[0].result.top5 is None
    assert "| 0.9 |" not in widths_table(few.widths) and "|   50.00 |       - |" in widths_table(few.widths)


def test_results_of_another_run_are_not_written_over(tmp_path):
    folder = finished(tmp_path / "a", PLAIN, seed=0)
    check_free(str(tmp_path / "new"), None, overwrite=False)
    check_free(folder, None, overwrite=True)
    check_free(folder, f"{folder}/checkpoint-3", overwrite=False)
    for checkpoint in (None, str(tmp_path / "b" / "checkpoint-3")):
        with pytest.raises(ValueError, match="a holds results.json of another run; give another output_dir, resume"):
            check_free(folder, checkpoint, overwrite=False)


def test_json_has_no_folders_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"dataset_name": "/data/private/cats", "output_dir": str(tmp_path / "runs" / "x"), "seed": 3}
    save_results([PLAIN], tmp_path / "results.json", settings, torch.device("cpu"))
    content = (tmp_path / "results.json").read_text()
    assert json.loads(content)["settings"] == {"dataset_name": "cats", "output_dir": "runs/x", "seed": 3}
    assert str(tmp_path) not in content and "/data/private" not in content


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

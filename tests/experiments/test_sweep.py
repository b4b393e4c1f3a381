import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from gradaug_hf.cli import main
from gradaug_hf.experiments.sweep import Plan, flag_settings, read_plan, summary_table, train_all, train_and_report
from tests.helpers.small_training import checkpoints, start, status_of, wait_for_step

ROOT = Path(__file__).parents[2]
# Stands for a recipe: writes down that it ran, and results that follow from its flags.
RECIPE = """
import json, sys
from pathlib import Path
words = iter(sys.argv[1:])
flags = dict(zip(words, words))
folder = Path(flags["--output_dir"])
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if flags["--method"] == "broken":
    print("error: there is no such method", *(f"  of the launcher's trace: {line}" for line in range(9)), sep="\\n")
    sys.exit(1)
top1 = {"baseline": 0.5, "gradaug": 0.6}[flags["--method"]] + int(flags["--seed"]) / 100
result = {"method": flags["--method"], "top1": top1, "top5": 1.0, "steps": 20, "curve": [], "peak_memory": 10.0,
          "seconds": {"baseline": 10.0, "gradaug": 27.0}[flags["--method"]]}
settings = {"model": "resnet18", "dataset_name": "cats", "seed": int(flags["--seed"])}
(folder / "results.json").write_text(json.dumps({"settings": settings, "runs": [result]}))
"""
LAUNCH = sys.executable


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE)
    return file


def make_plan(recipe: Path | str, **changes) -> Plan:
    rows = {"plain": {"method": "baseline"}, "ours": {"method": "gradaug", "min_width": 0.8}}
    content = {"rows": rows, "seeds": [0, 1], "settings": {"epochs": 3}, "columns": {"": {}}}
    return Plan(recipe, **{**content, **changes})


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().splitlines()


def write_plan(folder: Path, **content) -> Path:
    file = folder / "plan.yaml"
    file.write_text(
        yaml.safe_dump({"recipe": "recipe.py", "rows": {"plain": {"method": "baseline"}}, **content}, sort_keys=False)
    )
    return file


def test_every_row_is_trained_with_every_seed_by_its_flags(recipe, tmp_path):
    assert train_all(make_plan(recipe), tmp_path / "runs", LAUNCH) == []
    folder = tmp_path / "runs"
    assert calls(folder) == [
        f"--epochs 3 --method baseline --seed 0 --output_dir {folder / 'plain-seed0'}",
        f"--epochs 3 --method gradaug --min_width 0.8 --seed 0 --output_dir {folder / 'ours-seed0'}",
        f"--epochs 3 --method baseline --seed 1 --output_dir {folder / 'plain-seed1'}",
        f"--epochs 3 --method gradaug --min_width 0.8 --seed 1 --output_dir {folder / 'ours-seed1'}",
    ]


def test_a_recipe_may_be_a_module(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(recipe.parent))
    assert train_all(make_plan(recipe.stem, seeds=[0]), tmp_path / "runs", LAUNCH) == []
    assert len(calls(tmp_path / "runs")) == 2


def test_accelerate_is_that_of_this_python_whatever_the_path_names(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    started = []
    monkeypatch.setattr("gradaug_hf.experiments.sweep.run_to_end", lambda words, log: started.append(words) or 1)
    train_all(make_plan(recipe, seeds=[0]), tmp_path / "runs", "accelerate launch --cpu")
    assert started[0][0] == sys.executable and started[0][3:6] == ["launch", "--cpu", str(recipe)]


def test_shared_settings_of_sub_networks_reach_the_rows_that_have_some(recipe):
    rows = {
        "plain": {"method": "cutmix"},
        "ours": {"method": "gradaug"},
        "own": {"method": "baseline", "kl_weight": 1},
    }
    shared = {"min_width": 0.5, "subnet_rotation": True, "learning_rate": 0.1}
    plan = make_plan(recipe, rows=rows, seeds=[0], settings=shared, columns={"few": {"num_subnets": 1}})
    settings = {run.row: dict(run.settings) for run in plan.runs()}
    assert settings["plain"] == {"learning_rate": 0.1, "method": "cutmix", "seed": 0}
    assert settings["ours"] == shared | {"num_subnets": 1, "method": "gradaug", "seed": 0}
    assert settings["own"] == {"learning_rate": 0.1, "method": "baseline", "kl_weight": 1, "seed": 0}


def test_a_flag_is_no_abbreviation_of_the_sweeps_own(recipe, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("gradaug_hf.experiments.sweep.train_and_report", lambda plan, *_: given.append(plan.settings))
    write_plan(tmp_path, seeds=[0])
    main(["sweep", str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path), "--seed_train_data", "false"])
    assert given == [{"seed_train_data": "false"}]


def test_finished_runs_are_skipped_and_interrupted_ones_go_on(recipe, tmp_path, capsys):
    folder = tmp_path / "runs"
    train_all(make_plan(recipe, seeds=[0]), folder, LAUNCH)
    (folder / "ours-seed0" / "results.json").unlink()
    (folder / "ours-seed0" / "checkpoint-7").mkdir()
    train_all(make_plan(recipe), folder, LAUNCH)
    again, *new = calls(folder)[2:]
    assert "4 runs, 1 of them finished before" in capsys.readouterr().out
    assert again.endswith("ours-seed0 --resume_from_checkpoint last")
    assert len(new) == 2 and all("--seed 1" in call and "resume" not in call for call in new)


# Trains a little, slowly, with a launcher that SIGTERM ends at once.
TRAINING = """
import subprocess, sys
from pathlib import Path
if sys.argv[1] == "launched":
    from tests.helpers.small_training import Slow, train
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    train(folder, [Slow(folder)], max_steps=60, save_strategy="no")
else:
    sys.exit(subprocess.run([sys.executable, sys.argv[0], "launched", *sys.argv[1:]]).returncode)
"""


def test_sigterm_ends_a_sweep_once_its_training_has_written_a_checkpoint(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe, folder = tmp_path / "recipe.py", tmp_path / "runs" / "plain-seed0"
    recipe.write_text(TRAINING)
    rows = {"plain": {"method": "baseline"}, "ours": {"method": "gradaug"}}
    pid = start(lambda: train_and_report(make_plan(recipe, rows=rows, seeds=[0]), tmp_path / "runs", LAUNCH))
    wait_for_step(folder, 2, seconds=280)
    os.kill(pid, signal.SIGTERM)
    assert status_of(pid) == 143
    (step,) = checkpoints(folder)
    assert 2 <= step < 60
    assert f"training stopped after step {step} of 60" in (folder / "_log.txt").read_text()
    assert "plain-seed0: interrupted; the same command goes on with it" in capfd.readouterr().out
    assert not (tmp_path / "runs" / "ours-seed0").exists()


@pytest.mark.parametrize("limit", [{}, {"save_total_limit": 1}])
def test_a_finished_run_keeps_its_checkpoints_where_their_number_is_given_alone(recipe, tmp_path, limit):
    folder = tmp_path / "runs" / "plain-seed0"
    (folder / "checkpoint-7").mkdir(parents=True)
    (folder / "model.safetensors").touch()
    train_all(make_plan(recipe, seeds=[0], settings=limit), tmp_path / "runs", LAUNCH)
    assert (folder / "checkpoint-7").exists() == bool(limit)
    assert (folder / "model.safetensors").exists() and (folder / "results.json").exists()


def test_only_some_seeds_are_trained_where_asked_for(recipe, tmp_path):
    train_all(make_plan(recipe), tmp_path / "runs", LAUNCH, seeds=[1])
    assert len(calls(tmp_path / "runs")) == 2 and all("--seed 1" in call for call in calls(tmp_path / "runs"))


def test_a_seed_that_the_plan_has_not_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="seeds holds 7; it must be of those of the plan: 0, 1"):
        train_all(make_plan(recipe), tmp_path / "runs", LAUNCH, seeds=[1, 7])


def test_a_run_that_fails_is_named_and_the_others_are_trained(recipe, tmp_path, capsys):
    rows = {"bad": {"method": "broken"}, "plain": {"method": "baseline"}}
    (failed,) = train_all(make_plan(recipe, rows=rows, seeds=[0]), tmp_path / "runs", LAUNCH)
    assert failed.row == "bad"
    assert len(calls(tmp_path / "runs")) == 2
    printed = capsys.readouterr().out
    assert "error: there is no such method" in printed and "launcher" not in printed


def test_results_of_other_settings_are_never_taken_for_those_of_the_plan(recipe, tmp_path):
    train_all(make_plan(recipe), tmp_path / "runs", LAUNCH)
    with pytest.raises(ValueError, match=r"plain-seed0 holds a run with other settings \(epochs was 3, is 4\)"):
        train_all(make_plan(recipe, settings={"epochs": 4}), tmp_path / "runs", LAUNCH)
    assert len(calls(tmp_path / "runs")) == 4


def test_table_shows_means_deviations_and_gains_over_the_first_row(recipe, tmp_path, capsys):
    write_plan(
        tmp_path,
        rows={"plain": {"method": "baseline"}, "ours": {"method": "gradaug"}, "bad": {"method": "broken"}},
        seeds=[0, 2],
    )
    line = [
        "sweep",
        str(tmp_path / "plan.yaml"),
        "--output_dir",
        str(tmp_path / "runs"),
        "--launch",
        LAUNCH,
        "--use_cpu",
    ]
    with pytest.raises(SystemExit, match="error: 2 runs failed: bad-seed0, bad-seed2"):
        main(line)
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]] == [
        ["plain", "2", "51.00 ± 1.41", "", "20", "1.00"],
        ["ours", "2", "61.00 ± 1.41", "+10.00 ± 0.00", "20", "2.70"],
    ]
    records = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert [(r["row"], r["seed"], r["top1"]) for r in records] == [
        ("plain", 0, 0.5),
        ("ours", 0, 0.6),
        ("plain", 2, 0.52),
        ("ours", 2, 0.62),
    ]
    assert (tmp_path / "runs" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert records[0]["settings"] == {"method": "baseline", "use_cpu": "true", "seed": 0}


def test_several_columns_stand_side_by_side_and_what_is_not_finished_is_left_empty():
    def record(row: str, column: str, top1: float) -> dict:
        return {"row": row, "column": column, "seed": 0, "top1": top1}

    table = summary_table([record("a", "250", 0.4), record("b", "250", 0.5), record("a", "1000", 0.6)])
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()] == [
        ["top-1 %", "250", "1000"],
        ["---------", "------:", "------:"],
        ["a", "40.00", "60.00"],
        ["b", "50.00", ""],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seeds": [0], "row": {}}, "plan.yaml holds .*row.*; a plan has recipe, rows and seeds"),
        ({}, "a plan has recipe, rows and seeds"),
        ({"seeds": [0], "recipe": "nowhere.py"}, "recipe of .* is 'nowhere.py', and there is no file"),
        ({"seeds": [0], "settings": [1]}, "settings of .* is a list; it must map names to settings"),
        ({"seeds": []}, "a plan needs at least one row and one seed"),
        ({"seeds": [0, 0]}, "several runs of the plan are called plain-seed0; name rows apart"),
    ],
)
def test_what_is_no_plan_is_refused(recipe, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_plan(write_plan(tmp_path, **content))


def test_a_token_is_no_setting_of_a_plan(recipe):
    for changes in ({"settings": {"hub_token": "hf_x"}}, {"columns": {"few": {"hub_token": "hf_x"}}}):
        with pytest.raises(ValueError, match="hub_token would be written with the settings"):
            make_plan(recipe, **changes)


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="plan.yaml cannot be read as YAML or JSON"):
        read_plan(tmp_path / "plan.yaml")


def test_further_flags_are_settings_of_every_run():
    assert flag_settings(["--bf16", "--resolutions", "32", "24", "--seed", "1"]) == {
        "bf16": "true",
        "resolutions": ["32", "24"],
        "seed": "1",
    }
    with pytest.raises(ValueError, match="'32' follows no flag"):
        flag_settings(["32"])

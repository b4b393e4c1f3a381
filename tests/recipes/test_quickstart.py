import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor as Pool
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import DatasetDict
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from gradaug_hf.experiments import quickstart
from gradaug_hf.experiments.quickstart import (
    QuickstartArguments,
    check_checkpoint,
    load_data,
    main,
    make_plan,
    train,
    training_images,
)
from gradaug_hf.experiments.results import RESULTS, load_runs, save_results
from gradaug_hf.experiments.sweep import PlannedRun, record_settings
from gradaug_hf.reports.runs import Result
from gradaug_hf.trainer.trainer import GradAugTrainer
from tests.helpers.small_training import Sends

ROOT = Path(__file__).parents[2]


def launch(flags: list[str]) -> str:
    """What the recipe printed, launched as the README does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "recipes/quickstart.py", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(flags: list[str]) -> str:
    """What the recipe printed, run in this process; its new process is a fork, which need not import anew."""
    forks, one_thread = multiprocessing.get_context("fork"), (torch.set_num_threads, (1,))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", ["recipes/quickstart.py", *flags])
        patch.setattr(quickstart, "ProcessPoolExecutor", lambda n, mp_context: Pool(n, forks, *one_thread))
        main()
    return printed.getvalue()


TINY = "--labels_per_class 1 --epochs 2 --batch_size 10 --max_eval_samples 60 --seeds 0 1 --output_dir"
LONGER = "plain, 3 epochs"


@pytest.fixture(scope="module", params=[run_here, pytest.param(launch, marks=pytest.mark.slow)])
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    """What the recipe printed and the folder it wrote, with a step of training for each run."""
    folder = tmp_path_factory.mktemp("quickstart")
    return request.param([*TINY.split(), str(folder)]), folder


def test_one_table_shows_means_deviations_and_paired_differences_of_three_trainings(finished):
    printed, folder = finished
    records = json.loads((folder / "summary.json").read_text())
    steps = {"plain": 2, LONGER: 3, "gradaug": 2}
    assert [(r["row"], r["seed"], r["steps"]) for r in records] == [(r, s, steps[r]) for s in (0, 1) for r in steps]
    top1 = {row: [100 * r["top1"] for r in records if r["row"] == row] for row in steps}
    for row, values in top1.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"| {row} "))
        assert f"| {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |" in line
    for other in ("plain", LONGER):
        gain = statistics.mean(own - its for own, its in zip(top1["gradaug"], top1[other], strict=True))
        line = next(line for line in printed.splitlines() if line.startswith(f"| gradaug over {other} "))
        assert f"{gain:+.2f} ± " in line
    assert "over plain training of equal compute" in printed
    assert (folder / "table.md").read_text().strip() in printed


def test_each_run_is_told_as_it_ends(finished):
    printed, folder = finished
    for number, record in enumerate(json.loads((folder / "summary.json").read_text()), start=1):
        assert f"[{number}/6] " in printed
        assert f"-seed{record['seed']}: top-1 {record['top1']:.2%} in " in printed


def test_checkpoint_is_as_accurate_when_timm_loads_it(finished):
    printed, folder = finished
    (run,) = json.loads((folder / "gradaug-seed0" / "results.json").read_text())["runs"]
    loaded = f'timm.create_model("local-dir:{folder}/gradaug-seed0", pretrained=True) in a new process'
    assert f"{loaded}: top-1 {run['top1']:.2%}" in printed


def test_checkpoint_knows_its_size_and_has_a_card_and_pictures(finished):
    _, folder = finished
    saved = folder / "gradaug-seed0"
    model = timm.create_model(f"local-dir:{saved}", pretrained=True)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 16, 16)
    card = ModelCard.load(saved / "README.md")
    assert card.data.eval_results[0].dataset_name == "handwritten digits of scikit-learn"
    assert sorted(file.name for file in (saved / "plots").iterdir()) == ["curves.png", "subnets.png"]
    with PIL.Image.open(folder / "summary.png") as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_checkpoint_of_another_accuracy_ends_with_an_error(finished, tmp_path):
    _, folder = finished
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    results = copied / "gradaug-seed0" / "results.json"
    content = json.loads(results.read_text())
    content["runs"][0]["top1"] = 0.123
    results.write_text(json.dumps(content))
    args = QuickstartArguments(labels_per_class=1, max_eval_samples=60, output_dir=str(copied))
    with pytest.raises(SystemExit, match="another accuracy than the trained model: 12.30%"):
        check_checkpoint(args)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The names of the runs that were trained, of which the third is interrupted."""
    names: list[str] = []

    def train_briefly(args: QuickstartArguments, run: PlannedRun, data: DatasetDict) -> Result:
        names.append(run.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        result = Result(run.row, 0.5, 0.9, 1, 1.0, 200.0, [(1, 0.5)])
        record_settings(run, Path(args.output_dir) / run.name)
        save_results([result], Path(args.output_dir) / run.name / RESULTS, dict(run.settings), torch.device("cpu"))
        return result

    monkeypatch.setattr(quickstart, "train", train_briefly)
    monkeypatch.setattr(quickstart, "check_checkpoint", lambda args: None)
    return names


def test_an_interruption_keeps_what_is_finished_and_the_command_goes_on_behind_it(trained, tmp_path):
    flags = [*TINY.split(), str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        run_here(flags)
    assert ended.value.code == 130
    assert [record["row"] for record in json.loads((tmp_path / "summary.json").read_text())] == ["plain", LONGER]
    assert "6 runs, 2 of them finished before" in run_here(flags)
    assert trained[2:] == ["gradaug-seed0", "gradaug-seed0", "plain-seed1", "plain_-3-epochs-seed1", "gradaug-seed1"]
    with pytest.raises(SystemExit, match="^error: .* holds a run with other settings .learning_rate was 0.1, is 0.2"):
        run_here([*flags, "--learning_rate", "0.2"])


class Begins(TrainerCallback):
    """Writes down the steps after which trainings begin."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.steps.append(state.global_step)


def test_a_run_that_is_interrupted_goes_on_by_the_same_command_and_keeps_no_checkpoint(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(quickstart, "check_checkpoint", lambda args: None)
    flags = ["--labels_per_class", "1", "--epochs", "4", "--max_eval_samples", "10", "--seeds", "0", "--output_dir"]
    trainer = quickstart.QuickstartTrainer
    monkeypatch.setattr(quickstart, "QuickstartTrainer", partial(trainer, callbacks=[Sends(signal.SIGINT, 2)]))
    with pytest.raises(SystemExit, match="130"):
        run_here([*flags, str(tmp_path)])
    assert "after step 2 of 4" in (said := capfd.readouterr().err)
    assert said.rstrip().endswith("To go on: the same command")
    assert (tmp_path / "plain-seed0" / "checkpoint-2").exists()
    monkeypatch.setattr(quickstart, "QuickstartTrainer", partial(trainer, callbacks=[begins := Begins()]))
    run_here([*flags, str(tmp_path)])
    assert begins.steps == [2, 0, 0]
    run_here([*flags, str(tmp_path / "whole")])
    resumed, whole = (load_runs(folder / "plain-seed0")[0].result for folder in (tmp_path, tmp_path / "whole"))
    assert (resumed.top1, resumed.steps) == (whole.top1, 4)
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_methods_start_from_the_same_weights(tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(GradAugTrainer, "train", lambda self, **_: starts.append(self.model.state_dict()) or 1 / 0)
    args = QuickstartArguments(labels_per_class=1, max_eval_samples=10, output_dir=str(tmp_path), seeds=[3])
    data = load_data(args)
    for run in make_plan(args, 10).runs():
        with pytest.raises(ZeroDivisionError):
            train(args, run, data)
    first, *others = starts
    assert len(others) == 2
    for name, tensor in first.items():
        assert all(torch.equal(tensor, other[name]) for other in others), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "epochs is 0; it must be at least 1"),
        ("--batch_size 0", "batch_size is 0; it must be at least 1"),
        ("--batch_size 51", "batch_size is 51, but there are 50 images to train on"),
        ("--num_subnets 0", "num_subnets is 0; it must be at least 1"),
        ("--min_width 1.5", "min_width is 1.5; it must lie in"),
        ("--seeds -1", "seeds is .-1.; it must be a list of numbers of at least 0"),
        ("--learning_rate nan", "learning_rate is nan; it must be above 0 and finite"),
        ("--model resnet51", "model is 'resnet51', which is unknown"),
        ("--dataset_name nobody/nothing", "'nobody/nothing' is neither a file nor a folder here"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path / "out"), *flags.split()])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main()
    assert not (tmp_path / "out").exists()


def test_same_seed_samples_the_same_few_images_of_each_class():
    args = QuickstartArguments()
    data = load_data(args)
    first, second, other = (training_images(args, data, seed) for seed in (0, 0, 1))
    assert len(first) == 10 * args.labels_per_class
    assert list(first["row"]) == list(second["row"]) != list(other["row"])


@pytest.mark.slow
def test_folder_of_images_can_be_trained_on(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{index}.jpg")
    options = (
        f"--dataset_name {tmp_path}/photos --labels_per_class 2 --epochs 1 --batch_size 4 --image_size 32 --seeds 1 "
        f"--output_dir {tmp_path}/out"
    )
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *options.split()])
    main()
    printed = capsys.readouterr().out
    assert f"wrn10_2, 2 labels per class of {tmp_path}/photos" in printed
    assert "in a new process: top-1" in printed


@pytest.mark.slow
def test_few_labels_of_cifar10_are_learnt_well_over_chance(real_data: Path, tmp_path):
    args = QuickstartArguments(
        dataset_name=str(real_data / "cifar10"),
        labels_per_class=100,
        max_eval_samples=400,
        image_size=32,
        model="wrn16_2",
        seeds=[0],
        batch_size=25,
        epochs=1,
        output_dir=str(tmp_path),
    )
    *_, gradaug = make_plan(args, 400).runs()
    result = train(args, gradaug, load_data(args))
    assert result.steps == 40
    assert result.top1 > 0.2

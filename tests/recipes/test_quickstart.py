import copy
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from transformers import set_seed

from gradaug_hf.experiments.quickstart import QuickstartArguments, check_checkpoint, load_data, main, train

ROOT = Path(__file__).parents[2]


def launch(flags: list[str]) -> str:
    """What the recipe printed, launched as the README does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "recipes/quickstart.py", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(flags: list[str]) -> str:
    """What the recipe printed, run in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", ["recipes/quickstart.py", *flags])
        main()
    return printed.getvalue()


@pytest.fixture(scope="module", params=[run_here, pytest.param(launch, marks=pytest.mark.slow)])
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    """What the recipe printed and the folder it wrote, with one step of training."""
    folder = tmp_path_factory.mktemp("quickstart")
    flags = "--labels_per_class 1 --epochs 1 --batch_size 10 --max_eval_samples 60 --equal_compute --output_dir"
    return request.param([*flags.split(), str(folder)]), folder


def test_table_shows_both_methods_and_the_baseline_of_equal_compute(finished):
    printed, folder = finished
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["plain", "gradaug", "plain_2.7x"]
    assert [run["steps"] for run in runs] == [1, 1, 3]
    for run in runs:
        assert f"| {run['method']} " in printed
        assert f"{100 * run['top1']:.2f}" in printed
        assert 0 <= run["top1"] <= run["top5"] <= 1
        assert run["curve"][-1] == [run["steps"], run["top1"]]
        assert run["seconds"] > 0
        assert run["peak_memory"] > 100


def test_checkpoint_is_as_accurate_when_timm_loads_it(finished):
    printed, folder = finished
    top1 = json.loads((folder / "results.json").read_text())["runs"][1]["top1"]
    assert (
        f'timm.create_model("local-dir:{folder}/gradaug", pretrained=True) in a new process: top-1 {top1:.2%}'
        in printed
    )


def test_both_checkpoints_and_the_plot_are_written(finished):
    _, folder = finished
    networks = [timm.create_model(f"local-dir:{folder / name}", pretrained=True) for name in ("plain", "gradaug")]
    assert not torch.equal(networks[0].fc.weight, networks[1].fc.weight)
    with PIL.Image.open(folder / "curves.png") as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_checkpoint_of_another_accuracy_ends_with_an_error(finished):
    _, folder = finished
    args = QuickstartArguments(labels_per_class=1, max_eval_samples=60, output_dir=str(folder))
    with pytest.raises(SystemExit, match="another accuracy than the trained model: 12.30%"):
        check_checkpoint(args, expected_top1=0.123)


def test_training_starts_from_the_given_network_and_leaves_it_alone(tmp_path):
    args = QuickstartArguments(
        labels_per_class=1, max_eval_samples=10, batch_size=10, output_dir=str(tmp_path), epochs=1
    )
    args.learning_rate = 0.0
    network = timm.create_model("wrn16_2", num_classes=10)
    before = copy.deepcopy(network.state_dict())
    data = load_data(args)
    for method, num_subnets in (("plain", 0), ("gradaug", 3)):
        train(args, method, network, data, num_subnets)
        trained = timm.create_model(f"local-dir:{tmp_path / method}", pretrained=True)
        for name, parameter in trained.named_parameters():
            assert torch.equal(parameter, before[name]), name
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "epochs is 0; it must be at least 1"),
        ("--batch_size 0", "batch_size is 0; it must be at least 1"),
        ("--batch_size 31", "batch_size is 31, but there are 30 images to train on"),
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


def test_results_of_an_earlier_run_are_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: .* holds results.json of another run"):
        main()


def test_same_seed_draws_the_same_few_images_of_each_class():
    first, second, other = (load_data(QuickstartArguments(seed=seed))["train"] for seed in (0, 0, 1))
    assert len(first) == 10 * QuickstartArguments().labels_per_class
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
        f"--dataset_name {tmp_path}/photos --labels_per_class 2 --epochs 1 --batch_size 4 --output_dir {tmp_path}/out"
    )
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *options.split()])
    main()
    printed = capsys.readouterr().out
    assert f"wrn16_2, 2 labels per class of {tmp_path}/photos, seed 0" in printed
    assert "in a new process: top-1" in printed


@pytest.mark.slow
def test_few_labels_of_cifar10_are_learnt_well_over_chance(real_data: Path, tmp_path):
    args = QuickstartArguments(
        dataset_name=str(real_data / "cifar10"),
        labels_per_class=100,
        max_eval_samples=400,
        batch_size=25,
        epochs=1,
        output_dir=str(tmp_path),
    )
    data = load_data(args)
    set_seed(args.seed)
    result = train(args, "gradaug", timm.create_model("wrn16_2", num_classes=10), data)
    assert result.steps == 40
    assert result.top1 > 0.2


def test_each_checkpoint_has_a_model_card_and_pictures(finished):
    _, folder = finished
    for method, pictures in (("plain", ["curves.png"]), ("gradaug", ["curves.png", "subnets.png"])):
        assert sorted(file.name for file in (folder / method / "plots").iterdir()) == pictures
        card = ModelCard.load(folder / method / "README.md")
        top1 = {run["method"]: run["top1"] for run in json.loads((folder / "results.json").read_text())["runs"]}
        assert card.data.eval_results[0].metric_value == top1[method]
        assert card.data.eval_results[0].dataset_name == "handwritten digits of scikit-learn"

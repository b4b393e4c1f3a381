import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch

from gradaug_hf.experiments.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.experiments.evaluation.robustness import RobustnessArguments, main
from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD
from tests.helpers.checkpoints import save_images, save_network

ROOT = Path(__file__).parents[2]
EPSILONS = (0.01, 0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return [save_network(tmp_path_factory.mktemp("models") / name, seed) for name, seed in (("plain", 0), ("ours", 1))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return save_images(tmp_path_factory.mktemp("photos"), of_each_class=2)


@pytest.fixture
def run(photos: str, monkeypatch) -> Callable[..., None]:
    """Runs the recipe as its command line does, on one thread: the tests share the cores."""
    monkeypatch.setattr("gradaug_hf.experiments.evaluation.evaluation.use_all_cores", lambda: None)

    def run_with(*flags: object) -> None:
        shared = ["--dataset_name", photos, "--num_workers", 0, "--epsilon", *EPSILONS]
        monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, (*shared, *flags))])
        main()

    return run_with


def accuracy_by_hand(model: str, folder: str, epsilon: float) -> float:
    """Top-1 under FGSM, with the gradient of the normalised images: 1 / std is positive and leaves its sign."""
    network = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    hits = []
    for file in sorted(Path(folder, "test").glob("*/*.png")):
        label = torch.tensor([int(file.parent.name.removeprefix("class"))])
        pixels = torch.frombuffer(bytearray(PIL.Image.open(file).tobytes()), dtype=torch.uint8)
        pixels = pixels.view(1, 32, 32, 3).permute(0, 3, 1, 2) / 255
        images = ((pixels - mean) / std).requires_grad_()
        torch.nn.functional.cross_entropy(network(images), label).backward()
        attacked = (pixels + epsilon * images.grad.sign()).clamp(0, 1)
        hits.append(network((attacked - mean) / std).argmax(1).eq(label).item())
    return sum(hits) / len(hits)


def test_all_conditions_are_measured_of_all_networks_and_kept(models, photos, run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    plain, ours = models
    run("--model", plain, "--model", ours, "--baseline", plain, "--output_dir", out)

    content = json.loads((out / "robustness.json").read_text())
    conditions = {f"{name} {severity}" for name in CORRUPTIONS for severity in SEVERITIES}
    for model in models:
        measured = content["models"][model]["measured"]
        assert set(measured) == {"clean", "fgsm 0.01", "fgsm 0.1", *conditions}
        assert all(0 <= error <= 1 for error in measured.values())
        for name, epsilon in (("clean", 0.0), ("fgsm 0.01", 0.01), ("fgsm 0.1", 0.1)):
            assert measured[name] == pytest.approx(1 - accuracy_by_hand(model, photos, epsilon))
    assert content["mean_corruption_error"][plain] == pytest.approx(1)
    assert content["baseline"] == plain
    with PIL.Image.open(out / "robustness.png") as image:
        assert image.format == "PNG"
    printed = capsys.readouterr().out
    assert "| gaussian noise" in printed
    assert "mCE, plain = 100" in printed

    # What is there is not measured again, whatever else is asked for.
    monkeypatch.setattr(Measurements, "add", lambda *_: pytest.fail("measured again"))
    run("--model", ours, "--output_dir", out)
    again = capsys.readouterr().out
    assert "mCE" not in again
    assert "mean of the corruptions" in again


def test_an_interrupted_run_goes_on_with_what_is_missing(models, run, tmp_path, monkeypatch):
    added: list[str] = []
    keep = Measurements.add

    def stop_at_the_second(self, name, values):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(name)
        keep(self, name, values)

    flags = ("--model", models[0], "--no_corruptions", "--output_dir", tmp_path / "out")
    with monkeypatch.context() as stopped, pytest.raises(SystemExit, match="130"):
        stopped.setattr(Measurements, "add", stop_at_the_second)
        run(*flags)
    held = json.loads((tmp_path / "out" / "robustness.json").read_text())["models"][models[0]]["measured"]
    assert list(held) == added == ["clean", "fgsm 0.01"]
    run(*flags)
    (entry,) = json.loads((tmp_path / "out" / "robustness.json").read_text())["models"].values()
    assert {name: entry["measured"][name] for name in held} == held
    assert set(entry["measured"]) == {"clean", "fgsm 0.01", "fgsm 0.1"}


@pytest.mark.slow
def test_two_processes_find_the_errors_of_one(models, photos, run, tmp_path):
    flags = [
        "--model",
        *models,
        "--no_corruptions",
        "--batch_size",
        "2",
        "--num_workers",
        "0",
        "--max_eval_samples",
        "5",
    ]
    run(*flags, "--output_dir", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    where = ["--dataset_name", photos, "--epsilon", *map(str, EPSILONS), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, "recipes/robustness.py", *flags, *where],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "robustness.json").read_text())["models"] for name in ("one", "two"))
    assert one == two
    assert done.stdout.count("| no corruption") == 1


def test_networks_for_other_sides_need_one_that_is_given(models, run, tmp_path, capsys):
    other = save_network(tmp_path / "other", seed=0, name="test_resnet")
    flags = ("--model", models[0], other, "--no_corruptions", "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"different sides: 32 .*, 160 .*; give image_size"):
        run(*flags)
    run(*flags, "--image_size", 40)
    assert "| no corruption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epsilon", 8), r"epsilon is \[8.0\]; it must be a list of values in \(0, 1\]"),
        (("--max_eval_samples", 0), "max_eval_samples is 0; it must be at least 1"),
        (("--no_corruptions", "--baseline", "x/y"), "baseline is 'x/y'; it must be left out with --no_corruptions"),
        (("--image_size", 24), "image_size is 24; the corruptions need at least 32 pixels"),
        (("--model", "no_such_net"), "model is 'no_such_net', which is unknown"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    models, run, tmp_path, flags: tuple, message: str
):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run("--model", models[0], "--output_dir", tmp_path / "out", *flags)
    assert not list(tmp_path.glob("out/*"))


def test_an_image_that_cannot_be_read_is_named(models, run, tmp_path):
    photos = Path(save_images(tmp_path / "photos", of_each_class=2))
    (photos / "test" / "class1" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"error: the image in row 2 of split test .*0.png\) cannot be decoded"):
        run("--model", models[0], "--dataset_name", photos, "--no_corruptions", "--output_dir", tmp_path / "out")


def test_the_same_network_twice_is_refused(models, run, tmp_path):
    with pytest.raises(SystemExit, match="must be a list of different models"):
        run("--model", models[0], "--model", models[0], "--output_dir", tmp_path)


def test_a_network_of_another_number_of_classes_is_refused(run, tmp_path):
    other = save_network(tmp_path / "other", seed=0, num_classes=7)
    with pytest.raises(SystemExit, match="has 7 classes, the data set 3"):
        run("--model", other, "--output_dir", tmp_path)


def test_fields_are_described_for_help():
    assert all("help" in field.metadata for field in RobustnessArguments.__dataclass_fields__.values())

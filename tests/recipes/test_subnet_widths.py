import json
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from gradaug_hf import at_width, make_slimmable
from gradaug_hf.experiments.evaluation import widths
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.experiments.evaluation.pixels import to_unit
from gradaug_hf.experiments.evaluation.widths import Evaluation, WidthArguments, main, subnet_at
from tests.helpers.checkpoints import save_images, save_network


@pytest.fixture(autouse=True)
def timed_shortly(monkeypatch) -> None:
    monkeypatch.setattr(widths, "TIMED", 0.01)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return [save_network(tmp_path_factory.mktemp("models") / name, seed) for name, seed in (("plain", 0), ("ours", 1))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return save_images(tmp_path_factory.mktemp("photos"), of_each_class=4)


@pytest.fixture
def run(photos: str, monkeypatch) -> Callable[..., None]:
    """Runs the recipe as its command line does, on one thread: the tests share the cores."""
    monkeypatch.setattr("gradaug_hf.experiments.evaluation.evaluation.use_all_cores", lambda: None)

    def run_with(*flags: object) -> None:
        shared = ["--dataset_name", photos, "--num_workers", 0]
        monkeypatch.setattr(sys, "argv", ["subnet_widths.py", *map(str, (*shared, *flags))])
        main()

    return run_with


def test_all_widths_are_measured_of_all_networks_and_kept(models, run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run("--model", *models, "--widths", 1, 0.5, "--output_dir", out)

    content = json.loads((out / "subnet_widths.json").read_text())
    for model in models:
        measured = content["models"][model]["measured"]
        assert set(measured) == {"width 1", "width 0.5"}
        full, half = measured["width 1"], measured["width 0.5"]
        network = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
        assert full["params"] == sum(parameter.numel() for parameter in network.parameters())
        with FlopCounterMode(display=False) as counted:
            network(torch.zeros(1, 3, 32, 32))
        assert full["macs"] == counted.get_total_flops() // 2
        assert 0.2 < half["macs"] / full["macs"] < 0.3
        for result in (full, half):
            assert 0 <= result["top1"] <= 1
            assert result["top5"] is None  # of three classes
            assert result["latency"] > 0
    printed = capsys.readouterr().out
    assert "multiply-adds (M)" in printed
    with PIL.Image.open(out / "subnet_widths.png") as image:
        assert image.format == "PNG"

    # What is there is not measured again.
    monkeypatch.setattr(Measurements, "add", lambda *_: pytest.fail("measured again"))
    run("--model", models[1], "--widths", 0.5, "--output_dir", out)
    assert "|   0.5 |" in capsys.readouterr().out


@pytest.fixture
def evaluation(models, photos, tmp_path) -> Evaluation:
    args = WidthArguments(model=models[:1], dataset_name=photos, num_workers=0, output_dir=str(tmp_path / "out"))
    evaluation = Evaluation(args, args.model)
    make_slimmable(evaluation.models[models[0]].network, input_size=32)
    return evaluation


def test_full_width_is_the_network_as_it_was_trained(models, evaluation):
    pixels = torch.rand(2, 3, 32, 32)
    network = evaluation.models[models[0]]
    subnet = subnet_at(evaluation, network, 1.0)
    assert torch.equal(subnet(pixels), network(pixels))


def test_narrower_width_has_the_batch_norm_of_the_training_images(models, evaluation, photos):
    network = evaluation.models[models[0]]
    subnet = subnet_at(evaluation, network, 0.5)
    # The first batch norm by hand: mean and unbiased variance of what the first 8 filters make of all training images.
    images = evaluation.images("train")
    pixels = to_unit(torch.stack([images[index]["pixel_values"] for index in range(len(images))]))
    with at_width(network, 0.5):
        features = network.network.conv1((pixels - network.mean) / network.std)
    assert features.shape[1] == 8
    torch.testing.assert_close(subnet.network.bn1.running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(subnet.network.bn1.running_var, features.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_exported_sub_network_is_the_one_that_was_measured(models, run, tmp_path, capsys, evaluation, photos):
    out = tmp_path / "exported"
    run("--model", models[0], "--widths", 0.5, "--export", 0.5, "--output_dir", out)
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert folder.name == "plain-width0.5"
    assert f"wrote the sub-network of width 0.5 to {folder}, which torch.export loads" in capsys.readouterr().out
    exported = torch.export.load(folder / "model.pt2").module()
    subnet = subnet_at(evaluation, evaluation.models[models[0]], 0.5)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(exported(images), subnet.network(images), rtol=1e-4, atol=1e-5)

    with pytest.raises(SystemExit, match=r"plain-width0.5 exists already; a new or an empty folder is accepted"):
        run("--model", models[0], "--widths", 0.5, "--export", 0.5, "--output_dir", out)


def test_exports_that_would_be_one_folder_are_refused(models, run, tmp_path):
    twin = save_network(tmp_path / "plain", seed=2)
    with pytest.raises(SystemExit, match=r"error: export: two of the models would be written to .*plain-width0.5"):
        run("--model", models[0], "--model", twin, "--export", 0.5, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_of_which_nothing_can_be_sliced_is_refused(models, run, tmp_path, monkeypatch):
    monkeypatch.setattr("gradaug_hf.slimming.report.SlicingReport.sliced_macs", 0)
    with pytest.raises(SystemExit, match="error: nothing of model .*plain.* can be sliced"):
        run("--model", models[0], "--output_dir", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--widths", 1.5), r"widths is \[1.5\]; it must be a list of widths in \(0, 1\]"),
        (("--export", 0), r"export is 0.0; it must be in \(0, 1\]"),
        (("--width_divisor", 0), "width_divisor is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    models, run, tmp_path, flags: tuple, message: str
):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run("--model", models[0], "--output_dir", tmp_path / "out", *flags)
    assert not Path(tmp_path / "out").exists()

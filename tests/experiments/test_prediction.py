import csv
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from torch import nn

from gradaug_hf import make_slimmable, recalibrate_batchnorm
from gradaug_hf.cli import main
from gradaug_hf.experiments.prediction import find_photos, predict
from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD
from gradaug_hf.slimming import extract_subnet
from tests.helpers.checkpoints import save_images, save_network
from tests.helpers.pictures import picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return save_images(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_network(tmp_path_factory.mktemp("models") / "resnet", 0, 5)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def load(model: str) -> nn.Module:
    return timm.create_model(f"local-dir:{model}", pretrained=True).eval()


def pixels(files: list[str]) -> torch.Tensor:
    """Photos as timm evaluates on them at 32 pixels."""
    transform = timm.data.create_transform((3, 32, 32), mean=CIFAR_MEAN, std=CIFAR_STD, crop_pct=1.0)
    return torch.stack([transform(PIL.Image.open(file).convert("RGB")) for file in files])


@torch.inference_mode()
def predicted(model: nn.Module, files: list[str]) -> torch.Tensor:
    return model(pixels(files)).softmax(1)


def test_each_photo_has_its_three_most_probable_classes(tmp_path, photos, model):
    assert predict(model, [photos], tmp_path / "found.csv", batch_size=4) == (18, {})
    found = rows(tmp_path / "found.csv")
    expected = predicted(load(model), [row["file"] for row in found])
    for row, shares in zip(found, expected, strict=True):
        best = shares.topk(3)
        assert [row["label"], row["label_2"], row["label_3"]] == [f"LABEL_{label}" for label in best.indices.tolist()]
        written = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert written == pytest.approx(best.values.tolist(), abs=2e-6)


def test_a_sub_network_predicts_with_statistics_of_the_photos_for_it(tmp_path, photos, model):
    predict(model, [f"{photos}/test"], tmp_path / "found.csv", width=0.5, calibration_images=f"{photos}/train")
    found = rows(tmp_path / "found.csv")
    network = make_slimmable(load(model))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    files = [find_photos([f"{photos}/train"])[index] for index in order]
    with recalibrate_batchnorm(network, 0.5, [pixels(files)]):
        narrow = extract_subnet(network, 0.5).eval()
    expected = predicted(narrow, [row["file"] for row in found])
    assert [float(row["probability"]) for row in found] == pytest.approx(expected.amax(1).tolist(), abs=1e-5)


def test_photos_that_cannot_be_read_are_named_and_counted(tmp_path, capsys, model):
    picture(100).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not a photo")
    main(["predict", model, str(tmp_path), "--output", str(tmp_path / "found.csv")])
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path / 'found.csv'}: predictions of 1 photos; 1 skipped\n"
    assert printed.err.startswith(f"skipped {tmp_path / 'bad.png'}: cannot identify image file")
    assert [row["file"] for row in rows(tmp_path / "found.csv")] == [str(tmp_path / "good.png")]


def test_a_photo_that_is_named_twice_is_predicted_once(tmp_path):
    picture(100).save(tmp_path / "a.png")
    assert find_photos([tmp_path / "a.png", tmp_path]) == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "nowhere.jpg"], "nowhere.jpg does not exist; give photos, or folders with photos in them"),
        (["{model}", "{empty}"], "holds no photos that Pillow can read"),
        (["{model}", "{bad}"], "none of the 1 photos can be read; "),
        (["{model}", "{photos}", "--width", "0"], "width is 0.0"),
        (["{model}", "{photos}", "--width", "0.5"], "needs statistics for it; give a folder of training photos"),
        (["{model}", "{photos}", "--calibration_images", "{photos}"], "calibration_images are for a sub-network"),
        (["{model}", "{photos}", "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["{model}", "{photos}", "--output", "no/where.csv"], "output is no/where.csv; it must be a file in a folder"),
        (
            ["resnet50.no_tag", "{photos}"],
            "model is 'resnet50.no_tag', of which timm has no weights on the Hub; it has",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    tmp_path, monkeypatch, photos, model, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"no picture")
    places = {"model": model, "photos": photos, "empty": tmp_path / "empty", "bad": tmp_path / "bad"}
    with pytest.raises(SystemExit) as ended:
        main(["predict", *(word.format(**places) for word in words)])
    assert message in str(ended.value.code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty"]

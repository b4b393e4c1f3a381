import json
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Pillow

from gradaug_hf.experiments.low_data import LowDataArguments, main, make_plan

CLASSES, IMAGES = 4, 8


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Folder with a few small images of four classes."""
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat", "dog"])})

    def split() -> Dataset:
        labels = [label for label in range(CLASSES) for _ in range(IMAGES)]
        pixels = [Pillow.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in labels]
        return Dataset.from_dict({"image": pixels, "label": labels}, features=features)

    folder = tmp_path_factory.mktemp("images")
    for name, part in DatasetDict(train=split(), test=split()).items():
        part.to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def plan_of(images: str, settings: dict | None = None, **arguments):
    arguments = {"dataset_name": images, "labels": [8, 0], "model": "wrn16_2", **arguments}
    return make_plan(LowDataArguments(**arguments), {"batch_size": "8"} | (settings or {"num_train_epochs": "10"}))


def test_all_methods_of_the_network_are_compared_beside_a_baseline_of_equal_compute(images):
    plan = plan_of(images)
    assert list(plan.rows) == [
        "baseline", "baseline, 28 epochs", "dropblock", "mixup", "cutmix", "stochdepth", "shakedrop", "gradaug",
        "gradaug_cutmix", "gradaug_mixup",
    ]  # fmt: skip
    assert plan.rows["baseline, 28 epochs"] == {"method": "baseline", "num_train_epochs": 28}  # 2.76 times 10
    assert plan.columns == {"8 labels": {"labels_per_class": 2}, "all labels": {}}
    assert len(plan.runs()) == 10 * 2 * 3


def test_cost_of_the_baseline_follows_the_settings_of_gradaug(images):
    settings = {"num_train_epochs": "10", "num_subnets": "1", "min_width": "0.5", "resolutions": ["32"]}
    assert "baseline, 12 epochs" in plan_of(images, settings).rows  # 1 + 0.5 ** 2


def test_baseline_of_equal_compute_sees_images_of_their_own_side(images):
    # 1 + (128² + 96²) / 2 / 224² times (0.81 + 2 (0.81 + 0.9 + 1) / 3) = 1.67, not 3.04 as if images had 128 pixels
    settings = {"num_train_epochs": "100", "resolutions": ["128", "96"], "batch_size": "8"}
    plan = plan_of(images, settings, recipe="recipes/imagenet_resnet50.py", model="test_resnet", methods=["gradaug"])
    assert list(plan.rows) == ["baseline", "baseline, 167 epochs", "gradaug"]


def test_a_number_of_steps_is_that_of_equal_compute_as_well(images):
    plan = plan_of(images, {"max_steps": "100", "batch_size": "8"}, methods=["gradaug"])
    assert plan.rows["baseline, 276 steps"] == {"method": "baseline", "max_steps": 276}


def test_flags_of_gradaug_reach_its_rows_alone(images):
    plan = plan_of(images, {"num_subnets": "1", "min_width": "0.5", "batch_size": "8"}, methods=["mixup", "gradaug"])
    for run in plan.runs():
        of_gradaug = {"num_subnets", "min_width"} & run.settings.keys()
        assert bool(of_gradaug) == (run.settings["method"] == "gradaug"), run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [10]}, "labels holds 10; it must be a multiple of 4, the number of classes, or 0"),
        ({"labels": [400]}, "labels_per_class=100: class 'ant' has only 8 images"),
        ({"methods": ["dropout"]}, "methods holds 'dropout'; it must be of baseline, dropblock"),
        ({"methods": ["bag_of_tricks"]}, "wrn16_2 cannot be trained with method 'bag_of_tricks'"),
        ({"recipe": "nowhere.py"}, "recipe is 'nowhere.py', and there is no such file"),
        ({"model": "resnet5"}, "model is 'resnet5', which is unknown"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_run(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_of(images, **arguments)


@pytest.mark.slow
def test_command_line_trains_and_compares(images, tmp_path, monkeypatch, capsys):
    flags = (
        f"low_data.py --dataset_name {images} --model wrn16_2 --labels 8 --methods gradaug --seeds 0 --output_dir "
        f"{tmp_path} --launch {sys.executable} --num_train_epochs 1 --batch_size 8 --use_cpu --save_strategy no "
        "--dataloader_num_workers 0"
    )
    monkeypatch.setattr(sys, "argv", flags.split())
    main()
    records = json.loads((tmp_path / "summary.json").read_text())
    assert [(r["row"], r["column"], r["steps"]) for r in records] == [
        ("baseline", "8 labels", 1),
        ("baseline, 3 epochs", "8 labels", 3),
        ("gradaug", "8 labels", 1),
    ]
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and "gradaug gains" in table
    assert (tmp_path / "8-labels-gradaug-seed0" / "model.safetensors").is_file()

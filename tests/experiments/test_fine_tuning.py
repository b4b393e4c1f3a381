import csv
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from gradaug_hf.cli import main
from gradaug_hf.experiments.arguments import as_flags
from gradaug_hf.experiments.fine_tuning import make_plan, run
from gradaug_hf.experiments.fine_tuning_arguments import parse
from tests.helpers.checkpoints import save_network

ROOT = Path(__file__).parents[2]
COLOURS = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
QUICK = "--num_train_epochs 1 --batch_size 8 --use_cpu --dataloader_num_workers 0 --disable_tqdm true --report_to none"


def save_photos(folder: Path, each: int, size: tuple[int, int] = (40, 50)) -> str:
    """Noisy photos in the colour of their class."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(colour + generator.normal(0, 30, (*size, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return save_photos(tmp_path_factory.mktemp("data") / "photos", 10)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """A timm model of another number of classes."""
    return save_network(tmp_path_factory.mktemp("models") / "resnet", 0, 7, "test_resnet")


def fine_tune(monkeypatch, folder: Path, model: str, flags: str) -> Path:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "fine_tune.py", raising=False)
    main(["fine-tune", *f"--model {model} --output_dir {folder / 'out'} {QUICK} {flags}".split()])
    return folder / "out"


def test_one_command_ends_with_a_model_and_what_to_look_at(monkeypatch, capsys, tmp_path, photos, backbone):
    monkeypatch.chdir(tmp_path)
    flags = f"--dataset_name {photos} --image_size 32 --num_train_epochs 8 --learning_rate 3e-3 --ema_decay 0.9"
    out = fine_tune(monkeypatch, tmp_path, backbone, f"{flags} --class_weights balanced --random_erasing 0.2")
    printed = capsys.readouterr().out
    assert (
        "24 photos of 3 classes to train on, 6 to evaluate on, held out: a fifth of each class, by seed 42" in printed
    )
    (result,) = json.loads((out / "results.json").read_text())["runs"]
    with (out / "classes.csv").open(newline="") as stream:
        classes = list(csv.DictReader(stream))
    assert [row["class"] for row in classes] == list(COLOURS) and {row["images"] for row in classes} == {"2"}
    assert sum(int(row["correct"]) for row in classes) / 6 == pytest.approx(result["top1"])
    assert result["top1"] >= 4 / 6 and result["method"] == "gradaug"
    card = (out / "README.md").read_text()
    assert "| class | most often taken for | images | accuracy % |\n" in card
    assert "Measured on 6 images of photos, after 24 steps" in card  # of no split: they were held out of the only one
    for name in ("examples.png", "confusion.png", "mistakes.png", "curves.png"):
        assert (out / "plots" / name).is_file() and f"(plots/{name})" in card
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 3
    pretrained_cfg = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert pretrained_cfg["input_size"] == [3, 32, 32]
    assert pretrained_cfg["crop_pct"] == 0.8  # of images smaller than the model's own
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_preview_writes_examples_and_stops(monkeypatch, capsys, tmp_path, photos, backbone):
    out = fine_tune(monkeypatch, tmp_path, backbone, f"--dataset_name {photos} --image_size 32 --preview")
    assert [str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()] == ["plots/examples.png"]
    assert "examples.png: look whether the labels are right" in capsys.readouterr().out


def plan_of(folder: Path, model: str, photos: str, flags: str):
    line = f"--model {model} --dataset_name {photos} --output_dir {folder} {QUICK} --compare {flags}"
    args, config, comparison = parse(line.split())
    return make_plan(args, config, comparison)


def test_gradaug_is_compared_with_plain_training_as_long_and_at_equal_compute(tmp_path, photos, backbone):
    flags = "--image_size 56 --num_train_epochs 10 --num_subnets 3 --min_width 0.8 --seed 5 --seeds 2 --labels 8 24"
    plan = plan_of(tmp_path, backbone, photos, flags)
    # 1 + (1 + (6/7)² + (5/7)² + (4/7)²) / 4 times (0.64 + 2 (0.64 + 0.8 + 1) / 3) = 2.47
    assert list(plan.rows) == ["plain", "plain, 25 epochs", "GradAug"]
    assert plan.others == {"plain": "plain training", "plain, 25 epochs": "plain training of equal compute"}
    assert (plan.row, plan.images) == ("GradAug", 6)
    runs = {(run.row, run.column, run.seed): dict(run.settings) for run in plan.runs()}
    assert len(runs) == 3 * 2 * 2
    ours, longer = (runs[row, "8 labels", 6] for row in ("GradAug", "plain, 25 epochs"))
    own = {"max_train_samples": 8, "eval_strategy": "no", "min_width": 0.8, "num_train_epochs": 10, "seed": 6}
    assert own.items() <= ours.items() and ours["num_subnets"] == 3
    assert (longer["num_subnets"], longer["num_train_epochs"]) == (0, 25) and "min_width" not in longer
    assert all(parse(as_flags({**settings, "output_dir": "out"})) for settings in runs.values())


def test_equal_compute_is_that_of_the_resolutions_that_the_model_takes(tmp_path, photos):
    ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    flags = "--image_size 32 --num_train_epochs 10 --num_subnets 1"
    with pytest.warns(UserWarning, match="takes images of 32 pixels alone"):
        plan = plan_of(tmp_path / "out", str(tmp_path / "vit"), photos, flags)
    assert "plain, 18 epochs" in plan.rows  # 1 + 0.9²


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--labels 100", "labels holds 100, but there are 24 images to train on"),
        ("--labels 8 4", "batch_size is 8, but there are 4 images"),
        ("--auto_augment strong", "auto_augment is 'strong', which timm cannot read"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(tmp_path, photos, backbone, flags, message):
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, backbone, photos, f"--image_size 32 {flags}")


@pytest.mark.slow
def test_a_comparison_trains_each_run_in_a_process_of_its_own_and_ends_with_a_verdict(
    monkeypatch, capfd, tmp_path, photos, backbone
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = f"--dataset_name {photos} --image_size 32 --num_subnets 3 --compare --seeds 1"
    flags += f" --launch {shlex.quote(sys.executable)}"
    out = fine_tune(monkeypatch, tmp_path, backbone, flags)
    printed = capfd.readouterr().out
    table = (out / "table.md").read_text()
    assert table in printed and "3 runs, 0 of them finished before" in printed
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")] == [
        "", "plain", "plain, 3 epochs", "GradAug", "", "GradAug over plain", "GradAug over plain, 3 epochs",
    ]  # fmt: skip
    assert re.search(
        r"GradAug gains .* points over plain .* equal compute with one seed: not told apart; 6 evaluation images",
        table,
    )
    records = json.loads((out / "summary.json").read_text())
    assert [(r["row"], r["seed"], r["steps"]) for r in records] == [
        ("plain", 42, 3),
        ("plain, 3 epochs", 42, 9),
        ("GradAug", 42, 3),
    ]
    card = (out / "GradAug-seed42" / "README.md").read_text()
    assert "gradaug fine-tune --" in card and "--seed 42" in card
    assert (out / "summary.png").is_file() and (out / "plain-seed42" / "classes.csv").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    fine_tune(monkeypatch, tmp_path, backbone, flags)
    assert "3 runs, 3 of them finished before" in capfd.readouterr().out


def test_two_folders_are_trained_and_evaluated_on_as_they_are(monkeypatch, capsys, tmp_path, photos, backbone):
    validation = save_photos(tmp_path / "validation", 2)
    flags = f"--train_dir {photos} --validation_dir {validation} --image_size 32 --num_subnets 0"
    out = fine_tune(monkeypatch, tmp_path, backbone, f"{flags} --freeze backbone")
    assert "30 photos of 3 classes to train on, 6 to evaluate on\n" in capsys.readouterr().out
    (result,) = json.loads((out / "results.json").read_text())["runs"]
    assert result["method"] == "plain"


def test_the_split_follows_from_the_seed(monkeypatch, capsys, tmp_path, photos, backbone):
    def evaluated(seed: int) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shown = []
        monkeypatch.setattr("gradaug_hf.experiments.fine_tuning.plot_examples", shown.append)
        fine_tune(monkeypatch, folder, backbone, f"--dataset_name {photos} --image_size 32 --preview --seed {seed}")
        return [image["path"] for image in shown[0].eval_dataset.with_format(None)["image"]]

    assert evaluated(1) == evaluated(1) != evaluated(2)


def test_a_run_of_a_comparison_that_was_interrupted_ends_as_if_it_had_not_been(
    monkeypatch, tmp_path, photos, backbone
):
    flags = f"--dataset_name {photos} --image_size 32 --num_train_epochs 2 --save_total_limit 2 --ema_decay 0.9"
    out = fine_tune(monkeypatch, tmp_path, backbone, flags)
    expected = load_file(out / "model.safetensors")
    for name in ("results.json", "model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-6")
    fine_tune(monkeypatch, tmp_path, backbone, f"{flags} --resume_from_checkpoint last")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_vision_transformer_is_fine_tuned_and_predicts_as_its_pipeline(monkeypatch, tmp_path, photos, kind: str):
    if kind == "timm":  # position embeddings of another size
        model, side = save_network(tmp_path / "vit", 0, 5, "test_vit"), 48
    else:  # a processor that squashes
        model, side = str(tmp_path / "vit"), 32
        ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(model)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model)
    crop = "--crop_pct 0.75" if kind == "timm" else ""
    flags = f"--dataset_name {photos} --image_size {side} --max_eval_samples 3 {crop}"
    out = fine_tune(monkeypatch, tmp_path, model, flags)
    if crop:
        assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.75
    main(["predict", str(out), photos, "--output", str(tmp_path / "found.csv"), "--batch_size", "7"])
    with (tmp_path / "found.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    classify = pipeline("image-classification", model=str(out))
    assert len(found) == 30
    for row in found[::10]:
        expected = classify(row["file"], top_k=3)
        names = [("label", "probability"), ("label_2", "probability_2"), ("label_3", "probability_3")]
        assert [row[label] for label, _ in names] == [answer["label"] for answer in expected]
        shares = [float(row[share]) for _, share in names]
        assert shares == pytest.approx([answer["score"] for answer in expected], abs=2e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset_name {photos} --do_train false", "do_train is False, but fine-tuning trains"),
        ("--dataset_name {photos} --auto_augment strong", "auto_augment is 'strong', which timm cannot read"),
        ("--dataset_name {photos} --batch_size 80", "batch_size is 80, but there are 24 images"),
        ("--train_dir {photos} --validation_dir {photos}/red", "photos/red holds 10 images but no folders of classes"),
        ("--train_dir nowhere --validation_dir {photos}", "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    monkeypatch, tmp_path, photos, backbone, flags: str, message: str
):
    with pytest.raises(SystemExit) as ended:
        fine_tune(monkeypatch, tmp_path, backbone, f"--image_size 32 {flags.format(photos=photos)}")
    assert message in str(ended.value.code) and "\n" not in str(ended.value.code)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_side_that_the_model_does_not_take_is_refused(monkeypatch, tmp_path, photos):
    ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(SystemExit, match="image_size is 40, which .*vit does not take: .*; leave image_size out"):
        fine_tune(monkeypatch, tmp_path, tmp_path / "vit", f"--dataset_name {photos} --image_size 40")


def test_processes_leave_their_group_once_all_is_pushed(tmp_path, monkeypatch):
    done = []
    for name in ("make_trainer", "plot_examples", "train_and_save", "report", "push", "leave_group"):
        monkeypatch.setattr(f"gradaug_hf.experiments.fine_tuning.{name}", lambda *_, name=name: done.append(name))
    run(["--model", "backbone", "--dataset_name", "photos", "--use_cpu", "--output_dir", str(tmp_path / "out")])
    assert done == ["make_trainer", "plot_examples", "train_and_save", "report", "push", "leave_group"]

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradaug_hf.detection.arguments import parse
from gradaug_hf.detection.detector import Detector
from gradaug_hf.detection.experiment import RECIPE, run
from gradaug_hf.experiments.run import SETTINGS
from tests.detection.conftest import content, write_coco  # noqa: F401  (fixtures)
from tests.detection.test_detector import classifier  # noqa: F401  (fixture)

ROOT = Path(__file__).parents[2]
SMALL = (
    "--backbone test_resnet --min_size 64 --max_size 96 --channels 16 --box_head_size 32 --rois_per_image 16 "
    "--batch_size 2 --eval_strategy no --save_strategy no --dataloader_num_workers 0 --use_cpu --disable_tqdm true"
)
SPLITS = "--train_annotations annotations/boxes_train.json --val_annotations annotations/boxes_train.json"


def run_recipe(flags: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["coco_maskrcnn.py", *flags.split()])
    run()


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_settings_are_those_of_torchvisions_training():
    args, detector, config = parse({**SETTINGS, **RECIPE}, None, [])
    assert (detector.detector, args.backbone, args.batch_size) == ("mask_rcnn", "resnet50", 16)
    assert (detector.min_size, detector.max_size, detector.anchor_scale, detector.channels) == (800, 1333, 8, 256)
    assert (config.num_train_epochs, config.learning_rate, config.weight_decay) == (12, 0.02, 1e-4)
    assert args.lr_drops == [8 / 12, 11 / 12]
    assert config.num_subnets == 0
    assert parse({**SETTINGS, **RECIPE}, None, ["--gradaug"])[-1].num_subnets == 3


def test_another_schedule_takes_the_place_of_the_drops_also_from_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr_scheduler_type: cosine\nlearning_rate: 1e-3\n")
    args, _, config = parse({**SETTINGS, **RECIPE}, None, [str(file), "--warmup_steps", "5"])
    assert (args.lr_drops, args.warmup_epochs) == ([], 0)
    assert (config.learning_rate, config.warmup_steps) == (1e-3, 5)


@pytest.mark.parametrize("method", ["", "--gradaug --num_subnets 2 --min_width 0.5"])
def test_a_run_writes_a_detector_that_is_evaluated_alike_later(write_coco, tmp_path, monkeypatch, capsys, method):  # noqa: F811
    write_coco()
    out, later = tmp_path / "out", tmp_path / "later"
    places = f"--coco_dir {tmp_path / 'coco'} {SPLITS}"
    run_recipe(f"{SMALL} {places} {method} --max_steps 3 --warmup_steps 1 --output_dir {out}", monkeypatch)
    printed = capsys.readouterr().out
    assert "backbone test_resnet: new weights" in printed
    assert "| box " in printed and "| mask " in printed
    found = results(out)
    assert found["results"]["steps"] == 3
    assert found["settings"]["num_subnets"] == (2 if method else 0)
    assert "pycocotools" in found["versions"]
    run_recipe(f"{places} --do_train false --do_eval --model {out} --use_cpu --output_dir {later}", monkeypatch)
    again = results(later)["results"]
    assert again == {name: value for name, value in found["results"].items() if "AP" in name}
    assert (later / "detections.json").read_text() == (out / "detections.json").read_text()


def test_a_checkpoint_of_gradaug_is_the_start(write_coco, classifier, tmp_path, monkeypatch, capsys):  # noqa: F811
    write_coco()
    flags = f"{SMALL} --backbone {classifier[1]} --coco_dir {tmp_path / 'coco'} {SPLITS} --detector faster_rcnn"
    run_recipe(f"{flags} --max_steps 1 --warmup_steps 0 --output_dir {tmp_path / 'out'}", monkeypatch)
    assert "left over: fc.weight, fc.bias" in capsys.readouterr().out
    assert "mask_AP" not in results(tmp_path / "out")["results"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coco_dir nowhere", "annotations/instances_train2017.json are neither in nowhere/train2017"),
        ("--do_train false --do_eval", "model is None"),
        ("--model somewhere", "model is 'somewhere', a detector to evaluate"),
        ("--do_train false --do_eval --model .", "config.json cannot be read"),
        ("--do_train false --do_eval --model nobody/nothing", "neither a folder nor on the Hub"),
        ("--flip 2", r"flip is 2.0; it must be in \[0, 1\]"),
        ("--backbone_args [1]", "backbone_args is '.1.'; it must be a JSON object"),
        ("--lr_drops 1.5", "lr_drops"),
        ("--batch_size 0", "batch_size is 0"),
    ],
)
def test_what_is_wrong_is_said_before_any_long_work(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run_recipe(f"{flags} --use_cpu --output_dir {tmp_path / 'out'}", monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["", "--gradaug --num_subnets 2 --resolutions 64 56 48"])
def test_a_detector_learns_its_training_images_by_heart(write_coco, tmp_path, monkeypatch, method):  # noqa: F811
    write_coco()
    flags = f"{SMALL} --coco_dir {tmp_path / 'coco'} {SPLITS} --channels 32 --anchor_scale 4 --flip 0 --batch_size 4"
    flags += " --optim adamw_torch --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 10 --max_steps 100"
    run_recipe(f"{flags} {method} --max_grad_norm 5 --output_dir {tmp_path / 'out'}", monkeypatch)
    found = results(tmp_path / "out")["results"]
    assert found["box_AP"] > 0.5
    assert found["mask_AP"] > 0.5


def test_a_run_on_photographs_ends(real_data, tmp_path, monkeypatch):
    flags = f"{SMALL} --coco_dir {real_data / 'coco-sample'} --gradaug --num_subnets 1"
    run_recipe(f"{flags} --max_steps 2 --warmup_steps 0 --output_dir {tmp_path}", monkeypatch)
    found = results(tmp_path)["results"]
    assert {"box_AP", "mask_AP"} <= found.keys()
    assert Detector.load(str(tmp_path)).settings.backbone == "test_resnet"


def run_in_two_processes(flags: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
    subprocess.run(
        [*launch, "--main_process_port", "0", "recipes/coco_maskrcnn.py", *flags.split()],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )


@pytest.mark.slow
def test_two_processes_find_what_one_does(write_coco, tmp_path, monkeypatch):  # noqa: F811
    write_coco()
    one, two = tmp_path / "one", tmp_path / "two"
    places = f"--coco_dir {tmp_path / 'coco'} {SPLITS}"
    places += " --per_device_eval_batch_size 1"
    run_recipe(f"{SMALL} {places} --max_steps 2 --warmup_steps 0 --output_dir {one}", monkeypatch)
    flags = f"{places} --do_train false --do_eval --model {one} --use_cpu"
    flags += f" --batch_size 2 --output_dir {two}"
    run_in_two_processes(flags)
    assert (two / "detections.json").read_text() == (one / "detections.json").read_text()


@pytest.mark.slow
def test_two_processes_train_with_subnetworks(write_coco, tmp_path):  # noqa: F811
    write_coco()
    flags = f"{SMALL} --coco_dir {tmp_path / 'coco'} {SPLITS} --gradaug --num_subnets 2 --min_width 0.5"
    flags += f" --max_steps 3 --warmup_steps 0 --output_dir {tmp_path / 'out'}"
    run_in_two_processes(flags)
    assert results(tmp_path / "out")["results"]["steps"] == 3
    Detector.load(str(tmp_path / "out"))

"""The detection recipe, from the command line to `results.json`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import set_seed

from gradaug_hf.data.seeded import SeededDataset
from gradaug_hf.detection.arguments import DetectionArguments, parse
from gradaug_hf.detection.coco import CocoImages, find_images
from gradaug_hf.detection.detector import Detector, DetectorSettings, create_detector
from gradaug_hf.detection.evaluation import precision_table
from gradaug_hf.detection.trainer import DetectionTrainer
from gradaug_hf.experiments.memory import PeakMemory
from gradaug_hf.experiments.recipe_trainer import RecipeTrainer
from gradaug_hf.experiments.results import RESULTS, check_free, run_context
from gradaug_hf.experiments.run import FAULTS, SETTINGS, check_batch, complete, hide_token
from gradaug_hf.hub.pushing import PushError
from gradaug_hf.trainer.checkpoints import ResumeError
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.launch import leave_group, process_state, use_all_cores

DETECTIONS = "detections.json"
DESCRIPTION = (
    "Mask R-CNN or Faster R-CNN with a feature pyramid on COCO, on a backbone of GradAug or trained with it. "
    "Prints COCO's average precision after the final epoch, and writes the detector, results.json and detections.json "
    "to --output_dir. Any images with annotations in COCO's format do."
)
# The settings of torchvision's training in 12 epochs, with batch norm that goes on learning its statistics.
RECIPE = {
    "num_train_epochs": 12,
    "batch_size": 16,
    "learning_rate": 0.02,
    "lr_drops": [8 / 12, 11 / 12],
    "warmup_epochs": 0.15,
    "weight_decay": 1e-4,
    "num_subnets": 3,
    "min_width": 0.9,
    "per_device_eval_batch_size": 4,
}


class DetectionRecipeTrainer(RecipeTrainer, DetectionTrainer):
    """Train as DetectionTrainer does, with the SGD and the learning rate of the recipes."""


def run(argv: Sequence[str] | None = None) -> None:
    """Train, or only evaluate, a detector by flags; None: those of this process.

    Prints average precision, and writes `results.json` and `detections.json`, COCO's result file.
    """
    with errors_as_messages(OSError, ValueError):
        argv = sys.argv[1:] if argv is None else argv
        args, settings, config = parse({**SETTINGS, **RECIPE}, DESCRIPTION, argv)
        hide_token(config.hub_token)
        use_all_cores()
        complete(args, config)
        check_free(config.output_dir, config.resume_from_checkpoint, args.overwrite_output_dir)
        trainer = make_trainer(args, settings, config)
    with errors_as_messages(ResumeError, PushError), errors_as_messages(*FAULTS, of_one_process=True):
        results = train(trainer) if config.do_train else {}
        figures = evaluate(trainer)
    if config.do_train:
        trainer.create_model_card()
    if config.should_save:
        used = asdict(args) | asdict(settings) | config.to_dict()
        write(results | figures, trainer.detections, used, config)
        print(f"\n{args.val_annotations}\n\n{precision_table(figures)}\n\nwrote {RESULTS} to {config.output_dir}")
    leave_group()


def train(trainer: DetectionRecipeTrainer) -> dict[str, float]:
    """Train and save the detector, and return its steps, seconds and peak memory in MiB."""
    with PeakMemory(trainer.args.device) as peak:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    seconds = trainer.training_seconds()
    trainer.save_model()
    return {"steps": trainer.state.global_step, "seconds": seconds, "peak_memory": peak.mebibytes}


def evaluate(trainer: DetectionRecipeTrainer) -> dict[str, float]:
    """Return the average precisions after the final step, in 0..1."""
    state = trainer.state
    logged = [entry for entry in state.log_history if entry["step"] == state.global_step and "eval_box_AP" in entry]
    metrics = logged[-1] if logged and trainer.detections is not None else trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if "_AP" in name}


def make_trainer(
    args: DetectionArguments, settings: DetectorSettings, config: GradAugConfig
) -> DetectionRecipeTrainer:
    """Make the detector, the data and the trainer of a run."""
    if config.do_train and args.model is not None:
        raise ValueError(
            f"model is {args.model!r}, a detector to evaluate; set do_train=False, or name a backbone to train"
        )
    set_seed(config.seed)
    if not config.do_train:
        if args.model is None:
            raise ValueError("model is None, and do_train False; name the detector to evaluate")
        detector = Detector.load(args.model)
        return DetectionRecipeTrainer(
            detector, config, eval_dataset=load_images(args, "val", detector.settings.has_masks)
        )
    train, val = (load_images(args, split, settings.has_masks) for split in ("train", "val"))
    if train.categories != val.categories:
        raise ValueError(f"{args.train_annotations} and {args.val_annotations} have different categories")
    check_batch(args.batch_size, len(train))
    detector, loaded = create_detector(
        args.backbone, train.categories, json.loads(args.backbone_args), **asdict(settings)
    )
    process_state().print(loaded)
    return DetectionRecipeTrainer(
        detector,
        config,
        train_dataset=SeededDataset(train, config.seed),  # an image is flipped alike in a training that is resumed
        eval_dataset=val,
        lr_drops=args.lr_drops,
    )


def load_images(args: DetectionArguments, split: str, masks: bool) -> CocoImages:
    """Return the images of a split, "train" or "val"; the former are flipped at random."""
    folder, annotations = Path(args.coco_dir), Path(args.coco_dir) / getattr(args, f"{split}_annotations")
    images = getattr(args, f"{split}_images")
    images = find_images(folder, annotations) if images is None else folder / images
    return CocoImages(annotations, images, masks, args.flip if split == "train" else 0.0)


def write(
    results: dict[str, Any], detections: list[dict[str, Any]], used: dict[str, Any], config: GradAugConfig
) -> None:
    """Write `results.json`, with what is needed to get them again, and `detections.json`."""
    folder = Path(config.output_dir)
    content = run_context(used, config.device) | {"results": results}
    content["versions"]["pycocotools"] = version("pycocotools")
    (folder / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / DETECTIONS).write_text(json.dumps(detections) + "\n", encoding="utf-8")

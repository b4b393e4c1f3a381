"""The detection recipe, from the command line to `results.json`."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import set_seed

from gradaug_hf.data.seeded import SeededDataset
from gradaug_hf.detection.arguments import DetectionArguments, parse
from gradaug_hf.detection.coco import CocoImages, find_images
from gradaug_hf.detection.detector import Detector, create_detector
from gradaug_hf.detection.evaluation import precision_table
from gradaug_hf.detection.trainer import DetectionTrainer
from gradaug_hf.experiments.memory import PeakMemory
from gradaug_hf.experiments.results import RESULTS, run_context
from gradaug_hf.experiments.run import FAULTS, SETTINGS, RecipeTrainer, complete_config, errors_as_messages
from gradaug_hf.hub.pushing import PushError
from gradaug_hf.trainer.checkpoints import ResumeError
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.launch import process_state
from gradaug_hf.utils.threads import use_all_cores

DETECTIONS = "detections.json"
# Of a new detector; a trained one brings its own.
DETECTOR_SETTINGS = (
    "detector",
    "min_size",
    "max_size",
    "anchor_scale",
    "channels",
    "box_head_size",
    "rois_per_image",
)


class DetectionRecipeTrainer(RecipeTrainer, DetectionTrainer):
    """DetectionTrainer with the SGD and the learning rate of the recipes."""


def run(settings: Mapping[str, Any], description: str | None) -> None:
    """Train, or only evaluate, as the command line says.

    Prints average precision, and writes `results.json` and `detections.json`, COCO's result file.

    Args:
        settings: of DetectionArguments and GradAugConfig, by name.
        description: shown by --help.
    """
    with errors_as_messages(OSError, ValueError):
        args, config = parse({**SETTINGS, **settings}, description, sys.argv[1:])
        use_all_cores()
        if config.output_dir is None:
            method = "gradaug" if args.gradaug else "plain"
            name = Path(args.model or args.backbone).name
            config.output_dir = str(Path("outputs") / f"{args.detector}-{name}-{method}-seed{config.seed}")
        complete_config(config, args.batch_size, args.warmup_epochs)
        trainer = make_trainer(args, config)
    with errors_as_messages(ResumeError, PushError), errors_as_messages(*FAULTS, of_one_process=True):
        results = train(trainer) if config.do_train else {}
        figures = evaluate(trainer)
    if config.do_train:
        trainer.create_model_card()
    if config.should_save:
        write(results | figures, trainer.detections, args, config)
        print(f"\n{args.val_annotations}\n\n{precision_table(figures)}\n\nwrote {RESULTS} to {config.output_dir}")


def train(trainer: DetectionRecipeTrainer) -> dict[str, float]:
    """Train and save the detector; steps, seconds and peak memory in MiB."""
    with PeakMemory(trainer.args.device) as peak:
        output = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    seconds = output.metrics["train_runtime"] - trainer.evaluation_seconds
    return {"steps": output.global_step, "seconds": seconds, "peak_memory": peak.mebibytes}


def evaluate(trainer: DetectionRecipeTrainer) -> dict[str, float]:
    """Average precisions after the final step, in 0..1."""
    state = trainer.state
    logged = [entry for entry in state.log_history if entry["step"] == state.global_step and "eval_box_AP" in entry]
    metrics = logged[-1] if logged and trainer.detections is not None else trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if "_AP" in name}


def make_trainer(args: DetectionArguments, config: GradAugConfig) -> DetectionRecipeTrainer:
    """Detector, data and trainer of a run.

    Raises:
        ValueError: the arguments do not fit each other, or a file of theirs is missing or not what it should be.
    """
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
    masks = args.detector == "mask_rcnn"
    train, val = load_images(args, "train", masks), load_images(args, "val", masks)
    if train.categories != val.categories:
        raise ValueError(f"{args.train_annotations} and {args.val_annotations} have different categories")
    detector, loaded = create_detector(
        args.backbone,
        train.categories,
        json.loads(args.backbone_args),
        **{name: getattr(args, name) for name in DETECTOR_SETTINGS},
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
    """The images of a split, "train" or "val"; the former are flipped at random."""
    folder, annotations = Path(args.coco_dir), Path(args.coco_dir) / getattr(args, f"{split}_annotations")
    images = getattr(args, f"{split}_images")
    images = find_images(folder, annotations) if images is None else folder / images
    return CocoImages(annotations, images, masks, args.flip if split == "train" else 0.0)


def write(
    results: dict[str, Any], detections: list[dict[str, Any]], args: DetectionArguments, config: GradAugConfig
) -> None:
    """Write `results.json`, with what is needed to get them again, and `detections.json`."""
    folder = Path(config.output_dir)
    content = run_context(asdict(args) | config.to_dict(), config.device) | {"results": results}
    content["versions"]["pycocotools"] = version("pycocotools")
    (folder / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / DETECTIONS).write_text(json.dumps(detections) + "\n", encoding="utf-8")

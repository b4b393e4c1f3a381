"""Fine-tuning of a pretrained model on one's own photos, from the command line to the plots of what it got wrong."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import set_seed

from gradaug_hf.data.backbone_transforms import ProcessorTransform, augmenting_transform
from gradaug_hf.data.bad_images import SkippingDataset
from gradaug_hf.data.columns import label_values
from gradaug_hf.data.decoding import decode, with_pixels
from gradaug_hf.data.loading import check_one_class, class_names, load_image_data, load_two_folders
from gradaug_hf.data.seeded import SeededDataset
from gradaug_hf.experiments.backbone import check_side, freeze_backbone, load_backbone
from gradaug_hf.experiments.comparison import Comparison, make_comparison
from gradaug_hf.experiments.fine_tuning_arguments import ComparisonArguments, FineTuningArguments, parse
from gradaug_hf.experiments.fine_tuning_trainer import FineTuningTrainer
from gradaug_hf.experiments.lora import add_adapters
from gradaug_hf.experiments.memory import check_memory
from gradaug_hf.experiments.methods import PLAIN
from gradaug_hf.experiments.run import (
    CHANGEABLE,
    FAULTS,
    check_batch,
    complete,
    first_on_main_process,
    hide_token,
    push,
    wanted_images,
)
from gradaug_hf.experiments.run import train as train_and_save
from gradaug_hf.experiments.sweep import train_and_report
from gradaug_hf.hub.networks import image_processor, pretrained_source
from gradaug_hf.hub.preprocessing import image_processor_doing, input_config, processor_data_config
from gradaug_hf.hub.pushing import PushError
from gradaug_hf.objective.class_weights import balanced_weights
from gradaug_hf.objective.resolutions import ResolutionTrial
from gradaug_hf.reports.photos import (
    CONFUSION,
    EXAMPLES,
    MISTAKES,
    as_photo,
    mistake_caption,
    plot_confusion,
    plot_photos,
    save_plot,
)
from gradaug_hf.reports.plots import NEEDS_MATPLOTLIB, PLOTS, can_plot
from gradaug_hf.reports.predictions import (
    Predictions,
    class_results,
    class_table,
    predictions_of,
    worst_mistakes,
    write_class_results,
)
from gradaug_hf.trainer.checkpoints import ResumeError
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.launch import leave_group, process_state, use_all_cores

CLASSES = "classes.csv"
EXAMPLES_SHOWN = 16
# Largest size in pixels at which a photo is plotted.
THUMBNAIL = (512, 512)
# Of FineTuningArguments, what a training that is resumed may change.
CHANGEABLE_HERE = (*CHANGEABLE, "validation_dir", "preview")


def run(argv: Sequence[str] | None = None) -> None:
    """Fine-tune as the command line says, print accuracies, and write the model and what to look at; or compare.

    Args:
        argv: flags, after the name of a YAML or JSON file if there is one; None: those of this process.
    """
    with errors_as_messages(OSError, ValueError):
        args, config, comparison = parse(sys.argv[1:] if argv is None else argv)
        hide_token(config.hub_token)
        use_all_cores()
        if not config.do_train:
            raise ValueError("do_train is False, but fine-tuning trains; `gradaug predict` applies a model")
        complete(args, config)
        if comparison.compare:
            plan = make_plan(args, config, comparison)
            return train_and_report(plan, Path(config.output_dir), comparison.launch)
        if args.preview and not can_plot():
            raise ValueError(NEEDS_MATPLOTLIB)
        trainer = make_trainer(args, config)
        plot_examples(trainer)
        if args.preview:
            return
    with errors_as_messages(ResumeError, PushError), errors_as_messages(*FAULTS, of_one_process=True):
        train_and_save(trainer, args)
        report(trainer)
        push(trainer)
        leave_group()


def make_plan(args: FineTuningArguments, config: GradAugConfig, comparison: ComparisonArguments) -> Comparison:
    """Return the runs of a comparison, checked before the first of them is trained."""
    if config.world_size > 1:
        raise ValueError(
            f"compare is True in {config.world_size} processes, but it starts those of each run; start it in one, and "
            "name the launcher as launch"
        )
    made = trainer_arguments(args, config)
    images = len(made["train_dataset"])
    for labels in comparison.labels:
        if labels > images:
            raise ValueError(f"labels holds {labels}, but there are {images:,} images to train on")
        check_batch(args.batch_size, labels)
    side = processor_data_config(made["processing_class"])["input_size"][-1]
    config.resolutions = config.resolutions or ResolutionTrial(made["model"]).default(side)  # of which it has the cost
    return make_comparison(
        __spec__.name,
        {"GradAug": {}},
        plain="plain",
        plain_settings=PLAIN,
        gradaug="GradAug",
        config=config,
        side=side,
        seeds=range(config.seed, config.seed + comparison.seeds),
        settings={"eval_strategy": "no", **comparison.settings},
        columns={f"{labels} labels": {"max_train_samples": labels} for labels in comparison.labels} or {"": {}},
        images=len(made["eval_dataset"]),
    )


def make_trainer(args: FineTuningArguments, config: GradAugConfig) -> FineTuningTrainer:
    """Make the model, the data and the trainer of a run."""
    return FineTuningTrainer(args=config, **trainer_arguments(args, config))


def trainer_arguments(args: FineTuningArguments, config: GradAugConfig) -> dict[str, Any]:
    """Make the model and the data of a run, and return them as keyword arguments of its trainer.

    Raises:
        OSError: the dataset cannot be found, reached or read.
        ValueError: the arguments do not fit the model or the data, or the model cannot be loaded.
    """
    source = pretrained_source(args.model)
    data = first_on_main_process(lambda: load_data(args, config.seed))
    check_batch(args.batch_size, len(data["train"]))
    names = class_names(data)
    set_seed(config.seed)
    model = load_backbone(source, names, args.image_size)
    if args.freeze == "backbone":
        freeze_backbone(model)
    inputs = input_config(model, image_processor(source), args.image_size, args.crop_pct)
    check_side(model, args.model, inputs["input_size"])
    if args.lora_rank is not None:
        add_adapters(model, args.lora_rank, inputs["input_size"])
    check_memory(model, config.per_device_train_batch_size, inputs["input_size"][-1], config)
    processor = image_processor_doing(inputs, model)
    augmented = with_pixels(
        data["train"],
        augmenting_transform(
            inputs, hflip=args.hflip, auto_augment=args.auto_augment, random_erasing=args.random_erasing
        ),
    )
    weights = (
        balanced_weights(label_values(data["train"]).tolist(), len(names))
        if args.class_weights == "balanced"
        else None
    )
    return {
        "model": model,
        "train_dataset": SeededDataset(SkippingDataset(augmented) if args.skip_bad_images else augmented, config.seed),
        "eval_dataset": with_pixels(data["eval"], ProcessorTransform(processor)),
        "compute_metrics": topk_accuracy,
        "processing_class": processor,
        "layer_decay": args.layer_decay,
        "ema_decay": args.ema_decay,
        "class_weights": weights,
        "freeze_statistics": args.freeze == "batch_norm",
        "card_metadata": {
            "dataset": args.dataset_name or args.train_dir,
            "dataset_args": args.dataset_config_name,
            "finetuned_from": source,
        },
        "experiment": {name: value for name, value in asdict(args).items() if name not in CHANGEABLE_HERE},
    }


def load_data(args: FineTuningArguments, seed: int) -> DatasetDict:
    """Load the photos to train on and to evaluate on, and say how many there are and what was held out."""
    if args.validation_dir is not None:
        data = load_two_folders(args.train_dir, args.validation_dir, label_column=args.label_column)
    else:
        data = load_image_data(args.dataset_name or args.train_dir, seed=seed, **args.loading_options())
    check_one_class(data)
    held_out = args.validation_dir is None and data["eval"].split == data["train"].split
    data = wanted_images(data, args, seed)
    if process_state().is_main_process:
        origin = f", held out: a fifth of each class, by seed {seed}" if held_out else ""
        print(
            f"{len(data['train']):,} photos of {len(class_names(data))} classes to train on, {len(data['eval']):,} to "
            f"evaluate on{origin}"
        )
    return data


def plot_examples(trainer: FineTuningTrainer) -> None:
    """Plot some training images as the model sees them in the first epoch, `plots/examples.png`."""
    if not trainer.is_world_process_zero() or not can_plot():
        return
    dataset, names = trainer.train_dataset, trainer.train_dataset.features["label"].names
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(trainer.args.seed))
    examples = dataset.__getitems__(order[:EXAMPLES_SHOWN].tolist())
    normalised = processor_data_config(trainer.processing_class)
    photos = [as_photo(example["pixel_values"], normalised["mean"], normalised["std"]) for example in examples]
    captions = [names[example["labels"]] for example in examples]
    height, width = photos[0].shape[:2]
    file = Path(trainer.args.output_dir) / PLOTS / EXAMPLES
    save_plot(plot_photos(photos, captions, f"training images as the model sees them, {width}×{height} pixels"), file)
    print(f"wrote {file}: look whether the labels are right, and the photos still show what they are of")


def report(trainer: FineTuningTrainer) -> None:
    """Print the accuracy of each class, and write `classes.csv`, plots of the mistakes, and the card with them."""
    output = trainer.predict(trainer.eval_dataset)
    if not trainer.is_world_process_zero():
        return
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    predictions = predictions_of(logits, output.label_ids, trainer.eval_dataset.features["label"].names)
    folder = Path(trainer.args.output_dir)
    results = class_results(predictions)
    write_class_results(results, folder / CLASSES)
    trainer.class_table = class_table(results)
    print(f"\n{trainer.class_table}\n")
    if can_plot():
        save_plot(plot_confusion(predictions), folder / PLOTS / CONFUSION)
        plot_mistakes(trainer, predictions, folder / PLOTS / MISTAKES)
        print(f"wrote {CLASSES}, and {CONFUSION} and {MISTAKES} in {folder / PLOTS}")
    else:
        warnings.warn(f"{folder / PLOTS} is not written: {NEEDS_MATPLOTLIB}", stacklevel=2)
    trainer.create_model_card()


def plot_mistakes(trainer: FineTuningTrainer, predictions: Predictions, file: Path) -> None:
    """Plot the most wrong evaluation photos with what was predicted and what they are."""
    split = trainer.eval_dataset.with_format(None)
    indices = worst_mistakes(predictions)
    rows = [split[index] for index in indices]
    photos = [decode(row["image"], row["row"], str(split.split)) for row in rows]
    for photo in photos:
        photo.thumbnail(THUMBNAIL)
    captions = [
        mistake_caption(predictions, index, row["image"]["path"]) for index, row in zip(indices, rows, strict=True)
    ]
    wrong = int((predictions.predicted != predictions.labels).sum())
    which = f"the {len(indices)} most wrong of {wrong}" if wrong > len(indices) else f"all {wrong}"
    save_plot(plot_photos(photos, captions, f"{which} mistakes on {len(split):,} photos"), file)


if __name__ == "__main__":  # a run of a comparison, whose command is that of one training
    flags = sys.argv[1:]
    sys.argv[:1] = ["gradaug", "fine-tune"]
    run(flags)

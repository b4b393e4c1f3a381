"""Recipes from the command line to `results.json`."""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from gradaug_hf.data.bad_images import SkippingDataset, readable_images
from gradaug_hf.data.decoding import UnreadableImageError, with_pixels
from gradaug_hf.data.loading import (
    SHUFFLE_BUFFER,
    balanced_subset,
    check_one_class,
    class_names,
    load_image_data,
    number_of_images,
    stream_image_data,
    take_images,
)
from gradaug_hf.data.seeded import SeededDataset, SeededStream
from gradaug_hf.data.shards import shard_lengths
from gradaug_hf.data.streaming import ShardedStream
from gradaug_hf.data.transforms import Transform
from gradaug_hf.experiments.arguments import ExperimentArguments, ScheduleArguments, TrainingDataArguments, parse
from gradaug_hf.experiments.memory import PeakMemory, check_memory
from gradaug_hf.experiments.methods import NETWORK_ARGUMENTS, check_method
from gradaug_hf.experiments.recipe_trainer import RecipeTrainer
from gradaug_hf.experiments.results import RESULTS, check_free, results_table, save_results, widths_table
from gradaug_hf.hub.networks import (
    accepted_arguments,
    create_network,
    image_processor,
    is_checkpoint,
    load_network,
    pixel_statistics,
)
from gradaug_hf.hub.preprocessing import as_its_pipeline, image_processor_of
from gradaug_hf.hub.pushing import PushError
from gradaug_hf.objective.transforms import RandomQuarterTurn
from gradaug_hf.reports.runs import Result
from gradaug_hf.trainer.checkpoints import CheckpointError, ResumeError
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.loss_watch import NonFiniteLossError
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.launch import leave_group, process_state, use_all_cores

# The paper's optimiser and schedule, and what a run shows and keeps.
SETTINGS = {
    "optim": "sgd",
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.0,
    "do_train": True,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": False,
    "per_device_eval_batch_size": 100,
    "dataloader_num_workers": min(8, os.cpu_count() or 1),
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
Loaded = TypeVar("Loaded")
LAST = "last"
# Errors while training that the user can do something about.
FAULTS = (CheckpointError, NonFiniteLossError, UnreadableImageError, torch.OutOfMemoryError)
# Of ExperimentArguments, what a training that is resumed may change.
CHANGEABLE = ("batch_size", "eval_split", "max_eval_samples", "skip_bad_images", "overwrite_output_dir")


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper.

    Args:
        settings: of ExperimentArguments and GradAugConfig, by name.
        methods: what each method sets, by name.
        transform: makes the transform of an image from whether to augment, `mean` and `std`.
        description: shown by --help.
        initialise: gives a new model the paper's initial weights; None keeps the model's own.
    """

    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    transform: Callable[..., Transform]
    description: str | None
    initialise: Callable[[nn.Module], None] | None = None

    def image_side(self) -> int:
        """Return the side in pixels of the images that the model is trained and evaluated on."""
        return self.transform(False)(PIL.Image.new("RGB", (256, 256))).shape[-1]


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Train, or only evaluate, by flags (None: this process's), print accuracies and write `results.json`."""
    with errors_as_messages(OSError, ValueError):
        argv = sys.argv[1:] if argv is None else argv
        args, config = parse({**SETTINGS, **recipe.settings}, recipe.methods, recipe.description, argv)
        hide_token(config.hub_token)
        use_all_cores()
        complete(args, config)
        trainer = make_trainer(recipe, args, config)
    with errors_as_messages(ResumeError, PushError), errors_as_messages(*FAULTS, of_one_process=True):
        if config.do_train:
            train(trainer, args)
            push(trainer)
        else:
            evaluate(trainer, args)
        leave_group()


def hide_token(token: str | None) -> None:
    """Take a token out of the command line, which results, model cards and loggers keep."""
    if token:
        sys.argv[:] = [word.replace(token, "<HUB_TOKEN>") for word in sys.argv]


def complete(args: ScheduleArguments, config: GradAugConfig) -> None:
    """Settle the Trainer's settings that follow from those of a recipe.

    Raises:
        ValueError: the settings do not fit each other or the number of processes, or the folder holds other results.
    """
    if not (config.do_train or config.do_eval):
        raise ValueError("do_train and do_eval are both False, so there is nothing to do")
    if config.load_best_model_at_end:
        raise ValueError("load_best_model_at_end is True, but results are those of the final epoch; leave it out")
    if config.max_steps < 1 and config.max_steps != -1:
        raise ValueError(
            f"max_steps is {config.max_steps}; it must be at least 1, or -1, which num_train_epochs decides"
        )
    if config.do_train and config.max_steps == -1 and not config.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs is {config.num_train_epochs}; it must be above 0")
    devices = config.world_size * max(1, config.n_gpu)
    batches = devices * config.gradient_accumulation_steps
    if args.batch_size % batches:
        raise ValueError(
            f"batch_size is {args.batch_size}, which {devices} processes with gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} cannot share; it must be a multiple of {batches}"
        )
    config.per_device_train_batch_size = args.batch_size // batches
    config.dataloader_persistent_workers &= config.dataloader_num_workers > 0
    if args.warmup_epochs >= config.num_train_epochs and args.warmup_epochs > 0:
        raise ValueError(f"warmup_epochs is {args.warmup_epochs}; it must be below num_train_epochs")
    if args.warmup_epochs > 0:
        config.warmup_steps = args.warmup_epochs / config.num_train_epochs
    if config.resume_from_checkpoint == LAST:
        config.resume_from_checkpoint = (
            get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
        )
        if config.resume_from_checkpoint is None:
            raise ValueError(f"resume_from_checkpoint is {LAST!r}, but {config.output_dir} holds no checkpoint")
    if config.do_train:
        check_free(config.output_dir, config.resume_from_checkpoint, args.overwrite_output_dir)


def check_batch(batch_size: int, images: int | None) -> None:
    """Raise a ValueError where a step takes more images than there are to train on."""
    if images is not None and batch_size > images:
        raise ValueError(
            f"batch_size is {batch_size}, but there are {images} images to train on; it must be at most as many, with "
            "a learning_rate for it"
        )


def make_trainer(recipe: Recipe, args: ExperimentArguments, config: GradAugConfig) -> RecipeTrainer:
    """Make the model, the data and the trainer of a run.

    Raises:
        OSError: the dataset cannot be found, reached or read.
        ValueError: the arguments do not fit the model or the data.
    """
    arguments = {name: getattr(args, name) for name in NETWORK_ARGUMENTS}
    if config.do_train:
        accepted = accepted_arguments(args.model)
        check_method(args.method, recipe.methods, arguments, args.model, accepted)
        arguments = {name: value for name, value in arguments.items() if value is not None and name in accepted}
    data = first_on_main_process(lambda: load_data(args, config.seed))  # and then on the others from its cache
    images = images_to_train_on(args, data["train"])
    if config.do_train:
        check_batch(args.batch_size, images)
        if not divides_itself(data["train"], args):
            settle_steps(args, config, images)

    set_seed(config.seed)
    if config.do_train:
        model = create_network(args.model, class_names(data), arguments)
        if recipe.initialise is not None and not is_checkpoint(args.model):
            recipe.initialise(model)
        check_memory(model, config.per_device_train_batch_size, recipe.image_side(), config)
    else:
        model = load_network(args.model, class_names(data))
    statistics = pixel_statistics(model, image_processor(args.model))
    evaluation = as_its_pipeline(recipe.transform(False, **statistics), model)
    card = {"dataset": args.dataset_name, "dataset_args": args.dataset_config_name}
    if is_checkpoint(args.model):
        card["finetuned_from"] = args.model
    return RecipeTrainer(
        model,
        config,
        train_dataset=training_images(data["train"], recipe.transform(True, **statistics), args, config),
        eval_dataset=with_pixels(data["eval"], evaluation),
        compute_metrics=topk_accuracy,
        processing_class=image_processor_of(evaluation, model),
        subnet_transform=RandomQuarterTurn() if args.subnet_rotation else None,
        card_metadata=card,
        lr_drops=args.lr_drops,
        experiment={name: value for name, value in asdict(args).items() if name not in CHANGEABLE},
    )


def training_images(
    split: Dataset | IterableDataset, transform: Transform, args: ExperimentArguments, config: GradAugConfig
) -> SeededDataset | ShardedStream | SeededStream:
    """Return images to train on, whose augmentation follows from the seed, so that a run can be resumed exactly."""
    seed = config.seed
    if args.streaming:
        if divides_itself(split, args):
            return ShardedStream(
                split,
                shard_lengths(split),
                transform,
                batch_size=config.per_device_train_batch_size,
                seed=seed,
                buffer_size=SHUFFLE_BUFFER,
                rank=config.process_index,
                world_size=config.world_size,
            )
        shuffled = split.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return SeededStream(with_pixels(shuffled, transform), seed)
    images = with_pixels(split, transform)
    return SeededDataset(SkippingDataset(images) if args.skip_bad_images else images, seed)


def first_on_main_process(load: Callable[[], Loaded]) -> Loaded:
    """Load on the main process first; each process fails for a reason of its own."""
    failure = None
    with process_state().main_process_first():
        try:
            loaded = load()
        except (OSError, ValueError) as error:  # raised once nobody waits, so that each process fails for this reason
            failure = error
    if failure is not None:
        raise failure
    return loaded


def load_data(args: ExperimentArguments, seed: int) -> DatasetDict | IterableDatasetDict:
    """Load the images to train on and to evaluate on, as many of them as are asked for."""
    options = args.loading_options() | {"class_map": args.class_map}
    if args.streaming:
        data = stream_image_data(args.dataset_name, **options)
    else:
        data = load_image_data(args.dataset_name, seed=seed, **options)
    check_one_class(data)
    if args.labels_per_class is not None:
        if args.streaming:
            raise ValueError("labels_per_class needs to see all labels first; leave out streaming")
        data["train"] = balanced_subset(data["train"], args.labels_per_class, seed)
    return wanted_images(data, args, seed)


def wanted_images(
    data: DatasetDict | IterableDatasetDict, args: TrainingDataArguments, seed: int
) -> DatasetDict | IterableDatasetDict:
    """Return as many images as are asked for, those to evaluate on without bad ones where these are skipped."""
    data["train"] = take_images(data["train"], args.max_train_samples, seed)
    data["eval"] = take_images(data["eval"], args.max_eval_samples, seed)
    if args.skip_bad_images:
        data["eval"] = readable_images(data["eval"])
    return data


def divides_itself(split: Dataset | IterableDataset, args: ExperimentArguments) -> bool:
    """Return True if processes can read a split's images each for itself, since its shards say how many they hold."""
    return args.streaming and args.max_train_samples is None and shard_lengths(split) is not None


def images_to_train_on(args: ExperimentArguments, split: Dataset | IterableDataset) -> int | None:
    """Return the number of training images, or None where a stream does not say it."""
    counts = [count for count in (number_of_images(split), args.max_train_samples) if count is not None]
    return min(counts, default=None)


def settle_steps(args: ExperimentArguments, config: GradAugConfig, images: int | None) -> None:
    """Set the number of steps of a stream, which the Trainer has to know; raise a ValueError if nothing says it."""
    if not args.streaming or config.max_steps > 0:
        return
    if images is None:
        raise ValueError(
            f"{args.dataset_name} does not say how many images split {args.train_split!r} has; give max_steps, or "
            "leave out streaming"
        )
    config.max_steps = max(1, round(config.num_train_epochs * math.ceil(images / args.batch_size)))


def train(trainer: RecipeTrainer, args: ExperimentArguments) -> None:
    """Train, evaluate after the final epoch, and save the model and `results.json`."""
    config = trainer.args
    result = measured_training(trainer, args.method)
    trainer.save_model(_internal_call=True)  # pushed once the results are there too
    skipped = images_skipped(trainer) if args.skip_bad_images else 0
    if config.should_save:
        file = Path(config.output_dir) / RESULTS
        save_results([result], file, asdict(args) | config.to_dict(), config.device)
        print(f"\n{args.model} on {args.dataset_name}, seed {config.seed}\n\n{results_table([result])}\n")
        if config.eval_widths:
            print(f"{widths_table(result.widths)}\n")
        if args.skip_bad_images:
            print(f"skipped {skipped} training images that cannot be decoded")
        print(f"wrote the model and {RESULTS} to {config.output_dir}")


def measured_training(trainer: RecipeTrainer, method: str) -> Result:
    """Train, evaluate after the final epoch unless that was done, and return accuracy and cost."""
    config = trainer.args
    with PeakMemory(config.device) as peak:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    seconds, state = trainer.training_seconds(), trainer.state
    if not any("eval_top1" in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()
    final = {k: v for entry in state.log_history if entry["step"] == state.global_step for k, v in entry.items()}
    return Result(
        method=method,
        top1=final["eval_top1"],
        top5=final.get("eval_top5"),
        steps=state.global_step,
        seconds=seconds,
        peak_memory=peak.mebibytes,
        curve=[(entry["step"], entry["eval_top1"]) for entry in state.log_history if "eval_top1" in entry],
        widths=accuracies(final, config.eval_widths),
    )


def images_skipped(trainer: RecipeTrainer) -> int:
    """Return the number of training images that some process could not decode."""
    skipped = trainer.train_dataset.dataset.skipped.to(trainer.args.device)
    return int((trainer.accelerator.reduce(skipped, "sum") > 0).sum())


def push(trainer: RecipeTrainer) -> None:
    """Push the model and its results where that was asked for."""
    if trainer.args.push_to_hub:
        commit = trainer.push_to_hub()
        if trainer.args.should_save:
            print(f"pushed them to {commit.repo_url}")


def evaluate(trainer: RecipeTrainer, args: ExperimentArguments) -> None:
    """Print the accuracy of a checkpoint at full width and at `eval_widths`."""
    metrics = trainer.evaluate()
    if trainer.args.should_save:
        full = (1.0, metrics["eval_top1"], metrics.get("eval_top5"))
        print(f"\n{args.model} on {args.dataset_name}\n")
        print(widths_table([full, *accuracies(metrics, trainer.args.eval_widths)]))


def accuracies(metrics: Mapping[str, float], widths: Sequence[float]) -> list[tuple[float, float, float | None]]:
    """Return width, top-1 and top-5 of each width that was evaluated."""
    return [(w, metrics[f"eval_width{w:g}_top1"], metrics.get(f"eval_width{w:g}_top5")) for w in widths]

"""What the recipes share: from the command line to `results.json`."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

from gradaug_hf.data.bad_images import SkippingDataset, readable_images
from gradaug_hf.data.decoding import UnreadableImageError, with_pixels
from gradaug_hf.data.loading import (
    SHUFFLE_BUFFER,
    balanced_subset,
    class_names,
    load_image_data,
    number_of_images,
    stream_image_data,
    take_images,
)
from gradaug_hf.data.seeded import SeededDataset, SeededStream
from gradaug_hf.data.transforms import Transform
from gradaug_hf.experiments.arguments import ExperimentArguments, parse
from gradaug_hf.experiments.memory import PeakMemory
from gradaug_hf.experiments.methods import NETWORK_ARGUMENTS, check_method
from gradaug_hf.experiments.results import RESULTS, Result, results_table, save_results, widths_table
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
from gradaug_hf.trainer.checkpoints import CheckpointError, ResumeError
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.loss_watch import NonFiniteLossError
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.utils.launch import process_state
from gradaug_hf.utils.threads import use_all_cores

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
MOMENTUM = 0.9
Loaded = TypeVar("Loaded")
LAST = "last"
# What can go wrong while training.
FAULTS = (CheckpointError, NonFiniteLossError, UnreadableImageError)
# Of ExperimentArguments, what a training that is resumed may change.
CHANGEABLE = ("batch_size", "eval_split", "max_eval_samples", "skip_bad_images")


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper.

    Args:
        settings: of ExperimentArguments and GradAugConfig, by name.
        methods: what each method sets, by name.
        transform: makes the transform of an image from whether to augment, `mean` and `std`.
        description: shown by --help.
        initialise: gives a new network the paper's initial weights; None keeps the network's own.
    """

    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    transform: Callable[..., Transform]
    description: str | None
    initialise: Callable[[nn.Module], None] | None = None


class RecipeTrainer(GradAugTrainer):
    """GradAugTrainer with the paper's SGD and learning rate.

    With `optim="sgd"` momentum is Nesterov's, and weight decay is on all parameters, batch norm and biases among them.

    Args:
        trainer_args: positional arguments of GradAugTrainer.
        lr_drops: shares of the training after which the learning rate is a tenth; none: `lr_scheduler_type` holds.
        experiment: what else has to be the same when the training is resumed, by name.
        kwargs: keyword arguments of GradAugTrainer.
    """

    def __init__(
        self,
        *trainer_args: Any,
        lr_drops: Sequence[float] = (),
        experiment: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.lr_drops = lr_drops
        self.experiment = experiment or {}
        self.evaluation_seconds = 0.0
        super().__init__(*trainer_args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`GradAugTrainer.evaluate`, whose time is added to `evaluation_seconds`."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.evaluation_seconds += time.perf_counter() - start
        return metrics

    def settings(self) -> dict[str, Any]:
        """What has to be the same when a training is resumed."""
        return super().settings() | dict(self.experiment)

    def training_seconds(self) -> float:
        """Seconds that the training has taken so far, without those of evaluation."""
        return super().training_seconds() - self.evaluation_seconds

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """SGD with Nesterov momentum on all parameters, or what another `optim` stands for."""
        if self.args.optim != OptimizerNames.SGD or self.optimizer is not None:
            return super().create_optimizer(model)
        self.optimizer = SGD(
            (self.model if model is None else model).parameters(),
            lr=self.args.learning_rate,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The learning rate of each step, with `lr_drops` where there are any."""
        if not self.lr_drops or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            drops = sum(step >= share * num_training_steps for share in self.lr_drops)
            return (step / warmup if step < warmup else 1.0) * 0.1**drops

        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler


def run(recipe: Recipe) -> None:
    """Train, or only evaluate, as the command line says; prints accuracies and writes `results.json`."""
    with errors_as_messages(OSError, ValueError):
        args, config = parse({**SETTINGS, **recipe.settings}, recipe.methods, recipe.description, sys.argv[1:])
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


def hide_token(token: str | None) -> None:
    """Take a token out of the command line, which results, model cards and loggers keep."""
    if token:
        sys.argv[:] = [word.replace(token, "<HUB_TOKEN>") for word in sys.argv]


@contextmanager
def errors_as_messages(*kinds: type[Exception], of_one_process: bool = False) -> Iterator[None]:
    """End the process with the message of an error that the user can do something about, without a trace.

    Args:
        kinds: of errors that are such; others are raised.
        of_one_process: whether a process may be the only one with the error, so that each says its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except kinds as error:
        speaks = of_one_process or process_state().is_main_process
        raise SystemExit(f"error: {error}" if speaks else 1) from error


def complete(args: ExperimentArguments, config: GradAugConfig) -> None:
    """Settle what follows from the arguments.

    Raises:
        ValueError: the arguments do not fit each other or the number of processes.
    """
    if config.output_dir is None:
        config.output_dir = str(Path("outputs") / f"{Path(args.model).name}-{args.method}-seed{config.seed}")
    complete_config(config, args.batch_size, args.warmup_epochs)


def complete_config(config: GradAugConfig, batch_size: int, warmup_epochs: float) -> None:
    """Settle what of the Trainer's settings follows from those of a recipe.

    Args:
        config: the settings, with an `output_dir`; changed in place.
        batch_size: images in an optimiser step, over all processes and accumulated batches.
        warmup_epochs: epochs in which the learning rate rises.

    Raises:
        ValueError: the settings do not fit each other or the number of processes.
    """
    if not (config.do_train or config.do_eval):
        raise ValueError("do_train and do_eval are both False, so there is nothing to do")
    if config.load_best_model_at_end:
        raise ValueError("load_best_model_at_end is True, but results are those of the final epoch; leave it out")
    devices = config.world_size * max(1, config.n_gpu)
    batches = devices * config.gradient_accumulation_steps
    if batch_size % batches:
        raise ValueError(
            f"batch_size is {batch_size}, which {devices} processes with gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} cannot share; it must be a multiple of {batches}"
        )
    config.per_device_train_batch_size = batch_size // batches
    config.dataloader_persistent_workers &= config.dataloader_num_workers > 0
    if warmup_epochs >= config.num_train_epochs and warmup_epochs > 0:
        raise ValueError(f"warmup_epochs is {warmup_epochs}; it must be below num_train_epochs")
    if warmup_epochs > 0:
        config.warmup_steps = warmup_epochs / config.num_train_epochs
    if config.resume_from_checkpoint == LAST:
        config.resume_from_checkpoint = (
            get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
        )
        if config.resume_from_checkpoint is None:
            raise ValueError(f"resume_from_checkpoint is {LAST!r}, but {config.output_dir} holds no checkpoint")


def make_trainer(recipe: Recipe, args: ExperimentArguments, config: GradAugConfig) -> RecipeTrainer:
    """Network, data and trainer of a run.

    Raises:
        OSError: the data set cannot be found, reached or read.
        ValueError: the arguments do not fit the network or the data.
    """
    arguments = {name: getattr(args, name) for name in NETWORK_ARGUMENTS}
    if config.do_train:
        accepted = accepted_arguments(args.model)
        check_method(args.method, recipe.methods, arguments, args.model, accepted)
        arguments = {name: value for name, value in arguments.items() if value is not None and name in accepted}
    data = load_data_once(args, config.seed)
    settle_steps(args, config, data["train"])

    set_seed(config.seed)
    if config.do_train:
        network = create_network(args.model, class_names(data), arguments)
        if recipe.initialise is not None and not is_checkpoint(args.model):
            recipe.initialise(network)
    else:
        network = load_network(args.model, len(class_names(data)))
    statistics = pixel_statistics(network, image_processor(args.model))
    evaluation = as_its_pipeline(recipe.transform(False, **statistics), network)
    trainer = RecipeTrainer(
        network,
        config,
        train_dataset=training_images(data["train"], recipe.transform(True, **statistics), args, config.seed),
        eval_dataset=with_pixels(data["eval"], evaluation),
        compute_metrics=topk_accuracy,
        processing_class=image_processor_of(evaluation, network),
        subnet_transform=RandomQuarterTurn() if args.subnet_rotation else None,
        lr_drops=args.lr_drops,
        experiment={name: value for name, value in asdict(args).items() if name not in CHANGEABLE},
    )
    trainer.card_metadata = {"dataset": args.dataset_name, "dataset_args": args.dataset_config_name}
    if is_checkpoint(args.model):
        trainer.card_metadata["finetuned_from"] = args.model
    return trainer


def training_images(
    split: Dataset | IterableDataset, transform: Transform, args: ExperimentArguments, seed: int
) -> SeededDataset | SeededStream:
    """Images to train on, whose augmentation is a function of the seed, so that a training can be resumed exactly."""
    images = with_pixels(split, transform)
    if args.streaming:
        return SeededStream(images, seed)
    return SeededDataset(SkippingDataset(images) if args.skip_bad_images else images, seed)


def load_data_once(args: ExperimentArguments, seed: int) -> DatasetDict | IterableDatasetDict:
    """`load_data` on the main process, and then on the others from its cache."""
    return first_on_main_process(lambda: load_data(args, seed))


def first_on_main_process(load: Callable[[], Loaded]) -> Loaded:
    """What a function loads, on the main process first; each process fails for a reason of its own."""
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
    """The images to train on and to evaluate on, as many of them as are asked for."""
    options = {
        "config_name": args.dataset_config_name,
        "train_split": args.train_split,
        "eval_split": args.eval_split,
        "image_column": args.image_column,
        "label_column": args.label_column,
    }
    if args.streaming:
        data = stream_image_data(args.dataset_name, **options)
    else:
        data = load_image_data(args.dataset_name, seed=seed, **options)
    if args.labels_per_class is not None:
        if args.streaming:
            raise ValueError("labels_per_class needs to see all labels first; leave out streaming")
        data["train"] = balanced_subset(data["train"], args.labels_per_class, seed)
    for split, number in (("train", args.max_train_samples), ("eval", args.max_eval_samples)):
        if number is not None:
            data[split] = take_images(data[split], number, seed)
    if args.skip_bad_images:
        data["eval"] = readable_images(data["eval"])
    if args.streaming:
        data["train"] = data["train"].shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return data


def settle_steps(args: ExperimentArguments, config: GradAugConfig, train_split: Dataset | IterableDataset) -> None:
    """Set the number of steps of a stream, which the Trainer has to know.

    Raises:
        ValueError: neither the data set nor the arguments say how many images or steps there are.
    """
    if not (args.streaming and config.do_train) or config.max_steps > 0:
        return
    counts = [count for count in (number_of_images(train_split), args.max_train_samples) if count is not None]
    if not counts:
        raise ValueError(
            f"{args.dataset_name} does not say how many images split {args.train_split!r} has; give max_steps, or "
            "leave out streaming"
        )
    config.max_steps = round(config.num_train_epochs * math.ceil(min(counts) / args.batch_size))


def train(trainer: RecipeTrainer, args: ExperimentArguments) -> None:
    """Train, evaluate after the final epoch, and save the network and `results.json`."""
    config = trainer.args
    with PeakMemory(config.device) as peak:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    seconds = trainer.training_seconds()
    skipped = images_skipped(trainer) if args.skip_bad_images else 0
    state = trainer.state
    if not any("eval_top1" in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()
    trainer.save_model(_internal_call=True)  # pushed once the results are there too
    final = {k: v for entry in state.log_history if entry["step"] == state.global_step for k, v in entry.items()}
    result = Result(
        method=args.method,
        top1=final["eval_top1"],
        top5=final["eval_top5"],
        steps=state.global_step,
        seconds=seconds,
        peak_memory=peak.mebibytes,
        curve=[(entry["step"], entry["eval_top1"]) for entry in state.log_history if "eval_top1" in entry],
        widths=accuracies(final, config.eval_widths),
    )
    if config.should_save:
        file = Path(config.output_dir) / RESULTS
        save_results([result], file, asdict(args) | config.to_dict(), config.device)
        print(f"\n{args.model} on {args.dataset_name}, seed {config.seed}\n\n{results_table([result])}\n")
        if config.eval_widths:
            print(f"{widths_table(result.widths)}\n")
        if args.skip_bad_images:
            print(f"skipped {skipped} training images that cannot be decoded")
        print(f"wrote the network and {RESULTS} to {config.output_dir}")


def images_skipped(trainer: RecipeTrainer) -> int:
    """Number of training images that some process could not decode."""
    skipped = trainer.train_dataset.dataset.skipped.to(trainer.args.device)
    return int((trainer.accelerator.reduce(skipped, "sum") > 0).sum())


def push(trainer: RecipeTrainer) -> None:
    """Push the network and its results, if they are to be."""
    if trainer.args.push_to_hub:
        commit = trainer.push_to_hub()
        if trainer.args.should_save:
            print(f"pushed them to {commit.repo_url}")


def evaluate(trainer: RecipeTrainer, args: ExperimentArguments) -> None:
    """Print the accuracy of a checkpoint at full width and at `eval_widths`."""
    metrics = trainer.evaluate()
    if trainer.args.should_save:
        full = (1.0, metrics["eval_top1"], metrics["eval_top5"])
        print(f"\n{args.model} on {args.dataset_name}\n")
        print(widths_table([full, *accuracies(metrics, trainer.args.eval_widths)]))


def accuracies(metrics: Mapping[str, float], widths: Sequence[float]) -> list[tuple[float, float, float]]:
    """Width, top-1 and top-5 of each width that was evaluated."""
    return [(w, metrics[f"eval_width{w:g}_top1"], metrics[f"eval_width{w:g}_top5"]) for w in widths]

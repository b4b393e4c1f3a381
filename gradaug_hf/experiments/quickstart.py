"""Plain training, plain training at equal compute and GradAug on a few labelled images, with several seeds.

`num_subnets` and `min_width` were chosen among five settings with the seeds 100 to 103, on those images of the digits'
training half that were not trained on, before the model was evaluated on the other half.
"""

import gc
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, set_seed
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.digits import load_digits_data
from gradaug_hf.data.loading import balanced_subset, class_names, load_image_data, take_images
from gradaug_hf.data.transforms import Transform, cifar_transform
from gradaug_hf.experiments.arguments import CheckedArguments, RecipeParser
from gradaug_hf.experiments.comparison import Comparison, make_comparison
from gradaug_hf.experiments.recipe_trainer import RecipeTrainer
from gradaug_hf.experiments.results import RESULTS, load_runs, save_results
from gradaug_hf.experiments.run import check_batch, first_on_main_process, measured_training
from gradaug_hf.experiments.sweep import PlannedRun, record_settings, remove_checkpoints, report, unfinished_runs
from gradaug_hf.hub.networks import accepted_arguments
from gradaug_hf.hub.preprocessing import image_processor_of
from gradaug_hf.reports.runs import Result
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.launch import use_all_cores

PLAIN, GRADAUG = "plain", "gradaug"
EVAL_BATCH_SIZE = 100
SMALL = 16  # side of images in pixels with which a second thread waits longer than it helps


class QuickstartTrainer(RecipeTrainer):
    """Train as RecipeTrainer does; started again after an interruption, the quickstart itself resumes."""

    _to_go_on = "the same command"


@dataclass
class QuickstartArguments(CheckedArguments):
    dataset_name: str | None = HfArg(
        default=None, help="Hub id, parquet file, folder of parquet files or of images; default: handwritten digits."
    )
    image_column: str | None = HfArg(default=None, help="Column of images; found if not given.")
    label_column: str | None = HfArg(default=None, help="Column of classes; found if not given.")
    labels_per_class: int = HfArg(default=5, help="Number of training images of each class.")
    max_eval_samples: int | None = HfArg(
        default=None, help="Number of images to evaluate on, sampled at random; default: all."
    )
    model: str = HfArg(default="wrn10_2", help="Name of a timm model, trained from scratch.")
    image_size: int = HfArg(default=16, help="Side in pixels to which images are resized.")
    epochs: int = HfArg(default=50, help="Passes over the training images; plain training at equal compute has more.")
    batch_size: int = HfArg(default=10, help="Images in a training step, on each process.")
    learning_rate: float = HfArg(default=0.1, help="Highest learning rate of SGD, with cosine decay.")
    num_subnets: int = HfArg(default=1, help="Number of GradAug's sub-networks in each step.")
    min_width: float = HfArg(default=0.7, help="Width multiplier of the narrowest sub-network, in (0, 1].")
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2, 3, 4],
        help="Seeds of images, weights, batches and sub-networks; each method is trained with each.",
    )
    output_dir: str = HfArg(default="outputs/quickstart", help="Folder for everything that is written.")

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_least(
            1, "labels_per_class", "image_size", "epochs", "batch_size", "num_subnets", "max_eval_samples"
        )
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        self._check("seeds", bool(self.seeds) and min(self.seeds) >= 0, "a list of numbers of at least 0")


def main(description: str | None = None) -> None:
    """Train a model by each method with each seed, and compare them.

    Started again after an interruption, the command goes on where it was.
    """
    with errors_as_messages(OSError, ValueError):
        (args,) = RecipeParser(QuickstartArguments, description=description).parse_args_into_dataclasses()
        if args.image_size > SMALL:
            use_all_cores()
        else:
            torch.set_num_threads(1)
        accepted_arguments(args.model)  # which knows what it is
        data = first_on_main_process(lambda: load_data(args))
        check_batch(args.batch_size * PartialState().num_processes, len(training_images(args, data, args.seeds[0])))
        plan = make_plan(args, len(data["eval"]))
        runs = first_on_main_process(lambda: unfinished_runs(plan, Path(args.output_dir)))
    PartialState().wait_for_everyone()  # before the first run writes there
    gc.freeze()  # each run collects garbage, which need not be looked for among all that is imported
    with errors_as_messages():
        try:
            train_all(args, runs, data)
        finally:
            gc.unfreeze()
            if PartialState().is_main_process:
                report(plan, Path(args.output_dir))
    if PartialState().is_main_process:
        check_checkpoint(args)


def load_data(args: QuickstartArguments) -> DatasetDict:
    """Load the images to sample training images from, and those to evaluate on."""
    if args.dataset_name is None:
        data = load_digits_data(args.image_size)
    else:
        data = load_image_data(args.dataset_name, image_column=args.image_column, label_column=args.label_column)
    data["eval"] = take_images(data["eval"], args.max_eval_samples, seed=0)
    return data


def make_plan(args: QuickstartArguments, images: int) -> Comparison:
    """Return the runs: plain training, plain training at equal compute, and GradAug, with each seed."""
    settings = {name: value for name, value in asdict(args).items() if name not in ("seeds", "output_dir", "epochs")}
    config = GradAugConfig(num_subnets=args.num_subnets, min_width=args.min_width, num_train_epochs=args.epochs)
    return make_comparison(
        __name__,
        {GRADAUG: {}},
        plain=PLAIN,
        plain_settings={"num_subnets": 0},
        gradaug=GRADAUG,
        config=config,
        side=args.image_size,
        seeds=args.seeds,
        settings={**settings, "num_train_epochs": args.epochs},
        columns={"": {}},
        images=images,
    )


def train_all(args: QuickstartArguments, runs: Sequence[PlannedRun], data: DatasetDict) -> None:
    """Train runs one after the other, saying how accurate each is."""
    say = PartialState().print
    say(f"{args.model}, {args.labels_per_class} labels per class of {args.dataset_name or 'handwritten digits'}\n")
    for number, run in enumerate(runs, start=1):
        result = train(args, run, data)
        say(f"[{number}/{len(runs)}] {run.name}: top-1 {result.top1:.2%} in {result.seconds:.1f} s", flush=True)


def training_images(args: QuickstartArguments, data: DatasetDict, seed: int) -> Dataset:
    """Return the training images of a seed."""
    return balanced_subset(data["train"], args.labels_per_class, seed)


def transform_for(model: nn.Module, train: bool, flip: bool = True) -> Transform:
    """Make the CIFAR transform with the image size and the statistics that timm states for the model."""
    config = timm.data.resolve_model_data_config(model)
    return cifar_transform(train, size=config["input_size"][-1], flip=flip, mean=config["mean"], std=config["std"])


def train(args: QuickstartArguments, run: PlannedRun, data: DatasetDict) -> Result:
    """Train a model, evaluate it on all images, and write its result; save that of GradAug's first seed.

    SGD with Nesterov momentum, weight decay on all parameters and cosine decay, as in the paper.
    """
    folder, seed = Path(args.output_dir) / run.name, run.settings["seed"]
    set_seed(seed)  # the methods start from the same weights
    size = {"input_size": (3, args.image_size, args.image_size)}
    model = timm.create_model(args.model, num_classes=len(class_names(data)), pretrained_cfg_overlay=size)
    config = GradAugConfig(
        str(folder),
        resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None,
        num_subnets=run.settings["num_subnets"],
        min_width=args.min_width,
        num_train_epochs=run.settings["num_train_epochs"],
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        optim="sgd",
        learning_rate=args.learning_rate,
        weight_decay=5e-4,
        lr_scheduler_type="cosine",
        logging_steps=0.1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
        seed=seed,
    )
    if config.should_save:
        record_settings(run, folder)
    flip = args.dataset_name is not None  # a mirrored digit is no digit
    trainer = QuickstartTrainer(
        model,
        config,
        train_dataset=with_pixels(training_images(args, data, seed), transform_for(model, train=True, flip=flip)),
        eval_dataset=with_pixels(data["eval"], transform_for(model, train=False)),
        processing_class=image_processor_of(transform_for(model, train=False), model),
        compute_metrics=topk_accuracy,
        card_metadata={"dataset": args.dataset_name or "handwritten digits of scikit-learn"},
    )
    trainer.remove_callback(PrinterCallback)
    result = measured_training(trainer, PLAIN if config.num_subnets == 0 else GRADAUG)
    if (run.row, seed) == (GRADAUG, args.seeds[0]):
        trainer.save_model()
    if config.should_save:
        save_results([result], folder / RESULTS, dict(run.settings), config.device)
        remove_checkpoints(folder)
    return result


def check_checkpoint(args: QuickstartArguments) -> None:
    """Evaluate the GradAug checkpoint in a new process, where it must be as accurate as in this one."""
    folder = Path(args.output_dir) / f"{GRADAUG}-seed{args.seeds[0]}"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        top1 = pool.submit(evaluate_checkpoint, args, folder, PartialState().device).result()
    print(f'timm.create_model("local-dir:{folder}", pretrained=True) in a new process: top-1 {top1:.2%}')
    if top1 != (expected := load_runs(folder)[0].result.top1):
        raise SystemExit(f"the checkpoint has another accuracy than the trained model: {expected:.2%}")


@torch.inference_mode()
def evaluate_checkpoint(args: QuickstartArguments, folder: Path, device: torch.device) -> float:
    """Measure top-1 accuracy, in 0..1, of a checkpoint as timm loads it, in a process of its own."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device).eval()
    images = with_pixels(load_data(args)["eval"], transform_for(model, train=False))
    batches = DataLoader(images, batch_size=EVAL_BATCH_SIZE)
    correct = sum((model(b["pixel_values"].to(device)).argmax(1).cpu() == b["labels"]).sum().item() for b in batches)
    return correct / len(images)

"""Plain training and GradAug from the same start, on a few labelled images."""

import copy
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from accelerate import PartialState
from datasets import DatasetDict
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.hf_argparser import HfArg

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.digits import load_digits_data
from gradaug_hf.data.loading import balanced_subset, class_names, load_image_data
from gradaug_hf.data.transforms import Transform, cifar_transform
from gradaug_hf.experiments.arguments import CheckedArguments, RecipeParser
from gradaug_hf.experiments.memory import PeakMemory
from gradaug_hf.experiments.results import check_free, results_table, save_results
from gradaug_hf.experiments.run import check_batch, first_on_main_process
from gradaug_hf.hub.networks import accepted_arguments
from gradaug_hf.hub.preprocessing import image_processor_of
from gradaug_hf.reports.plots import plot_curves
from gradaug_hf.reports.runs import Result
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.threads import use_all_cores

COST = 2.7  # computation of a GradAug step over that of a plain one
EVALUATIONS = 4
EVAL_BATCH_SIZE = 100


@dataclass
class QuickstartArguments(CheckedArguments):
    dataset_name: str | None = HfArg(
        default=None, help="Hub id, parquet file, folder of parquet files or of images; default: handwritten digits."
    )
    image_column: str | None = HfArg(default=None, help="Column of images; found if not given.")
    label_column: str | None = HfArg(default=None, help="Column of classes; found if not given.")
    labels_per_class: int = HfArg(default=3, help="Number of training images of each class.")
    max_eval_samples: int | None = HfArg(
        default=None, help="Number of images to evaluate on, sampled at random; default: all."
    )
    model: str = HfArg(default="wrn16_2", help="Name of a timm model, trained from scratch.")
    epochs: int = HfArg(default=150, help="Passes over the training images.")
    batch_size: int = HfArg(default=10, help="Images in a training step, on each process.")
    learning_rate: float = HfArg(default=0.1, help="Highest learning rate of SGD, with cosine decay.")
    equal_compute: bool = HfArg(
        default=False, help=f"Train plainly for {COST} times the epochs as well, at the cost of GradAug."
    )
    seed: int = HfArg(default=0, help="Seed of images, weights, batches and sub-networks.")
    output_dir: str = HfArg(default="outputs/quickstart", help="Folder for everything that is written.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Whether to write over the results of another run in output_dir."
    )

    def __post_init__(self) -> None:
        self._check_texts()
        for name in ("labels_per_class", "epochs", "batch_size"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("max_eval_samples", self.max_eval_samples is None or self.max_eval_samples >= 1, "at least 1")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        self._check("seed", self.seed >= 0, "at least 0")


def main(description: str | None = None) -> None:
    """Train a model plainly and with GradAug from the same start, and compare them."""
    with errors_as_messages(OSError, ValueError):
        (args,) = RecipeParser(QuickstartArguments, description=description).parse_args_into_dataclasses()
        use_all_cores()
        check_free(args.output_dir, None, args.overwrite_output_dir)
        accepted_arguments(args.model)  # which knows what it is
        data = first_on_main_process(lambda: load_data(args))
        check_batch(args.batch_size * PartialState().num_processes, len(data["train"]))
    set_seed(args.seed)
    model = timm.create_model(args.model, num_classes=len(class_names(data)))

    results = [train(args, "plain", model, data, num_subnets=0), train(args, "gradaug", model, data)]
    if args.equal_compute:
        results.append(train(args, f"plain_{COST}x", model, data, num_subnets=0, epochs=round(COST * args.epochs)))

    if PartialState().is_main_process:
        report(args, results)
        check_checkpoint(args, expected_top1=results[1].top1)


def load_data(args: QuickstartArguments) -> DatasetDict:
    """Load a few training images of each class, and the images to evaluate on."""
    if args.dataset_name is None:
        data = load_digits_data()
    else:
        data = load_image_data(
            args.dataset_name, image_column=args.image_column, label_column=args.label_column, seed=args.seed
        )
    data["train"] = balanced_subset(data["train"], args.labels_per_class, args.seed)
    if args.max_eval_samples is not None:
        data["eval"] = data["eval"].shuffle(seed=args.seed).take(min(args.max_eval_samples, len(data["eval"])))
    return data


def transform_for(model: nn.Module, train: bool, flip: bool = True) -> Transform:
    """Make the CIFAR transform with the image size and the statistics that timm states for the model."""
    config = timm.data.resolve_model_data_config(model)
    return cifar_transform(train, size=config["input_size"][-1], flip=flip, mean=config["mean"], std=config["std"])


def train(
    args: QuickstartArguments,
    method: str,
    model: nn.Module,
    data: DatasetDict,
    num_subnets: int = 3,
    epochs: int | None = None,
) -> Result:
    """Train a copy of a model, save it to the folder of its method, and evaluate it on all images.

    SGD with Nesterov momentum, weight decay on all parameters and cosine decay, as in the paper.
    """
    PartialState().print(f"\n{method}")
    model = copy.deepcopy(model)
    config = GradAugConfig(
        str(Path(args.output_dir) / method),
        num_subnets=num_subnets,
        num_train_epochs=epochs or args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=1 / EVALUATIONS,
        logging_steps=1 / EVALUATIONS,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=False,
        seed=args.seed,
    )
    model.to(config.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    trainer = GradAugTrainer(
        model,
        config,
        train_dataset=with_pixels(data["train"], transform_for(model, train=True, flip=args.dataset_name is not None)),
        eval_dataset=with_pixels(data["eval"], transform_for(model, train=False)),
        processing_class=image_processor_of(transform_for(model, train=False), model),
        compute_metrics=topk_accuracy,
        optimizers=(optimizer, None),
    )
    trainer.card_metadata = {"dataset": args.dataset_name or "handwritten digits of scikit-learn"}
    with PeakMemory(config.device) as peak:
        seconds = trainer.train().metrics["train_runtime"]
    evaluations = [entry for entry in trainer.state.log_history if "eval_top1" in entry]
    final = evaluations[-1]
    trainer.save_model()
    return Result(
        method=method,
        top1=final["eval_top1"],
        top5=final.get("eval_top5"),
        steps=trainer.state.global_step,
        seconds=seconds - sum(entry["eval_runtime"] for entry in evaluations),
        peak_memory=peak.mebibytes,
        curve=[(entry["step"], entry["eval_top1"]) for entry in evaluations],
    )


def report(args: QuickstartArguments, results: list[Result]) -> None:
    """Print the table; write `results.json` and `curves.png`."""
    folder = Path(args.output_dir)
    save_results(results, folder / "results.json", asdict(args), PartialState().device)
    images = f"{args.labels_per_class} labels per class of {args.dataset_name or 'handwritten digits'}"
    plot_curves(results, folder / "curves.png", f"{args.model}, {images}, seed {args.seed}")
    print(f"\n{args.model}, {images}, seed {args.seed}\n\n{results_table(results)}\n")
    print(f"wrote results.json, curves.png and the checkpoints to {folder}")


def check_checkpoint(args: QuickstartArguments, expected_top1: float) -> None:
    """Evaluate the GradAug checkpoint in a new process, where it must be as accurate as in this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        top1 = pool.submit(evaluate_checkpoint, args, PartialState().device).result()
    folder = Path(args.output_dir) / "gradaug"
    print(f'timm.create_model("local-dir:{folder}", pretrained=True) in a new process: top-1 {top1:.2%}')
    if top1 != expected_top1:
        raise SystemExit(f"the checkpoint has another accuracy than the trained model: {expected_top1:.2%}")


@torch.inference_mode()
def evaluate_checkpoint(args: QuickstartArguments, device: torch.device) -> float:
    """Measure top-1 accuracy, in 0..1, of the GradAug checkpoint as timm loads it, in a process of its own."""
    model = timm.create_model(f"local-dir:{Path(args.output_dir) / 'gradaug'}", pretrained=True).to(device).eval()
    images = with_pixels(load_data(args)["eval"], transform_for(model, train=False))
    batches = DataLoader(images, batch_size=EVAL_BATCH_SIZE)
    correct = sum((model(b["pixel_values"].to(device)).argmax(1).cpu() == b["labels"]).sum().item() for b in batches)
    return correct / len(images)

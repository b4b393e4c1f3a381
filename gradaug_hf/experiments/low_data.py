"""Does GradAug help with few labels? Every method of the recipes, with several numbers of labels and seeds."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from gradaug_hf.data.loading import class_names
from gradaug_hf.experiments.arguments import CheckedArguments, ExperimentArguments, RecipeParser, as_flags, parse
from gradaug_hf.experiments.comparison import Comparison, make_comparison
from gradaug_hf.experiments.methods import METHODS, check_method, methods_for
from gradaug_hf.experiments.run import SETTINGS, Recipe, check_batch, load_data
from gradaug_hf.experiments.sweep import LAUNCH, flag_settings, train_and_report
from gradaug_hf.hub.networks import accepted_arguments
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.command_line import errors_as_messages


@dataclass
class LowDataArguments(CheckedArguments):
    dataset_name: str = HfArg(
        default="uoft-cs/cifar10",
        help="Hub id, parquet file, folder of parquet files, or folder of images sorted by class.",
    )
    labels: list[int] = HfArg(
        default_factory=lambda: [250, 1000, 4000],
        help="Numbers of training labels, multiples of the number of classes; 0 stands for all.",
    )
    methods: list[str] = HfArg(default_factory=list, help="Methods to compare; default: all that the model can take.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Seeds of each run.")
    recipe: str = HfArg(default="recipes/cifar_wideresnet.py", help="Recipe whose transforms and settings are used.")
    model: str = HfArg(default="wrn28_2", help="Name of a timm model, trained from scratch.")
    output_dir: str = HfArg(default="outputs/low_data", help="Folder for everything that is written.")
    launch: str = HfArg(default=LAUNCH, help="Command that starts the recipe.")

    def __post_init__(self) -> None:
        self._check_texts()
        self._check("seeds", all(seed >= 0 for seed in self.seeds), "a list of numbers of at least 0")


def main(description: str | None = None) -> None:
    """Train every method with several numbers of labels and seeds, and compare them."""
    with errors_as_messages(OSError, ValueError):
        parser = RecipeParser(LowDataArguments, description=description)
        args, flags = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        train_and_report(make_plan(args, flag_settings(flags)), Path(args.output_dir), args.launch)


def make_plan(args: LowDataArguments, settings: dict[str, Any]) -> Comparison:
    """Return every method with every number of labels and seed, checked before the first of them is trained."""
    if not Path(args.recipe).is_file():
        raise ValueError(f"recipe is {args.recipe!r}, and there is no such file")
    recipe = runpy.run_path(args.recipe)["RECIPE"]
    settings = {"model": args.model, "dataset_name": args.dataset_name, "eval_strategy": "no", **settings}
    accepted = accepted_arguments(args.model)
    rows: dict[str, dict[str, Any]] = {}
    for method in args.methods or methods_for(recipe.methods, accepted):
        if method not in METHODS:
            raise ValueError(f"methods holds {method!r}; it must be of {', '.join(METHODS)}")
        check_method(method, recipe.methods, recipe.methods[method], args.model, accepted)
        rows[method] = {"method": method}
    experiment, config = resolved(recipe, settings)
    data = load_data(experiment, seed=0)
    return make_comparison(
        Path(args.recipe),
        rows,
        plain="baseline",
        plain_settings={"method": "baseline"},
        gradaug="gradaug",
        config=config,
        side=recipe.image_side(),
        seeds=args.seeds,
        settings=settings,
        columns=label_columns(args, recipe, settings, len(class_names(data))),
        images=len(data["eval"]),
    )


def resolved(recipe: Recipe, settings: dict[str, Any]) -> tuple[ExperimentArguments, GradAugConfig]:
    """Return the arguments of a run of a recipe with some settings."""
    return parse({**SETTINGS, **recipe.settings}, recipe.methods, None, as_flags({"output_dir": ".", **settings}))


def label_columns(
    args: LowDataArguments, recipe: Recipe, settings: dict[str, Any], classes: int
) -> dict[str, dict[str, Any]]:
    """Return the columns of the numbers of labels, for which the dataset must have enough images."""
    columns = {}
    for labels in args.labels:
        if labels < 0 or labels % classes:
            raise ValueError(f"labels holds {labels}; it must be a multiple of {classes}, the number of classes, or 0")
        own = {"labels_per_class": labels // classes} if labels else {}
        experiment, _ = resolved(recipe, {**settings, **own})
        check_batch(experiment.batch_size, len(load_data(experiment, seed=0)["train"]))
        columns[f"{labels} labels" if labels else "all labels"] = own
    return columns

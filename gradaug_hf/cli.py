"""The console script `gradaug`.

A command imports what it alone needs when it runs. To add one, write a function of its arguments, and name it with its
flags in `make_parser`.
"""

import sys
from argparse import REMAINDER, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradaug_hf.experiments.sweep import LAUNCH
from gradaug_hf.hub.official import OFFICIAL_NAMES
from gradaug_hf.utils.command_line import BriefParser, errors_as_messages
from gradaug_hf.version import __version__

RECIPES = (
    "cifar_fine_tuning",
    "cifar_pyramidnet",
    "cifar_resnet110_depth",
    "cifar_wideresnet",
    "coco_maskrcnn",
    "imagenet_resnet50",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the command line names.

    Args:
        argv: the command and its arguments; None: those of this process.

    Raises:
        SystemExit: an argument is wrong, or the command cannot do its work.
    """
    args, flags = make_parser().parse_known_args(argv)
    if args.command in (fine_tune, sweep):
        args.flags = flags
    else:
        args.parser.refuse(flags)
    with errors_as_messages(ImportError, ValueError):  # a command may need a library that is not installed
        args.command(args)


def make_parser() -> BriefParser:
    """Make the parser of all commands."""
    parser = BriefParser(prog="gradaug", description="GradAug for the image classifiers of timm and transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[Namespace], None], help: str, **settings: Any) -> BriefParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False, **settings)
        added.set_defaults(command=command, parser=added)
        return added

    several = "accelerate launch --no_python gradaug train RECIPE"
    added = add("train", train, f"Train by a recipe of the paper; on several processes by `{several}`.")
    added.add_argument("recipe", choices=RECIPES, metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    added.add_argument("flags", nargs=REMAINDER, metavar="...", help="flags of the recipe; --help lists them")

    add("fine-tune", fine_tune, "Fine-tune a pretrained model on your photos; --help lists the flags.", add_help=False)

    added = add("predict", predict, "Write the classes that a model predicts of photos to a CSV file.")
    added.add_argument("model", help="folder or Hub id of a model of timm or transformers")
    added.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="photo, or folder with photos in it")
    added.add_argument("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="CSV to write")
    added.add_argument("--batch_size", type=int, default=32, help="photos at a time")
    added.add_argument("--width", type=float, help="width multiplier in (0, 1) of the sub-network that predicts")
    added.add_argument(
        "--calibration_images",
        type=Path,
        metavar="DIR",
        help="training photos, of which a sub-network's batch norm takes its statistics",
    )

    added = add("report", report, "Print which layers of a timm model are sliced, and why the others are not.")
    added.add_argument("name", help="name of an architecture in timm")
    added.add_argument("--width", type=float, help="width multiplier in (0, 1] to count multiply-adds at")
    added.add_argument("--input_size", type=int, help="side of the images in pixels; default: the model's own")

    added = add("convert", convert, "Turn weights that the paper's own code trained into a checkpoint folder of timm.")
    added.add_argument("file", type=Path, metavar="FILE", help="checkpoint of the paper's code, such as x.pth.tar")
    added.add_argument("--arch", required=True, choices=OFFICIAL_NAMES, help="the model that it holds")
    added.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder to write")

    added = add("results", results, "Compare finished runs by their results.json.")
    added.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folder of a run")
    added.add_argument("--plot", type=Path, default=Path("results.png"), help="PNG file to write")

    added = add("sweep", sweep, "Train and compare the runs that a plan lists, one process each.")
    added.add_argument("plan", type=Path, help="YAML or JSON file with recipe, rows, seeds, settings and columns")
    added.add_argument("--output_dir", type=Path, help="folder of all runs; default: outputs/ and the plan's name")
    added.add_argument("--launch", default=LAUNCH, help=f"command that starts the recipe; default: {LAUNCH}")
    added.add_argument("--seeds", nargs="+", type=int, help="seeds to train now; default: all that the plan lists")
    return parser


def train(args: Namespace) -> None:
    """Train by a recipe, whose own parser reads the flags."""
    if args.recipe == "coco_maskrcnn":
        from gradaug_hf.detection.experiment import run as run_detection

        return run_detection(args.flags)
    from gradaug_hf.experiments.recipes import RECIPES as classification
    from gradaug_hf.experiments.run import run

    run(classification[args.recipe], args.flags)


def fine_tune(args: Namespace) -> None:
    """Fine-tune a pretrained model, whose own parser reads the flags."""
    from gradaug_hf.experiments.fine_tuning import run

    run(args.flags)


def predict(args: Namespace) -> None:
    """Write predictions of photos, and say how many there are."""
    from gradaug_hf.experiments.prediction import predict as predict_photos

    predicted, skipped = predict_photos(
        args.model,
        args.paths,
        args.output,
        batch_size=args.batch_size,
        width=args.width,
        calibration_images=args.calibration_images,
    )
    for file, reason in skipped.items():
        print(f"skipped {file}: {reason}", file=sys.stderr)
    print(f"wrote {args.output}: predictions of {predicted:,} photos; {len(skipped):,} skipped")


def report(args: Namespace) -> None:
    """Print the slicing report of a timm model, and its costs at a width."""
    import timm
    import torch

    from gradaug_hf.slimming import make_slimmable, slicing_report
    from gradaug_hf.slimming.widths import check_width

    if not timm.is_model(args.name):
        near = ", ".join(timm.list_models(f"*{args.name[:6]}*")[:8]) or "see timm.list_models()"
        raise ValueError(f"timm has no architecture {args.name!r}; near it: {near}")
    width = None if args.width is None else check_width(args.width)
    with torch.device("meta"):
        model = timm.create_model(args.name)
    found = slicing_report(make_slimmable(model, input_size=args.input_size))
    print(found)
    if width is not None:
        macs, params = found.macs(width), found.params(width)
        print(
            f"\nwidth {width:g}: {macs:,} multiply-adds ({macs / found.macs():.1%}), "
            f"{params:,} parameters ({params / found.params():.1%})"
        )


def convert(args: Namespace) -> None:
    """Write the folder of a checkpoint of the paper's code."""
    from gradaug_hf.hub.official import convert_file

    model = convert_file(args.file, args.arch, args.output)
    print(f"wrote {args.output}: {args.arch} with {model.num_classes} classes")
    print(f'timm.create_model("local-dir:{args.output}", pretrained=True) loads it once gradaug_hf is imported')


def results(args: Namespace) -> None:
    """Print a table of finished runs, and plot them."""
    from gradaug_hf.experiments.results import compare

    print(f"{compare(args.folders, args.plot)}\n\nwrote {args.plot}")


def sweep(args: Namespace) -> None:
    """Train and compare what a plan lists."""
    from gradaug_hf.experiments.sweep import flag_settings, read_plan, train_and_report

    plan = read_plan(args.plan)
    plan = replace(plan, settings={**plan.settings, **flag_settings(args.flags)})
    train_and_report(plan, args.output_dir or Path("outputs") / args.plan.stem, args.launch, args.seeds)

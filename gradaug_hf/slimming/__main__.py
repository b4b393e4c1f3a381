"""Print which layers of a timm model are sliced: `python -m gradaug_hf.slimming resnet50 --width 0.9`."""

import argparse

import timm
import torch

import gradaug_hf.models  # noqa: F401  (registers the paper's networks in timm)
from gradaug_hf.slimming.patching import check_width
from gradaug_hf.slimming.slimmable import make_slimmable, slicing_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gradaug_hf.slimming",
        description="Print which layers of a timm model are sliced.",
    )
    parser.add_argument("name", help="name of an architecture in timm")
    parser.add_argument("--width", type=float, help="width multiplier in (0, 1] to count multiply-adds at")
    parser.add_argument("--input_size", type=int, help="side of the images in pixels; default: the model's own")
    args = parser.parse_args(arguments)
    if not timm.is_model(args.name):
        near = ", ".join(timm.list_models(f"*{args.name[:6]}*")[:8]) or "see timm.list_models()"
        parser.error(f"timm has no architecture {args.name!r}; near it: {near}")
    try:
        width = None if args.width is None else check_width(args.width)
        with torch.device("meta"):
            model = timm.create_model(args.name)
        report = slicing_report(make_slimmable(model, input_size=args.input_size))
    except ValueError as error:
        parser.error(str(error))
    print(report)
    if width is not None:
        macs, params = report.macs(width), report.params(width)
        print(
            f"\nwidth {width:g}: {macs:,} multiply-adds ({macs / report.macs():.1%}), "
            f"{params:,} parameters ({params / report.params():.1%})"
        )


if __name__ == "__main__":
    main()

"""Measure how much of timm's models is sliced, and write docs/timm_support.md.

    python docs/timm_support.py                         # the smallest model of every timm module
    python docs/timm_support.py resnet50 vit_base_patch16_224 --check

Results are kept in docs/timm_support.json; what is there is not measured again unless it is named.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch

import gradaug_hf
from gradaug_hf.objective.resolutions import ResolutionTrial, dynamic_size_arguments

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
from tests.helpers.outside import Outside  # noqa: E402
from tests.slimming import test_zoo  # noqa: E402

RESULTS = DOCS / "timm_support.json"
SMALLEST = DOCS.parent / "tests" / "slimming" / "smallest.json"
SCALES = (6 / 7, 5 / 7, 4 / 7)

HEADER = """# Which models of timm are sliced

The smallest model of every module of timm {version}. The columns:

- *multiply-adds* and *parameters*: the shares that shrink with the width;
- *other sides*: those of 6/7, 5/7 and 4/7 of the native side that the model takes as timm builds it, and the arguments
  with which timm builds it to take them all;
- *checked*: in float64, at widths 0.5, 0.75 and 0.9, the sub-network equals the full model with the left-out channels
  zeroed. So does the extracted one, in a process without gradaug_hf. Forward and backward run, and the full width is
  bit-identical (`tests/slimming/test_zoo.py`; `deepseek_vit_412m` and `gemma4_vit_167m` with four of their blocks);
- *patch*: the time of `make_slimmable` on 2 CPU cores, with other work running beside it.

`python docs/timm_support.py --check` measures what is missing and writes the table.

| module | model | multiply-adds | parameters | side | other sides | checked | patch | at full width |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures of timm; default: the smallest of every module")
    parser.add_argument("--check", action="store_true", help="also compare with the zeroed full model (slow)")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    smallest = json.loads(SMALLEST.read_text())
    with another_process() as outside:
        for name in args.names or smallest.values():
            row = results.get(name, {})
            if args.names or not row:
                row = measure(name)
            if args.check and (args.names or "checked" not in row):
                row["checked"] = check(name, outside)
            results[name] = row
            print(name, row, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "timm_support.md").write_text(table(results))


def measure(name: str) -> dict[str, object]:
    """Return shares, sides and patch time of one architecture, measured on the meta device."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    start = time.perf_counter()
    gradaug_hf.make_slimmable(model)
    seconds = time.perf_counter() - start
    report = gradaug_hf.slicing_report(model)
    side = model.pretrained_cfg["input_size"][-1]
    others = [round(side * scale) for scale in SCALES]
    accepted = ResolutionTrial(model).accepted(others)
    reasons = list(dict.fromkeys(report.refused.values()))
    return {
        "module": model.__class__.__module__.removeprefix("timm.models."),
        "sliced_macs": report.sliced_macs,
        "sliced_params": report.sliced_params,
        "side": side,
        "other_sides": accepted,
        "dynamic": None if accepted == others else dynamic_size_arguments(model, others),
        "seconds": seconds,
        "refused": len(report.refused),
        "reason": reasons[0] if reasons else "",
    }


@contextmanager
def another_process() -> Iterator[Outside]:
    """Start a process without gradaug_hf, in which extracted sub-networks are run."""
    with tempfile.TemporaryDirectory() as folder:
        outside = Outside(Path(folder))
        try:
            yield outside
        finally:
            outside.close()


def check(name: str, outside: Outside) -> str:
    """Run the test of the zoo on one architecture, and return "yes" or what went wrong."""
    try:
        test_zoo.check(name, outside)
    except Exception as error:  # a row of the table says what a model raised
        return f"no: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
    return "yes"


def table(results: dict[str, dict]) -> str:
    """Return the page: its header, a row for each architecture, and a summary."""
    lines = []
    for name, row in sorted(results.items(), key=lambda item: (item[1]["module"], item[0])):
        reason = f"{row['refused']} layers: {row['reason']}"[:140].replace("|", "/") if row["refused"] else ""
        sides = ", ".join(map(str, row["other_sides"])) or "none"
        if row.get("dynamic"):
            sides += f"; all with `{', '.join(f'{key}={value}' for key, value in row['dynamic'].items())}`"
        lines.append(
            f"| {row['module']} | `{name}` | {row['sliced_macs']:.1%} | {row['sliced_params']:.1%} | {row['side']} "
            f"| {sides} | {row.get('checked', 'not')} | {row['seconds']:.1f} s | {reason} |"
        )
    shares = [row["sliced_macs"] for row in results.values()]
    half, most = (sum(share >= limit for share in shares) for limit in (0.5, 0.9))
    checked = sum(row.get("checked") == "yes" for row in results.values())
    summary = (
        f"\nOf {len(shares)} models, {most} are sliced in at least 90% of the multiply-adds and {half} in at least "
        f"50%; {checked} are checked.\n"
    )
    return HEADER.format(version=timm.__version__) + "\n".join(lines) + "\n" + summary


if __name__ == "__main__":
    main()

"""Average precision of detections, by pycocotools."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from gradaug_hf.experiments.results import percent
from gradaug_hf.utils.tables import markdown_table

# The first of COCO's twelve figures.
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
KINDS = {"box": "bbox", "mask": "segm"}
MASK_THRESHOLD = 0.5


def as_coco_results(
    image_id: int, detections: Mapping[str, Tensor], categories: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the detections in an image as entries of COCO's result files.

    Args:
        image_id: of the image.
        detections: `boxes` (N, 4) as corners in pixels, `scores` (N,), `labels` (N,) from 1 on and, of Mask R-CNN,
            `masks` (N, 1, H, W), probabilities.
        categories: in the order of the labels, which start at 1.
    """
    boxes = detections["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {"image_id": image_id, "category_id": categories[label - 1]["id"], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True
        )
    ]
    if "masks" in detections:
        masks = (detections["masks"][:, 0] > MASK_THRESHOLD).byte().cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            code = mask_utils.encode(np.asfortranarray(mask))
            result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return results


def average_precision(coco: COCO, results: Sequence[dict[str, Any]], masks: bool) -> dict[str, float]:
    """Measure COCO's average precision: over IoU 0.5 to 0.95, at 0.5 and 0.75, of small, medium and large objects.

    Args:
        coco: the annotations; crowds in it are ignored, as COCO does.
        results: entries of a result file, on any of its images.
        masks: whether to measure masks beside boxes.

    Returns:
        `box_AP`, `box_AP50`, ... and `mask_AP`, ..., shares in 0..1; -1 where there is no object of the size.
    """
    figures = {}
    with redirect_stdout(StringIO()):
        for kind in KINDS if masks else ("box",):
            evaluation = COCOeval(coco, _detected(coco, results, KINDS[kind]), KINDS[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures |= {f"{kind}_{name}": float(value) for name, value in zip(FIGURES, evaluation.stats, strict=False)}
    return figures


def precision_table(figures: Mapping[str, float]) -> str:
    """Return average precisions in 0..1 as a Markdown table in %, with a dash where there is no object to find."""
    kinds = [kind for kind in KINDS if f"{kind}_AP" in figures]
    shares = {name: None if share < 0 else share for name, share in figures.items()}
    rows = [[kind, *(percent(shares[f"{kind}_{name}"]) for name in FIGURES)] for kind in kinds]
    return markdown_table(("%", *(name.replace("_", " ") for name in FIGURES)), rows)


def _detected(coco: COCO, results: Sequence[dict[str, Any]], kind: str) -> COCO:
    if not results:
        nothing = COCO()
        nothing.dataset = {**coco.dataset, "annotations": []}
        nothing.createIndex()
        return nothing
    other = "segmentation" if kind == "bbox" else "bbox"  # a mask's area is its own, not that of the box beside it
    return coco.loadRes([{name: value for name, value in each.items() if name != other} for each in results])

import json

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gradaug_hf.detection.coco import CocoImages
from gradaug_hf.detection.evaluation import as_coco_results, average_precision
from tests.detection.conftest import CATEGORIES, make_crowd

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def detections(target: dict, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """Every object of a target is found, its box moved."""
    count = len(target["labels"])
    return {
        "boxes": target["boxes"] + shift,
        "labels": target["labels"],
        "scores": torch.linspace(0.9, 0.4, count),
        "masks": target["masks"][:, None].float() * 0.8,
    }


def results_of(data: CocoImages, shift: float = 0.0) -> list[dict]:
    found = []
    for _, target in (data[index] for index in range(len(data))):
        found += as_coco_results(target["image_id"], detections(target, shift), data.categories)
    return found


def by_hand(annotations, results: list[dict], folder) -> dict[str, float]:
    """pycocotools on files, boxes and masks each in their own."""
    figures = {}
    for kind, iou_type, key in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
        file = folder / f"{kind}.json"
        names = ("image_id", "category_id", "score", key)
        file.write_text(json.dumps([{name: each[name] for name in names} for each in results]))
        coco = COCO(str(annotations))
        evaluation = COCOeval(coco, coco.loadRes(str(file)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        figures |= dict(zip((f"{kind}_{name}" for name in NAMES), evaluation.stats[:6].tolist(), strict=True))
    return figures


def test_average_precision_is_that_of_pycocotools_run_by_hand(write_coco, content, tmp_path):
    content["annotations"].append(make_crowd(9, 2, 3, (0, 0, 50, 30)))
    file, folder = write_coco(content)
    data = CocoImages(file, folder, masks=True)
    results = results_of(data, shift=3.0)
    results.append(results[0] | {"category_id": 7, "score": 0.95})  # of a wrong category
    found = average_precision(data.coco, results, masks=True)
    assert found == by_hand(file, results, tmp_path)
    assert 0 < found["box_AP"] < found["box_AP50"] <= 1
    assert found["mask_AP50"] < 1
    assert found["box_AP_large"] == -1  # there are none


def test_finding_every_object_is_a_precision_of_one_also_beside_a_crowd(write_coco, content):
    content["annotations"].append(make_crowd(9, 2, 3, (0, 0, 50, 30)))
    data = CocoImages(*write_coco(content), masks=True)
    results = results_of(data)
    in_crowd = {"image_id": 2, "category_id": 3, "bbox": [5, 5, 20, 20], "score": 0.99}
    boxes = average_precision(data.coco, [*results, in_crowd], masks=False)
    assert boxes["box_AP"] == pytest.approx(1)
    assert "mask_AP" not in boxes
    assert average_precision(data.coco, results, masks=True)["mask_AP"] == pytest.approx(1)


def test_finding_nothing_is_a_precision_of_zero(write_coco):
    data = CocoImages(*write_coco(), masks=True)
    found = average_precision(data.coco, [], masks=True)
    assert found["box_AP"] == found["mask_AP"] == 0


def test_results_have_the_files_categories_and_boxes_as_corner_and_size(write_coco):
    data = CocoImages(*write_coco(), masks=True)
    first, second = as_coco_results(1, detections(data[0][1]), CATEGORIES)
    assert first["bbox"] == [8, 10, 30, 24]
    assert (first["category_id"], second["category_id"]) == (3, 7)
    assert first["segmentation"]["size"] == [64, 96]
    json.dumps([first, second])


def test_masks_are_measured_by_their_own_area(write_coco):
    """A mask within a large box is an object of the mask's size."""
    data = CocoImages(*write_coco(), masks=True)
    results = [each | {"bbox": [0, 0, 96, 64]} for each in results_of(data)]
    assert average_precision(data.coco, results, masks=True)["mask_AP"] == pytest.approx(1)

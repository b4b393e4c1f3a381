import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

HEIGHT, WIDTH = 64, 96
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
COLOURS = {3: (200, 40, 40), 7: (40, 40, 200)}
# Of each image: category and box (x, y, width, height) of its objects. The third has none.
OBJECTS = [[(3, (8, 10, 30, 24)), (7, (50, 20, 34, 36))], [(7, (20, 6, 44, 40))], [], [(3, (30, 16, 40, 40))]]


def make_annotation(number: int, image_id: int, category: int, box: tuple, **fields: object) -> dict:
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    annotation = {
        "id": number, "image_id": image_id, "category_id": category, "bbox": list(box), "area": width * height,
        "iscrowd": 0, "segmentation": [corners],
    }  # fmt: skip
    return annotation | fields


def make_crowd(number: int, image_id: int, category: int, box: tuple) -> dict:
    x, y, width, height = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    code = mask_utils.encode(mask)
    segmentation = {"size": code["size"], "counts": code["counts"].decode()}
    return make_annotation(number, image_id, category, box, iscrowd=1, segmentation=segmentation)


@pytest.fixture
def content() -> dict:
    """Annotations of four images with rectangles, in COCO's format."""
    images = [
        {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
        for number in range(1, len(OBJECTS) + 1)
    ]
    boxes = [(number, *each) for number, objects in enumerate(OBJECTS, start=1) for each in objects]
    annotations = [make_annotation(number, *each) for number, each in enumerate(boxes, start=1)]
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}


@pytest.fixture
def write_coco(tmp_path, content) -> Callable[..., tuple[Path, Path]]:
    """Writes annotations and their images; the JSON file and the folder of images."""

    def write(found: dict | None = None) -> tuple[Path, Path]:
        found = content if found is None else found
        folder = tmp_path / "coco"
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "train").mkdir(exist_ok=True)
        for image in found["images"]:
            pixels = np.random.default_rng(image["id"]).integers(90, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            for annotation in found["annotations"]:
                if annotation["image_id"] == image["id"] and not annotation.get("iscrowd"):
                    x, y, width, height = (max(0, round(value)) for value in annotation["bbox"])
                    pixels[y : y + height, x : x + width] = COLOURS.get(annotation["category_id"], (0, 0, 0))
            Image.fromarray(pixels).save(folder / "train" / image["file_name"])
        file = folder / "annotations" / "boxes_train.json"
        file.write_text(json.dumps(found))
        return file, folder / "train"

    return write

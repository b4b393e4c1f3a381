"""Folders of images with annotations in COCO's format."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gradaug_hf.data.decoding import UnreadableImageError, to_rgb

NAMED = 3  # how many of the things that are wrong an error names
TABLES = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}
ANNOTATION = ("id", "image_id", "category_id", "bbox")


class CocoImages(Dataset):
    """Images and the objects to be trained on in them.

    An item is an image (3, H, W) in 0..1 and a target: `boxes` (objects, 4) as corners in pixels, `labels` (objects,)
    from 1 on, in the order of `categories`, `masks` (objects, H, W) if asked for, and `image_id`. An image without
    objects has none. Crowds are left out, since a crowd is no object, and so are, with a warning, objects without an
    area within the image or, where masks are read, without a polygon of three corners. `coco` keeps all of them for
    the evaluation.

    Args:
        annotations: JSON file in COCO's format.
        folder: of its images.
        masks: whether to read the objects' masks.
        flip: probability with which an image is flipped horizontally.

    Raises:
        ValueError: the file cannot be read or does not have COCO's format, an object has no mask where masks are
            asked for, or images are missing.
        UnreadableImageError: an item is asked for whose image cannot be decoded or has another size than it should.
    """

    def __init__(self, annotations: str | Path, folder: str | Path, masks: bool = False, flip: float = 0.0) -> None:
        self.coco = read_coco(annotations)
        self.folder = Path(folder)
        self.masks = masks
        self.categories = [{"id": c["id"], "name": c["name"]} for _, c in sorted(self.coco.cats.items())]
        self.image_ids = sorted(self.coco.imgs)
        self._labels = {category["id"]: label for label, category in enumerate(self.categories, start=1)}
        self._transform = v2.Compose([v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float32, scale=True)])
        files = [self.folder / image["file_name"] for image in self.coco.imgs.values()]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(
                f"{len(missing)} of the {len(files)} images of {annotations} are missing: {_some(missing)}"
            )
        objects = [a for a in self.coco.anns.values() if not a["iscrowd"]]
        if masks:
            _refuse(
                annotations,
                "annotations have no segmentation, which Mask R-CNN learns masks from; use detector='faster_rcnn'",
                (a["id"] for a in objects if not a.get("segmentation")),
            )
        if degenerate := [a["id"] for a in objects if not self._is_whole(a)]:
            warnings.warn(
                f"{annotations}: {len(degenerate)} objects have no area within their image and are not trained on; "
                f"annotations {_some(degenerate)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image_id = self.image_ids[index]
        image = self._read_image(image_id)
        target = self._make_target(image_id, tuple(image.shape[1:]))
        image, target = self._transform(image, target)
        return image.as_subclass(Tensor), {
            name: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for name, value in target.items()
        }

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """Return the annotations of an image that are trained on."""
        annotations = self.coco.imgToAnns.get(image_id, [])
        return [a for a in annotations if not a["iscrowd"] and self._is_whole(a)]

    def _is_whole(self, annotation: Mapping[str, Any]) -> bool:
        if self.masks and not _polygons(annotation):
            return False
        left, top, right, bottom = _corners(annotation, self.coco.imgs[annotation["image_id"]])
        return right > left and bottom > top

    def _read_image(self, image_id: int) -> tv_tensors.Image:
        described = self.coco.imgs[image_id]
        file = self.folder / described["file_name"]
        try:
            with Image.open(file) as image:
                pixels = tv_tensors.Image(v2.functional.pil_to_tensor(to_rgb(image)))
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"{file} cannot be read as an image: {error}") from error
        size = described["height"], described["width"]
        if tuple(pixels.shape[1:]) != size:
            raise UnreadableImageError(
                f"{file} has {tuple(pixels.shape[1:])} pixels (height, width); its annotation says {size}"
            )
        return pixels

    def _make_target(self, image_id: int, size: tuple[int, int]) -> dict[str, Any]:
        image, objects = self.coco.imgs[image_id], self.objects(image_id)
        boxes = torch.tensor([_corners(each, image) for each in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self._labels[each["category_id"]] for each in objects], dtype=torch.int64),
            "image_id": image_id,
        }
        if self.masks:
            masks = [
                torch.from_numpy(self.coco.annToMask({**each, "segmentation": _polygons(each)})) for each in objects
            ]
            target["masks"] = tv_tensors.Mask(
                torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
            )
        return target


def collate(items: Sequence[tuple[Tensor, dict[str, Any]]]) -> dict[str, list[Any]]:
    """Return a batch: `pixel_values`, a list of images, which differ in size, and `labels`, their targets."""
    images, targets = zip(*items, strict=True)
    return {"pixel_values": list(images), "labels": list(targets)}


def read_coco(file: str | Path) -> COCO:
    """Read and check annotations in COCO's format.

    Raises:
        ValueError: the file cannot be read or does not have the format; says where.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    _check_format(content, file)
    coco = COCO()
    coco.dataset = _completed(content)
    with redirect_stdout(StringIO()):
        coco.createIndex()
    return coco


def find_images(coco_dir: str | Path, annotations: str | Path) -> Path:
    """Return the folder of a file's images: that of its split's name, in COCO's own layout or below `images`.

    For `coco` and `instances_train2017.json` these are `coco/train2017` and `coco/images/train2017`.

    Raises:
        ValueError: there is none.
    """
    split = Path(annotations).stem.rpartition("_")[2]
    candidates = [Path(coco_dir) / split, Path(coco_dir) / "images" / split]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ValueError(
        f"the images of {annotations} are neither in {' nor in '.join(map(str, candidates))}; name their folder"
    )


def _check_format(content: Any, file: str | Path) -> None:
    if not isinstance(content, Mapping) or any(
        not isinstance(content.get(table), list) for table in (*TABLES, "annotations")
    ):
        raise ValueError(
            f"{file} is no file of COCO's format: it needs lists `images`, `categories` and `annotations`"
        )
    for table, names in (*TABLES.items(), ("annotations", ANNOTATION)):
        for place, entry in enumerate(content[table]):
            lacking = [name for name in names if not isinstance(entry, Mapping) or name not in entry]
            if lacking:
                raise ValueError(f"{file}: {table}[{place}] has no {', '.join(lacking)}")
    for table in ("images", "categories"):
        if not content[table]:
            raise ValueError(f"{file} has no {table}")
    known = {table: {entry["id"] for entry in content[table]} for table in TABLES}
    for table, name in (("images", "image_id"), ("categories", "category_id")):
        _refuse(
            file,
            f"annotations name {name}s that are not among its {table}",
            (a["id"] for a in content["annotations"] if a[name] not in known[table]),
        )
    _refuse(
        file,
        "annotations have a bbox that is not four finite numbers [x, y, width, height]",
        (a["id"] for a in content["annotations"] if not _is_box(a["bbox"])),
    )


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    """Return annotations with the fields that COCO's tool needs: areas, crowds, and ids that are unique and not 0."""
    annotations = [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry} for entry in content["annotations"]
    ]
    ids = {entry["id"] for entry in annotations}
    if 0 in ids or len(ids) < len(annotations):
        annotations = [{**entry, "id": number} for number, entry in enumerate(annotations, start=1)]
    return {**content, "annotations": annotations}


def _refuse(file: str | Path, problem: str, annotation_ids: Iterable[int]) -> None:
    found = list(annotation_ids)
    if found:
        raise ValueError(f"{file}: {len(found)} {problem}; annotations {_some(found)}")


def _some(things: Sequence[Any]) -> str:
    named = ", ".join(map(str, islice(things, NAMED)))
    return named if len(things) <= NAMED else f"{named} and {len(things) - NAMED} more"


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, (list, tuple))
        and len(box) == 4
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
    )


def _corners(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the part of a box that lies within its image."""
    x, y, width, height = annotation["bbox"]
    return max(0, x), max(0, y), min(image["width"], x + width), min(image["height"], y + height)


def _polygons(annotation: Mapping[str, Any]) -> Any:
    """Return a segmentation without polygons of fewer than three corners, which COCO's tool takes for boxes."""
    segmentation = annotation["segmentation"]
    return [p for p in segmentation if len(p) >= 6] if isinstance(segmentation, list) else segmentation

import json
import math
import re

import numpy as np
import PIL.Image
import pytest
import torch

from gradaug_hf.data.decoding import UnreadableImageError
from gradaug_hf.detection.coco import CocoImages, collate, find_images, read_coco
from tests.detection.conftest import CATEGORIES, HEIGHT, WIDTH, make_annotation, make_crowd


def test_an_item_is_an_image_with_the_boxes_labels_and_masks_of_its_objects(write_coco):
    data = CocoImages(*write_coco(), masks=True)
    assert data.categories == CATEGORIES
    assert len(data) == 4
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert target["image_id"] == 1
    assert target["labels"].tolist() == [1, 2]  # categories 3 and 7
    assert target["boxes"].tolist() == [[8, 10, 38, 34], [50, 20, 84, 56]]
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[10:34, 8:38] = 1
    assert torch.equal(target["masks"][0], expected)
    assert type(image) is type(target["boxes"]) is torch.Tensor


def test_a_flip_moves_image_boxes_and_masks_alike(write_coco):
    file, folder = write_coco()
    image, target = CocoImages(file, folder, masks=True)[0]
    flipped, moved = CocoImages(file, folder, masks=True, flip=1.0)[0]
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(moved["masks"], target["masks"].flip(-1))
    assert moved["boxes"].tolist() == [[WIDTH - 38, 10, WIDTH - 8, 34], [WIDTH - 84, 20, WIDTH - 50, 56]]


def test_an_image_without_objects_has_an_empty_target(write_coco):
    _, target = CocoImages(*write_coco(), masks=True)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, HEIGHT, WIDTH)


def test_a_crowd_is_not_trained_on_and_stays_for_the_evaluation(write_coco, content):
    content["annotations"].append(make_crowd(9, 2, 3, (0, 0, 50, 30)))
    data = CocoImages(*write_coco(content), masks=True)
    assert data[1][1]["labels"].tolist() == [2]
    assert data.coco.anns[9]["iscrowd"] == 1


def test_boxes_without_area_in_the_image_are_left_out_with_a_warning_and_others_are_clipped(write_coco, content):
    content["annotations"] += [
        make_annotation(20, 3, 3, (10, 10, 0, 5)),
        make_annotation(21, 3, 3, (WIDTH + 4, 10, 10, 5)),
        make_annotation(22, 3, 7, (-6, 50, 20, 30)),
    ]
    file, folder = write_coco(content)
    with pytest.warns(UserWarning, match=re.escape(f"{file}: 2 objects") + ".*annotations 20, 21"):
        data = CocoImages(file, folder)
    assert data[2][1]["boxes"].tolist() == [[0, 50, 14, HEIGHT]]


def test_polygons_of_fewer_than_three_corners_are_left_out(write_coco, content):
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    content["annotations"] += [
        make_annotation(20, 3, 3, (10, 10, 10, 10), segmentation=[square, [30, 30, 40, 40]]),
        make_annotation(21, 3, 7, (30, 30, 10, 10), segmentation=[[30, 30, 40, 40]]),
    ]
    file, folder = write_coco(content)
    with pytest.warns(UserWarning, match="1 objects .*annotations 21"):
        _, target = CocoImages(file, folder, masks=True)[2]
    assert target["labels"].tolist() == [1]
    assert target["masks"].sum() == 100
    assert len(CocoImages(file, folder)[2][1]["labels"]) == 2


def test_a_batch_is_the_images_and_targets_as_lists(write_coco):
    data = CocoImages(*write_coco())
    batch = collate([data[0], data[2]])
    assert [image.shape for image in batch["pixel_values"]] == [(3, HEIGHT, WIDTH)] * 2
    assert [len(target["boxes"]) for target in batch["labels"]] == [2, 0]


def test_what_cocos_tool_needs_is_completed(tmp_path, content):
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number  # 0 would count as not found
        del annotation["iscrowd"], annotation["area"]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    coco = read_coco(file)
    assert sorted(coco.anns) == [1, 2, 3, 4]
    assert coco.anns[1]["area"] == 30 * 24
    assert not any(a["iscrowd"] for a in coco.anns.values())


def without(key):
    return lambda content: content.pop(key)


def with_annotation(**fields):
    return lambda content: content["annotations"].append(make_annotation(77, 1, 3, (1, 1, 9, 9)) | fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("categories"), "no file of COCO's format"),
        (lambda content: content.update(annotations={}), "no file of COCO's format"),
        (lambda content: content["images"].clear(), "has no images"),
        (lambda content: content["images"][1].pop("height"), r"images\[1\] has no height"),
        (lambda content: content["annotations"][2].pop("bbox"), r"annotations\[2\] has no bbox"),
        (with_annotation(image_id=99), "1 annotations name image_ids that are not among its images; annotations 77"),
        (with_annotation(category_id=5), "category_ids that are not among its categories; annotations 77"),
        (with_annotation(bbox=[1, 2, math.nan, 4]), "not four finite numbers.*annotations 77"),
        (with_annotation(bbox=[1, 2, 3]), "not four finite numbers.*annotations 77"),
        (with_annotation(segmentation=[]), "no segmentation.*detector='faster_rcnn'; annotations 77"),
    ],
)
def test_annotations_of_another_format_are_refused_with_the_place(write_coco, content, spoil, message):
    _, folder = write_coco(content)
    spoil(content)
    file = folder.parent / "spoilt.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        CocoImages(file, folder, masks=True)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_file_that_is_missing_or_no_json_object_is_named(tmp_path, text):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_coco(file)


def test_missing_images_are_counted_and_named_before_anything_is_read(write_coco):
    file, folder = write_coco()
    (folder / "2.png").unlink()
    (folder / "4.png").unlink()
    with pytest.raises(ValueError, match=f"2 of the 4 images of .* are missing: {re.escape(str(folder / '2.png'))}, "):
        CocoImages(file, folder)


def test_an_image_that_is_none_or_of_another_size_is_named(write_coco, content):
    content["images"][0]["height"] += 1
    file, folder = write_coco(content)
    (folder / "2.png").write_bytes(b"nothing")
    data = CocoImages(file, folder)
    with pytest.raises(UnreadableImageError, match=r"1\.png has \(64, 96\) pixels .* annotation says \(65, 96\)"):
        data[0]
    with pytest.raises(UnreadableImageError, match=r"2\.png cannot be read as an image"):
        data[1]


def test_pixels_of_more_than_8_bits_are_scaled_by_their_range(write_coco):
    file, folder = write_coco()
    pixels = np.full((HEIGHT, WIDTH), 51 * 256, dtype=np.uint16)
    PIL.Image.fromarray(pixels).save(folder / "1.png")
    image, _ = CocoImages(file, folder)[0]
    assert (image * 255).round().unique().tolist() == [51]


@pytest.mark.parametrize("place", ["train2017", "images/train2017"])
def test_images_are_found_by_the_name_of_their_annotations(tmp_path, place):
    with pytest.raises(ValueError, match="name their folder"):
        find_images(tmp_path, "annotations/instances_train2017.json")
    (tmp_path / place).mkdir(parents=True)
    assert find_images(tmp_path, "annotations/instances_train2017.json") == tmp_path / place

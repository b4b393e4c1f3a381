import numpy as np
import PIL.Image
import pytest
import torch
from transformers import default_data_collator

from gradaug_hf.data.collator import collate_images

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
INTEGERS = [
    *(dtype for dtype in (int, np.int8, np.int16, np.int32, np.uint8, np.uint16)),
    *(dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64)),
]


def label(dtype: type | torch.dtype, value: int) -> object:
    return torch.tensor(value, dtype=dtype) if isinstance(dtype, torch.dtype) else dtype(value)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_integer_labels_of_every_kind_become_int64(dtype: type | torch.dtype, named: bool):
    pairs = [(image, label(dtype, value)) for image, value in zip(IMAGES, (3, 100), strict=True)]
    examples = [{"pixel_values": image, "labels": number} for image, number in pairs] if named else pairs
    batch = collate_images(examples)
    assert list(batch) == ["pixel_values", "labels"]
    assert torch.equal(batch["pixel_values"], IMAGES)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [3, 100]


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_probabilities_stay_as_they_are(make):
    batch = collate_images([(image, make([0.25, 0.75])) for image in IMAGES])
    assert batch["labels"].is_floating_point()
    assert batch["labels"].tolist() == [[0.25, 0.75]] * 2


def test_other_examples_are_those_of_the_default_collator():
    examples = [{"pixel_values": image, "label": 1, "row": 7, "mask": None, "name": "a"} for image in IMAGES]
    batch, expected = collate_images(examples), default_data_collator(examples)
    assert batch.keys() == expected.keys()
    for name in expected:
        assert torch.equal(batch[name], expected[name])
        assert batch[name].dtype == expected[name].dtype
    assert collate_images([{"labels": True}] * 2)["labels"].dtype == torch.bool


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((IMAGES[0], 1, "a.png"), "an example is a tuple of 3; expected a pair of image and label"),
        ((PIL.Image.new("RGB", (4, 4)), 1), "one of Pillow; give its dataset a transform that makes it a tensor"),
    ],
)
def test_example_that_is_no_pair_is_refused(example: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        collate_images([example])

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from gradaug_hf.data.bad_images import SkippingDataset, readable_images
from gradaug_hf.data.decoding import UnreadableImageError, with_pixels
from gradaug_hf.data.transforms import cifar_transform
from tests.helpers.small_training import images


def with_bad_images(rows: list[int], count: int = 12) -> Dataset:
    good = images(count, 3)
    broken = [
        {**image, "bytes": image["bytes"][:60], "path": f"{row}.png"} if row in rows else image
        for row, image in enumerate(good["image"])
    ]
    return good.remove_columns("image").add_column("image", broken, feature=good.features["image"])


def pixels(split: Dataset) -> Dataset:
    return with_pixels(split, cifar_transform(False, size=16))


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_stands_for_one_that_cannot_be_decoded_and_each_is_counted_once(workers):
    data = SkippingDataset(pixels(with_bad_images([2, 3, 11])))
    loader = DataLoader(data, 4, num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 4]
    found = torch.cat([batch["pixel_values"] for batch in batches])
    good = pixels(images(12, 3))
    for index, shown in enumerate([0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 0]):
        assert torch.equal(found[index], good[shown]["pixel_values"])
    assert data.skipped.nonzero().flatten().tolist() == [2, 3, 11]


def test_a_skipped_image_is_warned_of_with_its_row_and_file():
    data = SkippingDataset(pixels(with_bad_images([2])))
    with pytest.warns(UserWarning, match=r"skipped: the image in row 2 of split None \(2.png\) cannot be decoded"):
        data[2]


@pytest.mark.filterwarnings("ignore:skipped")
def test_images_none_of_which_can_be_decoded_are_an_error():
    data = SkippingDataset(pixels(with_bad_images(list(range(12)))))
    with pytest.raises(ValueError, match="12 images in a row cannot be decoded, the last since the image in row 4"):
        data[5]


def test_without_skipping_an_image_that_cannot_be_decoded_is_an_error_with_row_and_file():
    loader = DataLoader(pixels(with_bad_images([5])), 4, num_workers=1)
    with pytest.raises(UnreadableImageError, match=r"the image in row 5 of split None \(5.png\) cannot be decoded"):
        list(loader)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_split_to_evaluate_on_is_left_without_them():
    left = readable_images(with_bad_images([0, 7]))
    assert left["row"] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]

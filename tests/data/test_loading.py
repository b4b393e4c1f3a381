import io
import pickle
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDatasetDict, SplitDict, SplitInfo, Value
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from gradaug_hf.data.loading import (
    balanced_subset,
    cifar_transform,
    class_names,
    imagenet_transform,
    load_digits_data,
    load_image_data,
    number_of_images,
    stream_image_data,
    take_images,
    with_pixels,
)
from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(value: int, size: tuple[int, int] = (12, 10)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, (value, value // 2, 255 - value))


def noise(size: int = 32) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def dataset(labels: list, label=None, image_column: str = "img", label_column: str = "label") -> Dataset:
    label = ClassLabel(names=["ant", "bee"]) if label is None else label
    images = [picture(10 * index) for index in range(len(labels))]
    features = Features({image_column: Image(), label_column: label})
    return Dataset.from_dict({image_column: images, label_column: labels}, features=features)


def red(split: Dataset) -> list[int]:
    """The red value that tells the pictures apart."""
    return [int(PIL.Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0))[0]) for row in split]


def test_folder_of_parquet_files_gives_its_splits_in_one_form(tmp_path):
    dataset([0, 1, 1]).to_parquet(tmp_path / "train.parquet")
    dataset([1, 0]).to_parquet(tmp_path / "test.parquet")
    data = load_image_data(str(tmp_path))
    assert list(data) == ["train", "eval"]
    assert data["train"].column_names == ["image", "label", "row"]
    assert list(data["train"]["label"]) == [0, 1, 1]
    assert list(data["eval"]["label"]) == [1, 0]
    assert red(data["train"]) == [0, 10, 20]
    assert list(data["train"]["row"]) == [0, 1, 2]
    assert class_names(data) == ["ant", "bee"]


def test_validation_split_is_preferred_and_can_be_overruled(tmp_path):
    for split, labels in {"train": [0, 1], "validation": [0], "test": [1, 1, 1]}.items():
        dataset(labels).to_parquet(tmp_path / f"{split}.parquet")
    assert len(load_image_data(str(tmp_path))["eval"]) == 1
    assert len(load_image_data(str(tmp_path), eval_split="test")["eval"]) == 3
    assert len(load_image_data(str(tmp_path), train_split="test", eval_split="train")["train"]) == 3


def test_a_fifth_of_each_class_of_a_lone_parquet_file_is_held_out(tmp_path):
    file = tmp_path / "photos.parquet"
    dataset([0] * 10 + [1] * 5).to_parquet(file)
    data = load_image_data(str(file), seed=3)
    assert Counter(data["train"]["label"]) == {0: 8, 1: 4}
    assert Counter(data["eval"]["label"]) == {0: 2, 1: 1}
    assert sorted([*data["train"]["row"], *data["eval"]["row"]]) == list(range(15))
    assert list(load_image_data(str(file), seed=3)["eval"]["row"]) == list(data["eval"]["row"])
    others = {tuple(load_image_data(str(file), seed=seed)["eval"]["row"]) for seed in range(5)}
    assert len(others) > 1


def test_class_with_one_image_cannot_be_held_out(tmp_path):
    file = tmp_path / "photos.parquet"
    dataset([0, 0, 0, 1]).to_parquet(file)
    with pytest.raises(ValueError, match="'bee' has a single image.*eval_split"):
        load_image_data(str(file))


def test_folder_of_images_is_labelled_by_its_subfolders(tmp_path):
    for split in ("train", "test"):
        for value, name in ((50, "cat"), (200, "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                picture(value).save(folder / f"{index}.png")
    data = load_image_data(str(tmp_path))
    assert class_names(data) == ["cat", "dog"]
    assert {len(data["train"]), len(data["eval"])} == {4}
    first = with_pixels(data["train"], cifar_transform(False, size=8, mean=(0, 0, 0), std=(1, 1, 1)))[0]
    assert first["labels"] == 0
    assert first["pixel_values"][0].mean().item() == pytest.approx(50 / 255)


def test_string_labels_become_classes_in_alphabetical_order(tmp_path):
    dataset(["cat", "ant"], Value("string")).to_parquet(tmp_path / "train.parquet")
    dataset(["bee"], Value("string")).to_parquet(tmp_path / "test.parquet")
    data = load_image_data(str(tmp_path))
    assert class_names(data) == ["ant", "bee", "cat"]
    assert list(data["train"]["label"]) == [2, 0]
    assert list(data["eval"]["label"]) == [1]


def test_integer_labels_keep_their_value(tmp_path):
    dataset([11, 2], Value("int64")).to_parquet(tmp_path / "train.parquet")
    dataset([10], Value("int64")).to_parquet(tmp_path / "test.parquet")
    data = load_image_data(str(tmp_path))
    assert list(data["train"]["label"]) == [11, 2]
    assert data["train"].features["label"].num_classes == 12


def test_encoded_images_without_a_type_are_found_by_name(tmp_path):
    features = Features({"image": Value("binary"), "label": ClassLabel(names=["ant", "bee"])})
    encoded = {"image": [png(picture(7)), png(picture(9))], "label": [0, 1]}
    for split in ("train", "test"):
        Dataset.from_dict(encoded, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert red(load_image_data(str(tmp_path))["train"]) == [7, 9]


def test_columns_of_other_names_are_found_by_type(tmp_path):
    for split in ("train", "test"):
        dataset([0, 1], image_column="scan", label_column="species").to_parquet(tmp_path / f"{split}.parquet")
    assert list(load_image_data(str(tmp_path))["train"]["label"]) == [0, 1]


@pytest.mark.parametrize("column", ["image", "label"])
def test_missing_column_names_the_columns_found(tmp_path, column: str):
    split = dataset([0, 1]).remove_columns("img" if column == "image" else "label").add_column("weight", [1.5, 2.5])
    split.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=rf"no {column} column; name one as {column}_column.*weight"):
        load_image_data(str(tmp_path))


def test_several_columns_ask_for_a_choice(tmp_path):
    for split in ("train", "test"):
        two = dataset([0, 1], label_column="genus").add_column("species", [1, 1], feature=ClassLabel(num_classes=2))
        two.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="several label columns; name one as label_column.*genus.*species"):
        load_image_data(str(tmp_path))
    assert list(load_image_data(str(tmp_path), label_column="species")["train"]["label"]) == [1, 1]


def test_wrong_column_is_refused(tmp_path):
    dataset([0, 1]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="image_column='label' is not a column of images; columns found: img.*label"):
        load_image_data(str(tmp_path), image_column="label")
    with pytest.raises(ValueError, match="label_column='kind' is not a column of labels"):
        load_image_data(str(tmp_path), label_column="kind")


def test_missing_split_names_the_splits_found(tmp_path):
    dataset([0, 1]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no split 'train'; splits found: test"):
        load_image_data(str(tmp_path))
    with pytest.raises(ValueError, match="no split 'dev'; splits found: test"):
        load_image_data(str(tmp_path), train_split="test", eval_split="dev")


@pytest.mark.parametrize(("label", "shown"), [(-1, "-1"), (None, "None")])
@pytest.mark.parametrize("feature", [ClassLabel(num_classes=2), Value("int64")])
def test_label_out_of_range_names_its_row(tmp_path, label, shown: str, feature):
    dataset([0, 1]).to_parquet(tmp_path / "train.parquet")
    dataset([0, 1, label], feature).to_parquet(tmp_path / "test.parquet")
    dataset([0, 1], feature).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=rf"row 2 of split test: label {shown} is not in 0..1"):
        load_image_data(str(tmp_path))


def test_data_set_that_cannot_be_loaded_is_named(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    for name in (str(tmp_path / "absent"), str(broken)):
        with pytest.raises(OSError, match=f"data set '{name}' cannot be loaded; a Hub id, a parquet file"):
            load_image_data(name)


def test_hub_data_set_without_a_network_says_what_to_do():
    message = "'nobody/nothing' is neither a file nor a folder here, and the Hub cannot be reached.*HF_HUB_OFFLINE"
    with pytest.raises(OSError, match=message):
        load_image_data("nobody/nothing")


def test_fine_classes_are_preferred_to_coarse_ones(tmp_path):
    for split in ("train", "test"):
        two = dataset([0, 1], label_column="coarse_label")
        two = two.add_column("fine_label", [1, 1], feature=ClassLabel(names=["fox", "owl"]))
        two.to_parquet(tmp_path / f"{split}.parquet")
    data = load_image_data(str(tmp_path))
    assert class_names(data) == ["fox", "owl"]
    assert list(data["train"]["label"]) == [1, 1]
    assert class_names(load_image_data(str(tmp_path), label_column="coarse_label")) == ["ant", "bee"]


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/datasets/some/set")
    return kind("the Hub's own words", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("streaming", [False, True])
def test_gated_data_set_says_where_to_accept_its_terms(monkeypatch, status: int, streaming: bool):
    monkeypatch.setattr("datasets.load._raise_if_offline_mode_is_enabled", lambda: None)

    def refuse(self, *args, **kwargs):
        raise hub_error(GatedRepoError, status)

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", refuse)
    load = stream_image_data if streaming else load_image_data
    with pytest.raises(
        OSError, match="'some/set' is gated: accept its terms at https://huggingface.co/datasets/some/set"
    ):
        load("some/set")


def test_data_set_that_is_not_on_the_hub_says_so(monkeypatch):
    monkeypatch.setattr("datasets.load._raise_if_offline_mode_is_enabled", lambda: None)

    def refuse(self, *args, **kwargs):
        raise hub_error(RepositoryNotFoundError, 404)

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", refuse)
    with pytest.raises(OSError, match="'some/set' is not on the Hub, or it is private: check its name"):
        load_image_data("some/set")


def streamed(tmp_path, column: str = "img") -> IterableDatasetDict:
    for split, labels in {"train": [0, 1, 1], "test": [1, 0]}.items():
        dataset(labels, image_column=column).to_parquet(tmp_path / f"{split}.parquet")
    return stream_image_data(str(tmp_path))


@pytest.mark.parametrize("column", ["img", "image"])
def test_stream_gives_the_same_examples_as_the_loaded_data_set(tmp_path, column: str):
    data = streamed(tmp_path, column)
    assert class_names(data) == ["ant", "bee"]
    loaded = load_image_data(str(tmp_path))
    transform = cifar_transform(False, size=8)
    for key in ("train", "eval"):
        examples = list(with_pixels(data[key], transform))
        expected = list(with_pixels(loaded[key], transform))
        assert [example["labels"] for example in examples] == [example["labels"] for example in expected]
        for example, other in zip(examples, expected, strict=True):
            assert torch.equal(example["pixel_values"], other["pixel_values"])
    assert len(list(take_images(data["train"], 2, seed=0))) == 2


def test_number_of_images_is_known_of_what_is_loaded_and_of_streams_that_say_it(tmp_path):
    data = streamed(tmp_path)
    assert number_of_images(load_image_data(str(tmp_path))["train"]) == 3
    assert number_of_images(data["train"]) is None
    data["train"].info.splits = SplitDict({"train": SplitInfo("train", num_examples=17)})
    assert number_of_images(data["train"].cast_column("image", Image(decode=False))) == 17


def test_image_of_a_stream_that_cannot_be_decoded_is_named(tmp_path):
    features = Features(
        {"image": {"bytes": Value("binary"), "path": Value("string")}, "label": ClassLabel(num_classes=2)}
    )
    rows = {"image": [{"bytes": b"nothing", "path": "cat.png"}], "label": [0]}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = stream_image_data(str(tmp_path))
    with pytest.raises(ValueError, match=r"the image in split train \(cat.png\) cannot be decoded"):
        list(with_pixels(data["train"], cifar_transform(False)))


def test_stream_needs_a_second_split_and_names_of_the_classes(tmp_path):
    dataset([0, 1]).to_parquet(tmp_path / "photos.parquet")
    with pytest.raises(ValueError, match="split 'train' is the only one, and nothing can be held out of a stream"):
        stream_image_data(str(tmp_path / "photos.parquet"))
    dataset([3, 4], Value("int64")).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="label_column 'label' is a Value.*without streaming"):
        stream_image_data(str(tmp_path / "numbers.parquet"), eval_split="train")


def test_taken_images_are_drawn_from_the_seed():
    data = load_digits_data(size=8)["train"]
    rows = [list(take_images(data, 30, seed)["row"]) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 30
    assert len(take_images(data, 10**6, 0)) == len(data)


def test_balanced_subset_draws_as_many_of_each_class_and_depends_on_the_seed():
    data = load_digits_data(size=8)["train"]
    subset = balanced_subset(data, 7, seed=1)
    assert Counter(subset["label"]) == dict.fromkeys(range(10), 7)
    assert len(set(subset["row"])) == 70
    assert list(subset["row"]) == list(balanced_subset(data, 7, seed=1)["row"])
    assert list(subset["row"]) != list(balanced_subset(data, 7, seed=2)["row"])


@pytest.mark.parametrize(("labels_per_class", "message"), [(0, "at least 1"), (3, "class 'bee' has only 2 images")])
def test_impossible_subset_is_refused(labels_per_class: int, message: str):
    with pytest.raises(ValueError, match=f"labels_per_class={labels_per_class}: {message}"):
        balanced_subset(dataset([0, 0, 0, 1, 1]), labels_per_class)


def test_digits_are_those_of_scikit_learn():
    data = load_digits_data(size=8)
    digits = load_digits()
    assert (len(data["train"]), len(data["eval"])) == (898, 899)
    assert [*data["train"]["label"], *data["eval"]["label"]] == digits.target.tolist()
    images = [PIL.Image.open(io.BytesIO(row["image"]["bytes"])) for row in data["eval"].select(range(20))]
    assert {image.mode for image in images} == {"RGB"}
    for image, expected in zip(images, digits.images[898:], strict=False):
        assert np.abs(np.asarray(image)[..., 0] - expected * 255 / 16).max() <= 0.5
    assert PIL.Image.open(io.BytesIO(load_digits_data()["train"][0]["image"]["bytes"])).size == (32, 32)


def mixed_modes() -> list[tuple[PIL.Image.Image, str, tuple[int, int, int]]]:
    """Images, a file format that keeps their mode, and the colour they show."""
    grey16 = PIL.Image.fromarray(np.full((12, 12), 100 * 256 + 17, dtype=np.uint16))
    palette = PIL.Image.new("P", (12, 12))
    palette.putpalette([200, 100, 50] + [0] * 765)
    return [
        (PIL.Image.new("L", (12, 12), 80), "PNG", (80, 80, 80)),
        (PIL.Image.new("1", (12, 12), 1), "PNG", (255, 255, 255)),
        (grey16, "PNG", (100, 100, 100)),
        (palette, "PNG", (200, 100, 50)),
        (PIL.Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (PIL.Image.new("RGBA", (12, 12), (10, 20, 30, 128)), "PNG", (10, 20, 30)),
        (PIL.Image.new("LA", (12, 12), (40, 128)), "PNG", (40, 40, 40)),
    ]


def encoded_dataset(encoded: list[bytes]) -> Dataset:
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=2), "row": Value("int64")})
    columns = {
        "image": [{"bytes": image, "path": None} for image in encoded],
        "label": [0] * len(encoded),
        "row": list(range(100, 100 + len(encoded))),
    }
    return Dataset.from_dict(columns, features=features, split="train")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("image", "file_format", "colour"), mixed_modes(), ids=lambda value: getattr(value, "mode", "")
)
def test_every_image_mode_becomes_rgb(image: PIL.Image.Image, file_format: str, colour: tuple[int, int, int]):
    file = io.BytesIO()
    image.save(file, file_format)
    transform = cifar_transform(False, size=12, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = with_pixels(encoded_dataset([file.getvalue()]), transform)[0]["pixel_values"]
    assert pixels.shape == (3, 12, 12)
    assert (pixels[:, 5, 5] * 255).round().int().tolist() == list(colour)


@pytest.mark.filterwarnings("error")
def test_transparent_palette_becomes_rgb():
    image = PIL.Image.new("P", (12, 12))
    image.putpalette([200, 100, 50] + [0] * 765)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(256))
    transform = cifar_transform(False, size=12, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = with_pixels(encoded_dataset([file.getvalue()]), transform)[0]["pixel_values"]
    assert (pixels[:, 5, 5] * 255).round().int().tolist() == [200, 100, 50]


@pytest.mark.parametrize("broken", [b"not an image", png(noise())[:200], b""], ids=["text", "truncated", "empty"])
def test_image_that_cannot_be_decoded_is_named_by_its_row(broken: bytes):
    split = with_pixels(encoded_dataset([png(picture(1)), png(picture(2)), broken]), cifar_transform(False))
    with pytest.raises(ValueError, match="the image in row 102 of split train cannot be decoded"):
        list(split.select([1, 2]))


def test_images_are_decoded_in_the_workers():
    split = with_pixels(encoded_dataset([png(picture(1)), b"not an image"]), cifar_transform(False))
    batches = iter(DataLoader(split, batch_size=1, num_workers=1))
    assert next(batches)["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="^the image in row 101 of split train") as raised:
        next(batches)
    assert "in DataLoader worker process 0" in raised.value.args[0]


def test_missing_image_is_named_by_its_row():
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=2), "row": Value("int64")})
    split = Dataset.from_dict({"image": [None], "label": [0], "row": [4]}, features=features, split="train")
    with pytest.raises(ValueError, match="there is no image in row 4 of split train"):
        with_pixels(split, cifar_transform(False))[0]


def test_image_file_that_cannot_be_decoded_is_named(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(5):
            picture(3).save(folder / f"{index}.png")
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"not an image")
    data = load_image_data(str(tmp_path), eval_split="train")
    with pytest.raises(ValueError, match=r"row 7 of split train \(.*dog.2\.png\)"):
        list(with_pixels(data["train"], cifar_transform(False)))


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) of 0..255, by the formula, in float64."""
    values = (pixels.astype(np.float64) / 255 - np.array(CIFAR_MEAN)) / np.array(CIFAR_STD)
    return torch.from_numpy(values.transpose(2, 0, 1))


def test_cifar_evaluation_only_normalises():
    image = noise()
    torch.testing.assert_close(
        cifar_transform(False)(image).double(), normalised(np.asarray(image)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("flip", [True, False])
def test_cifar_training_crops_from_a_reflected_border_and_flips_half(flip: bool):
    image = noise()
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = normalised(padded[top : top + 32, left : left + 32])
            for flipped in (False, True):
                key = torch.round((crop.flip(2) if flipped else crop) * 1000).int().numpy().tobytes()
                crops[key] = (top, left, flipped)
    torch.manual_seed(0)
    transform = cifar_transform(True, flip=flip)
    drawn = [crops[torch.round(transform(image).double() * 1000).int().numpy().tobytes()] for _ in range(300)]
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(9))
    assert np.mean([flipped for _, _, flipped in drawn]) == pytest.approx(0.5 if flip else 0, abs=0.1)


@pytest.mark.parametrize("train", [True, False])
def test_images_of_other_sizes_are_brought_to_one(train: bool):
    for size in ((50, 40), (8, 8), (20, 100)):
        assert cifar_transform(train, size=24)(picture(5, size)).shape == (3, 24, 24)
        assert imagenet_transform(train)(picture(5, size)).shape == (3, 224, 224)


def test_imagenet_evaluation_takes_the_centre_of_256():
    image = noise(256)
    centre = np.asarray(image)[16:240, 16:240]
    pixels = imagenet_transform(False, mean=CIFAR_MEAN, std=CIFAR_STD)(image)
    torch.testing.assert_close(pixels.double(), normalised(centre), rtol=1e-5, atol=1e-5)


def test_imagenet_training_varies_crop_flip_and_colour():
    torch.manual_seed(0)
    grey = PIL.Image.new("RGB", (300, 300), (128, 128, 128))
    drawn = torch.stack([imagenet_transform(True, mean=(0, 0, 0), std=(1, 1, 1))(grey).mean() for _ in range(100)])
    assert drawn.min() < 0.5 * 0.75
    assert drawn.max() > 0.5 * 1.25
    assert drawn.min() >= 0.5 * 0.6 - 0.01
    assert drawn.max() <= 0.5 * 1.4 + 0.01
    half = PIL.Image.new("RGB", (300, 300))
    half.paste((255, 255, 255), (150, 0, 300, 300))
    whites = [imagenet_transform(True)(half).flatten(1).mean().item() for _ in range(20)]
    assert len(set(whites)) > 10


def test_data_can_be_sent_to_a_spawned_worker():
    split = with_pixels(load_digits_data()["eval"].select(range(4)), cifar_transform(False))
    sent = pickle.loads(pickle.dumps(split))
    for here, there in zip(split, sent, strict=True):
        assert torch.equal(here["pixel_values"], there["pixel_values"])


def test_real_data_sets_load(real_data: Path):
    cifar = load_image_data(str(real_data / "cifar10"))
    assert (len(cifar["train"]), len(cifar["eval"])) == (20_000, 10_000)
    assert class_names(cifar)[3] == "cat"
    insects = load_image_data(str(real_data / "hymenoptera"))
    assert (len(insects["train"]), len(insects["eval"])) == (244, 153)
    photo = with_pixels(insects["train"], imagenet_transform(True))[0]["pixel_values"]
    assert photo.shape == (3, 224, 224)

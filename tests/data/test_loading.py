import io
from collections import Counter
from pathlib import Path

import httpx2
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDatasetDict, SplitDict, SplitInfo, Value
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.digits import load_digits_data
from gradaug_hf.data.loading import (
    balanced_subset,
    class_names,
    load_image_data,
    number_of_images,
    stream_image_data,
    take_images,
)
from gradaug_hf.data.transforms import cifar_transform, imagenet_transform
from tests.helpers.pictures import dataset, picture, png


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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


@pytest.mark.filterwarnings("ignore:.*have no image in split test")
def test_validation_split_is_preferred_and_can_be_overruled(tmp_path):
    for split, labels in {"train": [0, 1], "validation": [0], "test": [1, 1, 1]}.items():
        dataset(labels).to_parquet(tmp_path / f"{split}.parquet")
    assert len(load_image_data(str(tmp_path))["eval"]) == 1
    assert len(load_image_data(str(tmp_path), eval_split="test")["eval"]) == 3
    assert len(load_image_data(str(tmp_path), train_split="test", eval_split="train")["train"]) == 3


def test_parquet_files_that_are_not_read_are_warned_of(tmp_path, recwarn):
    for name in ("train", "test"):
        dataset([0, 1]).to_parquet(tmp_path / f"{name}.parquet")
    load_image_data(str(tmp_path))
    assert not [warning for warning in recwarn if "are not read" in str(warning.message)]
    dataset([0, 1]).to_parquet(tmp_path / "photos.parquet")
    with pytest.warns(UserWarning, match=r"1 parquet files in .* are not read, .*photos.parquet first"):
        load_image_data(str(tmp_path))


def test_one_image_of_each_class_is_held_out_of_few(tmp_path):
    dataset([0, 0, 1, 1]).to_parquet(tmp_path / "photos.parquet")
    data = load_image_data(str(tmp_path / "photos.parquet"))
    assert sorted(data["train"]["label"]) == sorted(data["eval"]["label"]) == [0, 1]


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


def test_data_set_that_cannot_be_loaded_is_named(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    for name in (str(tmp_path / "absent"), str(broken)):
        with pytest.raises(OSError, match=f"dataset '{name}' cannot be loaded; a Hub id, a parquet file"):
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
    assert number_of_images(data["train"]) == 3
    data["train"].info.splits = None
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


def test_taken_images_are_sampled_from_the_seed():
    data = load_digits_data(size=8)["train"]
    rows = [list(take_images(data, 30, seed)["row"]) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 30
    assert len(take_images(data, 10**6, 0)) == len(data)


def test_balanced_subset_samples_as_many_of_each_class_and_depends_on_the_seed():
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


def test_real_data_sets_load(real_data: Path):
    cifar = load_image_data(str(real_data / "cifar10"))
    assert (len(cifar["train"]), len(cifar["eval"])) == (20_000, 10_000)
    assert class_names(cifar)[3] == "cat"
    insects = load_image_data(str(real_data / "hymenoptera"))
    assert (len(insects["train"]), len(insects["eval"])) == (244, 153)
    photo = with_pixels(insects["train"], imagenet_transform(True))[0]["pixel_values"]
    assert photo.shape == (3, 224, 224)

import io
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, LargeList, Sequence, Value

from gradaug_hf.data.collator import collate_images
from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.loading import (
    balanced_subset,
    check_one_class,
    class_names,
    load_image_data,
    stream_image_data,
)
from gradaug_hf.data.transforms import cifar_transform
from gradaug_hf.hub.configs import label_names
from tests.helpers.pictures import dataset, picture, png


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, labels: list, label_type: pa.DataType, image_type: pa.DataType | None = None) -> str:
    """Write a parquet file for each of two splits, the second with the labels in reverse, and give their folder."""
    image_type = image_type or pa.binary()
    for split, values in {"train": labels, "test": labels[::-1]}.items():
        images = pa.array([png(picture(10 * index)) for index in range(len(values))], pa.binary()).cast(image_type)
        columns = {"image": images, "label": pa.array(values, label_type)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_strings_of_every_kind_become_classes_in_alphabetical_order(tmp_path, kind):
    if kind == pa.string_view():
        pytest.importorskip("datasets", "4.2", reason="datasets has no string views up to 4.0")
    data = load_image_data(write(tmp_path, ["cat", "ant", "bee", "ant"], kind))
    assert class_names(data) == ["ant", "bee", "cat"]
    assert list(data["train"]["label"]) == [2, 0, 1, 0]
    assert list(data["eval"]["label"]) == [0, 1, 0, 2]
    assert data["train"].features["label"] == ClassLabel(names=["ant", "bee", "cat"])


KINDS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_integers_of_every_kind_become_classes(tmp_path, kind):
    data = load_image_data(write(tmp_path, [2, 0, 1, 0], kind))
    assert class_names(data) == ["0", "1", "2"]
    assert list(data["train"]["label"]) == [2, 0, 1, 0]


def test_booleans_and_categories_become_classes(tmp_path):
    data = load_image_data(write(tmp_path, [True, False, False], pa.bool_()))
    assert class_names(data) == ["False", "True"]
    assert list(data["train"]["label"]) == [1, 0, 0]
    data = load_image_data(write(tmp_path, ["b", "a", "a"], pa.dictionary(pa.int8(), pa.string())))
    assert class_names(data) == ["a", "b"]


@pytest.mark.parametrize("labels", [[5, 900, 0, 5], [200_000_000, 11, 2, 11], [11, 2, 10**17, 2]])
def test_integers_are_ids_whose_distinct_values_are_the_classes(tmp_path, labels: list[int]):
    data = load_image_data(write(tmp_path, labels, pa.int64()))
    ids = sorted(set(labels))
    assert class_names(data) == [str(number) for number in ids]
    assert [ids[label] for label in data["train"]["label"]] == labels
    assert [ids[label] for label in data["eval"]["label"]] == labels[::-1]


@pytest.mark.filterwarnings("ignore:.*have no image in split train")
def test_ids_of_all_splits_are_classes(tmp_path):
    dataset([11, 2], Value("int64")).to_parquet(tmp_path / "train.parquet")
    dataset([10], Value("int64")).to_parquet(tmp_path / "test.parquet")
    data = load_image_data(str(tmp_path))
    assert class_names(data) == ["2", "10", "11"]
    assert (list(data["train"]["label"]), list(data["eval"]["label"])) == ([2, 0], [1])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_encoded_images_of_every_kind_are_read(tmp_path, kind):
    data = load_image_data(write(tmp_path, ["a", "b"], pa.string(), kind))
    reds = [PIL.Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0))[0] for row in data["train"]]
    assert reds == [0, 10]


@pytest.mark.parametrize(
    ("feature", "label", "accepted"),
    [
        (ClassLabel(num_classes=2), -1, "0..1"),
        (ClassLabel(num_classes=2), None, "0..1"),
        (Value("int64"), -1, "0 or above"),
        (Value("int64"), None, "0 or above"),
        (Value("string"), None, "a label in each row"),
    ],
)
def test_row_of_a_label_that_is_none_is_named(tmp_path, feature, label, accepted: str):
    labels = ["a", "b"] if feature == Value("string") else [0, 1]
    dataset(labels, feature).to_parquet(tmp_path / "train.parquet")
    dataset([*labels, label], feature).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=f"row 2 of split test has label {label}; expected {accepted}"):
        load_image_data(str(tmp_path))


@pytest.mark.parametrize("empty", ["train", "test"])
def test_empty_split_is_refused(tmp_path, empty: str):
    for split in ("train", "test"):
        dataset([] if split == empty else [0, 1]).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(OSError, match=f'has a split without images. Instruction "{empty}" corresponds to no data'):
        load_image_data(str(tmp_path))


@pytest.mark.parametrize(
    ("label", "feature", "name"),
    [("ant", Value("string"), "ant"), (3, Value("int64"), "3"), (0, ClassLabel(names=["ant"]), "ant")],
)
def test_one_class_alone_is_refused(tmp_path, label, feature, name: str):
    dataset([label] * 4, feature).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"one class, '{name}', in column 'label'; two or more are needed"):
        load_image_data(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "feature"), [("abc", Value("string")), ([0, 1, 2], ClassLabel(names=["a", "b", "c"]))]
)
def test_class_that_is_only_evaluated_is_warned_of(tmp_path, labels, feature):
    dataset([labels[0], labels[1]], feature).to_parquet(tmp_path / "train.parquet")
    dataset([labels[2], labels[1]], feature).to_parquet(tmp_path / "test.parquet")
    with pytest.warns(UserWarning, match="1 classes of split test have no image in split train.*: c$"):
        load_image_data(str(tmp_path))


# ---- lists of classes ----

STRINGS, INTEGERS = Sequence(Value("string")), Sequence(Value("int64"))
NAMED = ClassLabel(names=["ant", "bee", "cat"])
LISTS = [
    (STRINGS, [["cat", "ant"], [], ["bee"], ["ant"]]),
    (LargeList(Value("int64")), [[70, 5], [], [8], [5]]),
    (Sequence(NAMED), [[2, 0], [], [1], [0]]),
]


@pytest.mark.parametrize(("feature", "labels"), LISTS, ids=lambda value: str(value)[:20])
def test_lists_of_classes_become_multi_hot(tmp_path, feature, labels):
    dataset(labels, feature).to_parquet(tmp_path / "train.parquet")
    dataset(labels[:3], feature).to_parquet(tmp_path / "test.parquet")
    data = load_image_data(str(tmp_path))
    assert class_names(data) == (["5", "8", "70"] if labels[0] == [70, 5] else ["ant", "bee", "cat"])
    pixels = with_pixels(data["train"], cifar_transform(False))
    batch = collate_images([pixels[i] for i in range(4)])
    expected = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.float32)
    assert torch.equal(batch["labels"], expected)
    assert label_names(torch.nn.Identity(), pixels) == class_names(data)
    with pytest.raises(ValueError, match="images have lists of classes"):
        balanced_subset(data["train"], 1)
    with pytest.raises(ValueError, match='needs one class for each image.*problem_type="multi_label_classification"'):
        check_one_class(data)


def test_lists_of_named_classes_are_streamed_as_multi_hot_labels(tmp_path):
    for split in ("train", "test"):
        dataset(LISTS[2][1], Sequence(NAMED)).to_parquet(tmp_path / f"{split}.parquet")
    stream = with_pixels(stream_image_data(str(tmp_path))["train"], cifar_transform(False))
    assert [torch.as_tensor(row["labels"]).tolist() for row in stream] == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.filterwarnings("ignore:.*classes of split")
def test_a_fifth_of_images_with_several_classes_is_held_out(tmp_path):
    labels = [["a", "b"] if row % 2 else ["c"] for row in range(10)]
    dataset(labels, STRINGS).to_parquet(tmp_path / "train.parquet")
    one, other = (load_image_data(str(tmp_path), seed=1) for _ in range(2))
    assert (len(one["train"]), len(one["eval"])) == (8, 2)
    assert list(one["eval"]["row"]) == list(other["eval"]["row"])


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (
            INTEGERS,
            [[0, 1, 0], [1, 0, 1]],
            "row 0 of split train has label 0 twice; .*not zeros and ones",
        ),
        (STRINGS, [["a"], ["b", "c", "b"]], "row 1 of split train has label b twice"),
        (Sequence(NAMED), [[0], None], "row 1 of split train has label None; expected a list, empty for no class"),
        (INTEGERS, [[0], [1, -3]], "row 1 of split train has label -3; expected 0 or above"),
        (
            STRINGS,
            [["a"], [None]],
            "row 1 of split train has label None; expected a label in each row",
        ),
        (Sequence(Value("float32")), [[0.0], [1.0]], "no label column"),
    ],
)
def test_lists_that_do_not_name_classes_are_refused(tmp_path, feature, labels, message):
    dataset(labels, feature).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_image_data(str(tmp_path))

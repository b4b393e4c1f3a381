import csv
import io
import json
import logging
import os
import re
import time
from collections import Counter
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradaug_hf.data.loading import class_names, load_image_data, number_of_images, stream_image_data
from tests.helpers.pictures import picture, png

PNG = png(picture(7))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, *files: str) -> str:
    """Write an image for each name, where `{5}` stands for five numbers, and give the folder."""
    for name in files:
        before, _, rest = name.partition("{")
        count, _, after = rest.partition("}")
        for file in [f"{before}{number}{after}" for number in range(int(count))] if count else [name]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(PNG)
    return str(folder)


def found(name: str, **options: str) -> dict[str, dict[str, int]]:
    """Number of images of each class in each split of a folder."""
    data, names = load_image_data(name, **options), None
    names = class_names(data)
    return {split: dict(Counter(names[label] for label in sorted(rows["label"]))) for split, rows in data.items()}


def files(name: str, split: str) -> set[str]:
    return {os.path.relpath(image["path"], name) for image in load_image_data(name)[split]["image"]}


@pytest.mark.parametrize(
    ("train", "evaluate"),
    [
        ("train", "test"),
        ("training", "val"),
        ("Train", "valid"),
        ("train", "validation"),
        ("train", "dev"),
        ("train", "eval"),
    ],
)
def test_folders_of_the_first_level_are_splits_and_those_of_the_second_classes(tmp_path, train: str, evaluate: str):
    folder = write(
        tmp_path, f"{train}/cat/{{3}}.png", f"{train}/dog/{{2}}.jpg", f"{evaluate}/cat/a.PNG", f"{evaluate}/dog/b.webp"
    )
    assert found(folder) == {"train": {"cat": 3, "dog": 2}, "eval": {"cat": 1, "dog": 1}}
    assert files(folder, "train") == {f"{train}/cat/{n}.png" for n in range(3)} | {
        f"{train}/dog/{n}.jpg" for n in range(2)
    }


def test_validation_is_preferred_to_test(tmp_path):
    folder = write(
        tmp_path, "train/{2}/a.png", "val/{2}/a.png", "test/{2}/{3}.png".replace("{2}", "0"), "test/1/{3}.png"
    )
    assert found(folder)["eval"] == {"0": 1, "1": 1}
    assert found(folder, eval_split="test")["eval"] == {"0": 3, "1": 3}


def test_class_that_is_named_like_a_split_stays_a_class(tmp_path):
    classes = ("bus", "car", "train", "test", "val")
    folder = write(tmp_path, *(f"{split}/{name}/{{4}}.png" for split in ("train", "val") for name in classes))
    assert found(folder) == {split: dict.fromkeys(sorted(classes), 4) for split in ("train", "eval")}
    assert all(name.startswith("val/") for name in files(folder, "eval"))
    assert all(name.startswith("train/") for name in files(folder, "train"))


def test_names_of_files_do_not_matter(tmp_path):
    names = [f"{kind}_{name}/{{10}}.png" for kind in ("a", "b") for name in ("x",)]
    folder = write(tmp_path, *names, "a_x/train_{10}.png", "a_x/test-{10}.png", "b_x/my_validation_{10}.png")
    counts = found(folder)
    assert sum(sum(split.values()) for split in counts.values()) == 50
    assert counts == {"train": {"a_x": 24, "b_x": 16}, "eval": {"a_x": 6, "b_x": 4}}


def test_classes_without_splits_may_be_named_like_them(tmp_path):
    folder = write(tmp_path, "train/{5}.png", "test tube/{5}.png", "dev-board/{5}.png")
    with pytest.warns(UserWarning, match="folders train of .* are read as classes, as dev-board, test tube are"):
        counts = found(folder)
    assert counts["train"] == {"dev-board": 4, "test tube": 4, "train": 4}


@pytest.mark.parametrize("root", ["", "train/"])
def test_images_in_deeper_folders_belong_to_the_class_above_them(tmp_path, root: str):
    folder = write(tmp_path, f"{root}cats/2020/{{5}}.png", f"{root}cats/2021/a/{{5}}.png", f"{root}dogs/{{5}}.png")
    assert found(folder)["train"] == {"cats": 8, "dogs": 4}


def test_folders_and_files_that_are_links_are_followed(tmp_path):
    outside = tmp_path / "outside"
    write(outside, "cats/{5}.png", "dogs/{5}.png", "one.png")
    folder = tmp_path / "pets"
    folder.mkdir()
    for name in ("cats", "dogs"):
        (folder / name).symlink_to(outside / name, target_is_directory=True)
    (outside / "dogs" / "more.png").symlink_to(outside / "one.png")
    counts = found(str(folder))
    assert {name: counts["train"][name] + counts["eval"][name] for name in counts["train"]} == {"cats": 5, "dogs": 6}


def test_link_to_a_folder_above_is_refused(tmp_path):
    folder = write(tmp_path, "cats/{2}.png", "dogs/{2}.png")
    (tmp_path / "cats" / "again").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="again is a link to .*, a folder that it lies in; remove the link"):
        load_image_data(folder)


@pytest.mark.parametrize(
    ("link", "target", "places"),
    [
        ("val/cat/x.png", "train/cat/0.png", "class 'cat' of train and in class 'cat' of validation"),
        ("train/dog/x.png", "train/cat/0.png", "class 'cat' of train and in class 'dog' of train"),
        ("test", "train", "class 'cat' of test and in class 'cat' of train"),
    ],
)
def test_image_in_two_splits_or_classes_is_refused(tmp_path, link: str, target: str, places: str):
    folder = write(tmp_path, "train/cat/{2}.png", "train/dog/{2}.png", "val/cat/a.png", "val/dog/a.png")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"are one image, in {places}; an image must be in one split"):
        load_image_data(folder)


def test_image_linked_twice_within_a_class_counts_twice(tmp_path):
    folder = write(tmp_path, "train/cat/a.png", "train/dog/{2}.png", "test/cat/a.png", "test/dog/a.png")
    (tmp_path / "train" / "cat" / "again.png").symlink_to(tmp_path / "train" / "cat" / "a.png")
    assert found(folder)["train"] == {"cat": 2, "dog": 2}


def test_one_line_counts_what_was_loaded_and_left_out_by_reason(tmp_path, caplog):
    folder = write(tmp_path, "train/cat/{3}.png", "train/dog/{2}.png", "test/cat/a.png", "test/dog/a.png")
    write(tmp_path, "train/cat/.hidden.png", "test/.thumbs/{9}.png", "train/notes.txt", "train/dog/Thumbs.db")
    (tmp_path / "train" / "dog" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with caplog.at_level(logging.INFO, "gradaug_hf"):
        load_image_data(folder)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "gradaug_hf.data.folders"]
    expected = r"images in .*: 2 for test, 5 for train, in 2 classes; left out: (.*)"
    (left_out,) = re.fullmatch(expected, line).groups()
    assert set(left_out.split(", ")) == {"2 (hidden)", "1 (a link to nothing)", "2 (not an image)"}


def test_images_outside_of_classes_are_warned_of(tmp_path):
    folder = write(tmp_path, "train/cat/{3}.png", "train/dog/{3}.png", "train/loose.png", "test/{4}.png", "cover.png")
    with pytest.warns(UserWarning, match=r"6 images in .* are left out, .*cover.png first, since they are not in"):
        counts = found(folder)
    assert counts == {"train": {"cat": 2, "dog": 2}, "eval": {"cat": 1, "dog": 1}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["{5}.png"], "holds 5 images but no folders of classes; expected CLASS/IMAGE, or SPLIT/CLASS/IMAGE"),
        (["train/{5}.png", "test/{5}.png"], "the folders test, train of .* hold images but no folders of classes"),
        (["train/a/0.png", "train/b/0.png", "extra/0.png"], "folders train, named like splits.* beside extra, which"),
        (
            ["train/2020/0.png", "bus/0.png", "car/1/0.png"],
            "folders train, named like splits.* beside bus, car, which",
        ),
        (["val/a/0.png", "dev/a/0.png", "train/b/0.png"], "the folders dev, train, val of .* hold one split twice"),
        (["cats/{5}.png"], "has one class, 'cats'; two or more are needed"),
        (["train/cats/{5}.png", "test/cats/{5}.png"], "has one class, 'cats'; two or more are needed"),
        (["test/a/0.png", "test/b/0.png"], "no split 'train'; splits found: test"),
    ],
)
def test_folders_that_fit_no_rule_are_refused(tmp_path, names: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load_image_data(write(tmp_path, *names))


def test_class_that_only_the_test_split_has_is_warned_of(tmp_path):
    folder = write(tmp_path, "train/a/{3}.png", "train/b/{3}.png", "test/a/0.png", "test/zebra/0.png")
    with pytest.warns(UserWarning, match="have no image in split train, so that no model can learn them: zebra"):
        counts = found(folder)
    assert counts["eval"] == {"a": 1, "zebra": 1}


def test_configuration_of_a_folder_of_images_is_refused(tmp_path):
    folder = write(tmp_path, "a/{3}.png", "b/{3}.png")
    with pytest.raises(ValueError, match="config_name is 'large', but .* is a folder of images, which has none"):
        load_image_data(folder, config_name="large")


def test_pictures_beside_parquet_files_do_not_make_a_folder_of_images(tmp_path):
    columns = {"image": pa.array([PNG, PNG], pa.binary()), "label": pa.array(["a", "b"])}
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    assert found(write(tmp_path, "assets/cover.png"))["train"] == {"a": 1, "b": 1}


def test_stream_of_a_folder_gives_its_images_in_order_and_their_number(tmp_path):
    folder = write(tmp_path, "train/cat/{70}.png", "train/dog/{40}.png", "val/cat/a.png", "val/dog/a.png")
    stream, data = stream_image_data(folder), load_image_data(folder)
    for split in ("train", "eval"):
        assert number_of_images(stream[split]) == len(data[split])
        rows = list(stream[split])
        assert [row["image"] for row in rows] == list(data[split]["image"])
        assert [row["label"] for row in rows] == list(data[split]["label"])
    assert stream["train"].num_shards == 64
    assert str(stream["train"].split) == "train"


def test_loading_opens_no_image_and_is_quick(tmp_path, monkeypatch):
    folder = write(tmp_path, "train/a/{1000}.png", "train/b/{1000}.png", "test/a/0.png", "test/b/0.png")
    monkeypatch.setattr("PIL.Image.open", lambda *args, **kwargs: pytest.fail("an image was opened"))
    start = time.process_time()
    assert len(load_image_data(folder)["train"]) == 2000
    assert time.process_time() - start < 2


# ---- metadata ----


def describe(folder: Path, split: str, rows: list[dict[str, object]], kind: str = "csv") -> None:
    file = folder / split / f"metadata.{kind}"
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(text.getvalue())
    elif kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_do_not_hide_the_classes(tmp_path, kind: str):
    folder = write(tmp_path, "train/cat/{3}.png", "train/dog/{3}.png", "test/cat/a.png", "test/dog/a.png")
    describe(tmp_path, "train", [{"file_name": "cat/0.png", "text": "a cat"}], kind)
    assert found(folder) == {"train": {"cat": 3, "dog": 3}, "eval": {"cat": 1, "dog": 1}}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("below", ["", "images/"])
def test_labels_of_the_metadata_are_the_classes(tmp_path, kind: str, below: str):
    folder = write(tmp_path / "a [1]", f"train/{below}{{4}}.png", f"val/{below}{{2}}.png")
    for split, labels in {"train": "cddc", "val": "dc"}.items():
        rows = [{"file_name": f"{below}{i}.png", "label": label, "size": 1} for i, label in enumerate(labels)]
        describe(tmp_path / "a [1]", split, rows, kind)
    data = load_image_data(folder)
    assert class_names(data) == ["c", "d"]
    assert (list(data["train"]["label"]), list(data["eval"]["label"])) == ([0, 1, 1, 0], [1, 0])
    assert PIL.Image.open(data["eval"]["image"][1]["path"]).size == picture(7).size
    assert data["eval"]["image"][1]["path"].endswith(f"val/{below}1.png")


def test_labels_of_the_metadata_are_of_the_column_that_is_named(tmp_path):
    folder = write(tmp_path, "train/a/{4}.png", "train/b/{4}.png")
    rows = [{"file_name": f"{name}/{i}.png", "colour": ("red", "blue")[i % 2]} for name in "ab" for i in range(4)]
    describe(tmp_path, "train", rows)
    assert class_names(load_image_data(folder)) == ["a", "b"]
    assert class_names(load_image_data(folder, label_column="colour")) == ["blue", "red"]


def test_images_that_the_metadata_does_not_name_are_warned_of(tmp_path):
    folder = write(tmp_path, "train/{6}.png")
    describe(tmp_path, "train", [{"file_name": f"{i}.png", "label": i % 2} for i in range(4)])
    with pytest.warns(UserWarning, match=r"2 images in .* are left out, .*4.png first, since they are not in the m"):
        counts = found(folder)
    assert counts == {"train": {"0": 1, "1": 1}, "eval": {"0": 1, "1": 1}}


@pytest.mark.parametrize(
    ("split", "name", "text", "message"),
    [
        ("train", "gone.png", None, r"train.metadata.csv names 'gone.png', which is no image in"),
        (
            "",
            "train/0.png",
            None,
            r"metadata.csv lies beside folders of splits; write one into",
        ),
        ("train", "0.png", "\xff\xfe", r"train.metadata.csv cannot be read as metadata of images"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(tmp_path, split: str, name: str, text: str | None, message: str):
    folder = write(tmp_path, "train/{4}.png", "test/{4}.png")
    describe(tmp_path, split, [{"file_name": name, "label": "a"}, {"file_name": "1.png", "label": "b"}])
    if text is not None:
        (tmp_path / split / "metadata.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        load_image_data(folder)


def test_labels_of_different_types_are_refused(tmp_path):
    folder = write(tmp_path, "train/{2}.png", "test/{2}.png")
    describe(tmp_path, "train", [{"file_name": f"{i}.png", "label": i} for i in range(2)])
    describe(tmp_path, "test", [{"file_name": f"{i}.png", "label": "ab"[i]} for i in range(2)])
    with pytest.raises(ValueError, match="column 'label' of the metadata in .* is int64, string; use one type"):
        load_image_data(folder)

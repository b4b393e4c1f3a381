"""The numbers of images in the shards of a stream: parquet files and tar archives in the form of webdataset."""

import json
import posixpath
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import datasets
import fsspec
import pyarrow.parquet as pq
from datasets import DatasetBuilder, IterableDataset, IterableDatasetDict, SplitDict, SplitInfo
from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

# File beside tar archives, as those of timm on the Hub have it, that says how many images each of them holds.
INFO = "_info.json"
COUNTED_AT_ONCE = 16


def shard_lengths(split: IterableDataset) -> list[int] | None:
    """Return the number of images in each shard of a stream of `stream_image_data`, or None where it is not known."""
    known = (split.info.splits or {}).get(str(split.split))
    lengths = None if known is None else known.shard_lengths
    return lengths if lengths and len(lengths) == split.num_shards else None


def know_lengths(splits: IterableDatasetDict, lengths: Mapping[str, Sequence[int]]) -> None:
    """Have streams say how many images their shards hold, by the names of the splits."""
    for split in splits.values():
        split.info.splits = SplitDict(
            {
                name: SplitInfo(name, num_examples=sum(shards), shard_lengths=list(shards))
                for name, shards in lengths.items()
            }
        )


def count_images(builder: DatasetBuilder, splits: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of images in the files of some splits of a dataset, by the names of the splits.

    Those of parquet files are in their footers. Those of tar archives are in a file `_info.json` beside them; without
    one, archives on this machine are counted, and splits of others are left out. What was counted is remembered.
    """
    found = {}
    for split in splits:
        files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
        if files and all(file.endswith(".parquet") for file in files):
            found[split] = _remembered(files, _rows_of)
        elif files and all(file.endswith(".tar") for file in files):
            lengths = _stated_lengths(files)
            if lengths is None and all(Path(file).is_file() for file in files):
                lengths = _remembered(files, count_samples)
            if lengths is not None:
                found[split] = lengths
    return found


def _rows_of(file: str) -> int:
    with fsspec.open(file, "rb") as opened:
        return pq.read_metadata(opened).num_rows


def _stated_lengths(files: Sequence[str]) -> list[int] | None:
    """Return what `_info.json` beside the archives says, or None."""
    try:
        with fsspec.open(posixpath.join(posixpath.dirname(files[0]), INFO), "rb") as opened:
            splits = json.load(opened)["splits"].values()
        stated = {
            posixpath.basename(name): length
            for split in splits
            for name, length in zip(split["filenames"], split["shard_lengths"], strict=True)
        }
        return [int(stated[posixpath.basename(file)]) for file in files]
    except (OSError, KeyError, TypeError, ValueError, AttributeError):  # none there, or one of another form
        return None


def _remembered(files: Sequence[str], count: Callable[[str], int]) -> list[int]:
    """Return the number of images in each file, counted unless the same files were before."""
    known = sha256("\n".join(map(_identity, files)).encode()).hexdigest()
    memory = Path(datasets.config.HF_DATASETS_CACHE) / "shard_lengths" / f"{known}.json"
    if not memory.is_file():
        with ThreadPoolExecutor(COUNTED_AT_ONCE) as pool:
            lengths = list(pool.map(count, files))
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(lengths))
    return json.loads(memory.read_text())


def _identity(file: str) -> str:
    """Return what a file is known by: its path, which for the Hub names a commit, size and time."""
    if not Path(file).is_file():
        return file
    status = Path(file).stat()
    return f"{Path(file).resolve()} {status.st_size} {status.st_mtime_ns}"


def count_samples(file: str) -> int:
    """Return the number of samples in a tar archive: runs of files whose names differ by their endings alone."""
    count, last = 0, None
    with tarfile.open(file) as archive:
        for member in archive:
            key = base_plus_ext(member.name)[0] if member.isfile() else None
            count += key is not None and key != last
            last = last if key is None else key
    return count

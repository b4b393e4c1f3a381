"""Training on shards in two processes with two workers each."""

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from torchvision.transforms import v2

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.data.loading import stream_image_data
from gradaug_hf.data.shards import shard_lengths
from gradaug_hf.data.streaming import ShardedStream
from tests.helpers.shards import write_tar
from tests.helpers.small_training import KillAtStep, checkpoints, digest, start_ranks, status_of

IMAGES, SHARDS, EPOCHS = 32, 8, 2
TRANSFORM = v2.Compose([v2.Resize(32), v2.RandomCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(scope="module")
def shards(real_data: Path, tmp_path_factory) -> Path:
    """Photos of ImageNet, one of each of the first classes, in eight archives."""
    folder = tmp_path_factory.mktemp("shards")
    rows = pq.ParquetFile(real_data / "imagenet-samples" / "data.parquet").iter_batches(IMAGES)
    photos = [(row["image"]["bytes"], row["label"]) for row in next(rows).to_pylist()]
    for shard in range(SHARDS):
        write_tar(folder / f"train-{shard:04d}.tar", photos[shard::SHARDS], image="jpg")
    write_tar(folder / "validation-0000.tar", photos[:4], image="jpg")
    names = [f"class {label}" for label in range(1 + max(label for _, label in photos))]
    (folder / "classes.json").write_text(json.dumps(names))
    stream_image_data(str(folder), class_map=str(folder / "classes.json"))  # which counts the images once
    return folder


class Recorded(GradAugTrainer):
    """Keeps the labels of all batches; of each class there is one image."""

    labels: list[int]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.labels.extend(inputs["labels"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(shards: Path, folder: Path, stop_after: int | None = None, **settings) -> None:
    values = {
        "num_train_epochs": EPOCHS,
        "num_subnets": 1,
        "resolutions": [32],
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": False,
        "save_steps": 1,
        "logging_steps": 2,
        "optim": "sgd",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = GradAugConfig(str(folder), **{**values, **settings})
    split = stream_image_data(str(shards), class_map=str(shards / "classes.json"))["train"]
    stream = ShardedStream(
        split,
        shard_lengths(split),
        TRANSFORM,
        batch_size=4,
        seed=3,
        buffer_size=6,
        rank=args.process_index,
        world_size=args.world_size,
    )
    torch.manual_seed(0)
    callbacks = [] if stop_after is None else [KillAtStep(stop_after)]
    model = timm.create_model("test_resnet", num_classes=split.features["label"].num_classes)
    trainer = Recorded(model, args, train_dataset=stream, callbacks=callbacks)
    trainer.labels = []
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    end = {
        "labels": trainer.labels,
        "weights": digest(dict(trainer.model.named_parameters())),
        "steps": trainer.state.global_step,
        "speed": [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry],
    }
    folder.with_name(f"{folder.name}-{args.process_index}.json").write_text(json.dumps(end))


def trained(shards: Path, folder: Path, expected: int = 0, **settings) -> list[dict]:
    pids = start_ranks(lambda: train(shards, folder, **settings))
    assert expected in [status_of(pid) for pid in pids]
    return [] if expected else [json.loads(Path(f"{folder}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_with_two_workers_train_on_every_image_once_an_epoch_and_are_resumed_amid_one(shards, tmp_path):
    whole = trained(shards, tmp_path / "whole")
    steps = IMAGES // 8
    for epoch in range(EPOCHS):
        seen = [label for rank in whole for label in rank["labels"][epoch * steps * 4 : (epoch + 1) * steps * 4]]
        assert sorted(seen) == sorted(set(seen))
        assert len(seen) == IMAGES
    assert whole[0]["steps"] == EPOCHS * steps
    assert len(whole[0]["speed"]) == EPOCHS * steps // 2
    assert all(speed > 0 for speed in whole[0]["speed"])
    trained(shards, tmp_path / "killed", -signal.SIGKILL, stop_after=6)
    assert checkpoints(tmp_path / "killed")[-1] == 5
    resumed = trained(shards, tmp_path / "killed")
    for rank, expected in zip(resumed, whole, strict=True):
        assert rank["labels"] == expected["labels"][5 * 4 :]
        assert rank["weights"] == expected["weights"]

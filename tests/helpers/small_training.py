"""A small training with all that is random in one, in processes of its own that can be killed."""

import hashlib
import json
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.distributed import TCPStore
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.seeded import SeededDataset, SeededStream
from gradaug_hf.data.transforms import cifar_transform

END = "end.json"
STEPS = 9


def images(count: int, seed: int) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(num_classes=3)})
    encoded = datasets.Features({"image": datasets.Image(), "label": features["label"]})
    split = datasets.Dataset.from_dict(
        {"image": [PIL.Image.fromarray(image) for image in pixels], "label": [i % 3 for i in range(count)]}, encoded
    )
    return split.cast(features).add_column("row", list(range(count)))


def network(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 6, 3), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    layers.num_classes = 3
    return layers


def make_trainer(
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
    stream: bool = False,
    train_dataset: Dataset | None = None,
    **settings: object,
) -> GradAugTrainer:
    """Augmentation, dropout, Mixup, batch norm and an adaptive optimiser; logs, checkpoints and epochs out of step."""
    workers = settings.get("dataloader_num_workers", 0)
    values = {
        "max_steps": STEPS,
        "num_subnets": 2,
        "min_width": 0.5,
        "resolutions": [16, 12],
        "mixup_alpha": 0.4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "save_steps": 2,
        "logging_steps": 3,
        "eval_strategy": "epoch",
        "dataloader_persistent_workers": workers > 0,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = GradAugConfig(str(folder), **{**values, **settings})
    train = seeded_images(args.seed, stream) if train_dataset is None else train_dataset
    test = with_pixels(images(4, 2), cifar_transform(False, size=16))
    return GradAugTrainer(network(), args, train_dataset=train, eval_dataset=test, callbacks=callbacks)


def seeded_images(seed: int, stream: bool) -> SeededDataset | SeededStream:
    """20 images with random augmentation, shuffled within each of two files if they are streamed."""
    transform = cifar_transform(True, size=16)
    if not stream:
        return SeededDataset(with_pixels(images(20, 1), transform), seed)
    split = images(20, 1).remove_columns("row").to_iterable_dataset(num_shards=2).shuffle(seed, buffer_size=8)
    return SeededStream(with_pixels(split, transform), seed)


class Jittered(Dataset):
    """20 images, each of them changed by random numbers of Python, NumPy and torch when it is read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(20, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        noise = random.random() + np.random.random() + 0.1 * torch.randn(3, 16, 16)
        return {"pixel_values": self.images[index] + noise, "labels": index % 3}


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def train(folder: Path, callbacks: list[TrainerCallback] | None = None, **settings: object) -> None:
    """Train, from the last checkpoint if there is one, and write down how it ended."""
    trainer = make_trainer(folder, callbacks, **settings)
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    if trainer.is_world_process_zero():
        (folder / END).write_text(json.dumps(end_of(trainer)))


def end_of(trainer: Trainer) -> dict:
    """Digests of weights and optimiser state, and the log without what is measured in seconds."""
    timed = ("runtime", "per_second")
    log = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
    return {
        "weights": digest(trainer.model.state_dict()),
        "optimiser": digest(trainer.optimizer.state_dict()),
        "log": log,
    }


def digest(value: object) -> str:
    """A hash of all tensors and numbers in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return digest([[str(key), digest(item)] for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return hashlib.sha256("".join(map(digest, value)).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


# ---- processes ----

HOST = "127.0.0.1"
_meetings: list[TCPStore] = []  # which processes may still need


def start(function: Callable[[], None]) -> int:
    """Run a function in a process of its own, and give its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        function()
        status = 0
    except SystemExit as error:
        status = error.code
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    """Exit status of a process, once it has ended; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


def start_ranks(function: Callable[[], None], *, count: int = 2) -> list[int]:
    """Run a function in several processes that train together."""
    # A port that is only found free may be another's before the processes meet there, so that this one serves it.
    _meetings.append(TCPStore(HOST, 0, is_master=True, wait_for_workers=False))
    where = {"MASTER_ADDR": HOST, "MASTER_PORT": str(_meetings[-1].port), "WORLD_SIZE": str(count)}
    where |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    # accelerate would choose a number of threads, and those of OpenMP, if there were any before, are lost in a fork.
    where |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(count)}

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **where}
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        function()

    return [start(lambda rank=rank: run(rank)) for rank in range(count)]


class Sends(TrainerCallback):
    """Sends a signal to this process after a step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class KillAtStep(TrainerCallback):
    """The process kills itself after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(TrainerCallback):
    """Says in a file how many steps are done, and waits a moment after each."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "steps"

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.file.write_text(str(state.global_step))
        time.sleep(0.1)


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    """Wait until a training with `Slow` has done a step."""
    until = time.monotonic() + seconds
    while not ((folder / "steps").exists() and int((folder / "steps").read_text() or 0) >= step):
        if time.monotonic() > until:
            raise TimeoutError(f"step {step} was not reached")
        time.sleep(0.01)

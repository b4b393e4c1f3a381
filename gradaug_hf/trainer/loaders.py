"""Data loaders of training sets: images that are seeded, and streams that divide themselves among the processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollator, Trainer
from transformers.trainer_utils import has_length

from gradaug_hf.data.seeded import SeededDataset
from gradaug_hf.data.streaming import SEEN, ShardedStream


def train_loader(trainer: Trainer, default: Callable[[], DataLoader]) -> DataLoader:
    """Return a data loader for a training set that is to be seeded, or divides itself; for others the default."""
    data, args = trainer.train_dataset, trainer.args
    if isinstance(data, ShardedStream):
        return stream_loader(trainer, data)
    if not args.seed_train_data or isinstance(data, (SeededDataset, IterableDataset)) or not has_length(data):
        return default()
    return trainer._get_dataloader(
        SeededDataset(data, args.seed if args.data_seed is None else args.data_seed),
        "Training",
        trainer._train_batch_size,
        lambda _: trainer._get_train_sampler(data),  # which may look into the dataset itself
        is_training=True,
    )


@dataclass
class SkippingCollator:
    """Collate batches; one that a resumed training has seen before is empty."""

    collate: DataCollator

    def __call__(self, examples: list[Any]) -> Any:
        return {} if examples[0] is SEEN else self.collate(examples)


def stream_loader(trainer: Trainer, stream: ShardedStream) -> DataLoader:
    """Return a data loader for the training set of a trainer, which accelerate does not divide once more."""
    args = trainer.args
    loader = DataLoader(
        stream,
        trainer._train_batch_size,
        collate_fn=SkippingCollator(trainer.data_collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=args.accelerator_config.non_blocking,
    )

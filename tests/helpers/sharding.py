"""Two processes on the CPU that train with FSDP2, over which accelerate divides no parameters by itself."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from transformers import TrainerCallback

from gradaug_hf import GradAugConfig, GradAugTrainer
from tests.helpers.small_training import KillAtStep, checkpoints, start_ranks, status_of

# What `accelerate launch` sets from recipes/accelerate/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
SIDE, CLASSES, IMAGES, BATCH, STEPS = 32, 5, 16, 4, 5


def shard_on_cpu() -> None:
    """Have accelerate take the CPU for a device that it divides parameters over, in this process from now on."""
    plain_init = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which takes an accelerator
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size, **settings)


def convnext() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), num_classes=CLASSES)


def resnet() -> nn.Module:
    """In float64, since batch norm over few images makes much of a rounding."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=CLASSES).double()


NETWORKS = {"vit": vit, "convnext": convnext, "resnet": resnet}


def rows(like: nn.Module) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    dtype = next(like.parameters()).dtype
    pixels = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator).to(dtype)
    return [{"pixel_values": image, "labels": index % CLASSES} for index, image in enumerate(pixels)]


def make_trainer(
    folder: Path, model: nn.Module | str, callbacks: Any = None, data_collator: Any = None, **settings: Any
) -> GradAugTrainer:
    """SGD with momentum over accumulated batches, two processes of two images each."""
    model = NETWORKS[model]() if isinstance(model, str) else model
    values = {
        "max_steps": STEPS,
        "num_subnets": 2,
        "min_width": 0.5,
        "min_survival": 0.4,
        "resolutions": [SIDE],
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = GradAugConfig(str(folder), **{**values, **settings})
    return GradAugTrainer(model, args, data_collator, train_dataset=rows(model), callbacks=callbacks)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be divided; on all processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class KeepGradients(TrainerCallback):
    """Keeps the gradients that each step of the optimiser is made with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        named = ((name.replace("._checkpoint_wrapped_module", ""), p) for name, p in model.named_parameters())
        self.steps.append({name: whole(parameter.grad) for name, parameter in named})


def count_reductions() -> list[int]:
    """A list that grows with each group of parameters whose gradients cross the processes under FSDP2."""
    reductions, plain_reduce = [], _fsdp_param_group.foreach_reduce

    def reduce(params: list, *args: Any, **kwargs: Any) -> Any:
        reductions.append(len(params))
        return plain_reduce(params, *args, **kwargs)

    _fsdp_param_group.foreach_reduce = reduce
    return reductions


def train(folder: Path, model: nn.Module | str, **settings: Any) -> None:
    """Train, and have the first process write gradients and weights to FOLDER.pt."""
    keeper, reductions = KeepGradients(), count_reductions()
    trainer = make_trainer(folder, model, callbacks=[keeper], **settings)
    trainer.train()
    weights = {name: whole(p) for name, p in zip(keeper.steps[0], trainer.model.parameters(), strict=True)}
    if trainer.is_world_process_zero():
        kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules()}
        blocks = [name for name, kind in kinds.items() if kind.startswith("FSDP")]
        kept = {"gradients": keeper.steps, "weights": weights, "sharded": blocks, "reductions": len(reductions)}
        kept["recomputed"] = [name for name, kind in kinds.items() if "CheckpointWrapper" in kind]
        torch.save(kept, folder.with_suffix(".pt"))


def in_two_processes(function: Callable[[], None], fsdp: bool = True, count: int = 2, **environ: str) -> list[int]:
    """Run a function in processes that train together, with FSDP2 or without, and give their exit statuses."""

    def run() -> None:
        if fsdp:
            os.environ.update(FSDP2, **environ)
            shard_on_cpu()
        function()

    return [status_of(pid) for pid in start_ranks(run, count=count)]


def train_from_last(folder: Path, stop_after: int | None = None, **settings: Any) -> None:
    """Train with checkpoints, from the last one if there is one, and write down how it ended.

    Args:
        folder: of the training.
        stop_after: step after which the processes kill themselves; None: none.
        settings: of the training.
    """
    callbacks = [] if stop_after is None else [KillAtStep(stop_after)]
    trainer = make_trainer(folder, "vit", callbacks, **{"save_strategy": "steps", "save_steps": 2, **settings})
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    state = [whole(tensor) for tensor in trainer.model.state_dict().values()]
    for values in trainer.optimizer.state.values():
        state += [whole(value) for value in values.values() if isinstance(value, Tensor)]
    if trainer.is_world_process_zero():
        torch.save(state, folder / "end.pt")


def save_and_push(folder: Path, model: nn.Module, subnet_mode: str = "width+depth") -> None:
    """Train and push, and keep the files that would be uploaded in FOLDER/pushed."""
    HfApi.upload_folder = lambda self, folder_path, **_: shutil.copytree(folder_path, folder / "pushed")
    GradAugTrainer.init_hf_repo = lambda self, *_, **__: setattr(self, "hub_model_id", "me/model")
    settings = {"save_strategy": "steps", "save_steps": STEPS, "subnet_mode": subnet_mode}
    trainer = make_trainer(folder / "out", model, **settings)
    trainer.train()
    trainer.push_to_hub()
    images = torch.stack([row["pixel_values"] for row in rows(model)])
    with torch.no_grad():
        output = trainer.model.eval()(images)
    if trainer.is_world_process_zero():
        torch.save(getattr(output, "logits", output), folder / "logits.pt")

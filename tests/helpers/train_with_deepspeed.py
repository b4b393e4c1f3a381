"""Trains a small network for a few steps in each process, with DeepSpeed if a stage of ZeRO is given.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/helpers/train_with_deepspeed.py FOLDER BACKWARD
    [STAGE]

BACKWARD is joint or sequential.
"""

import sys

import timm
import torch

from gradaug_hf import GradAugConfig, GradAugTrainer


def main(folder: str, subnet_backward: str, *stage: str) -> None:
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 64, 64), "labels": label % 7} for label in range(16)]
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(*stage)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    args = GradAugConfig(
        folder,
        num_subnets=2,
        resolutions=[64, 48],
        subnet_backward=subnet_backward,
        max_steps=4,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=0.1,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=deepspeed if stage else None,
    )
    trainer = GradAugTrainer(timm.create_model("test_resnet", num_classes=7), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])

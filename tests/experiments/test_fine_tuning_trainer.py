import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from gradaug_hf import GradAugConfig
from gradaug_hf.experiments.backbone import freeze_backbone
from gradaug_hf.experiments.fine_tuning_trainer import AVERAGE, FineTuningTrainer, parameter_groups
from gradaug_hf.hub.networks import head_parameters
from gradaug_hf.trainer.checkpoints import ResumeError

STEPS = 4


class Images(torch.utils.data.Dataset):
    """Ten random images of three classes, four of them of the first."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 3}


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    layers.num_classes = 3
    return layers


def trainer_of(folder: Path, model: nn.Module | None = None, settings: dict | None = None, **own) -> FineTuningTrainer:
    config = GradAugConfig(
        str(folder),
        **{
            "num_subnets": 0,
            "max_steps": STEPS,
            "per_device_train_batch_size": 5,
            "learning_rate": 0.1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        | (settings or {}),
    )
    return FineTuningTrainer(model or small_model(), config, train_dataset=Images(), eval_dataset=Images(), **own)


# ---- layers ----


def test_learning_rate_falls_from_layer_to_layer_and_norms_and_biases_do_not_decay(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    optimizer = trainer_of(tmp_path, model, {"weight_decay": 0.05}, layer_decay=0.5).create_optimizer()
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        found |= {names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]}
    assert found.keys() == set(names.values())
    depth = len(model.blocks)
    assert found["head.weight"] == (0.1, 0.05) and found["head.bias"] == (0.1, 0.0)
    for block in range(depth):  # the last block is one layer below the norm, or with it
        rate, decay = found[f"blocks.{block}.attn.qkv.weight"]
        assert decay == 0.05
        assert rate == pytest.approx(found["blocks.0.attn.qkv.weight"][0] * 2**block)
        assert found[f"blocks.{block}.norm1.weight"][1] == 0.0
    assert found["pos_embed"][1] == found["cls_token"][1] == 0.0
    assert found["patch_embed.proj.weight"][0] == pytest.approx(found["blocks.0.attn.qkv.weight"][0] / 2)
    assert optimizer.param_groups[0]["lr"] == 0.1  # which the log shows


def test_layers_of_a_transformers_model_end_with_its_classifier():
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=1,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )
    groups = parameter_groups(model, 0.05, 0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert set(head_parameters(model)) == {"classifier.weight", "classifier.bias"}
    assert scales[id(model.classifier.weight)] == 1
    assert min(scales.values()) == scales[id(model.vit.embeddings.cls_token)] < 0.5
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.vit.embeddings.position_embeddings)] == 0
    assert decays[id(model.vit.embeddings.patch_embeddings.projection.weight)] == 0.05


def test_an_optimiser_that_chooses_its_parameters_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, settings={"optim": "lomo"})
    trainer.get_optimizer_cls_and_kwargs = lambda *given: (torch.optim.SGD, {"model": None})
    with pytest.raises(ValueError, match="optim is 'lomo', which takes no groups of parameters; use 'adamw_torch'"):
        trainer.create_optimizer()


# ---- a frozen backbone ----


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_frozen_backbone_keeps_weights_and_statistics(tmp_path, name: str):
    model = timm.create_model(name, num_classes=3, **({"img_size": 16} if name == "test_vit" else {}))
    freeze_backbone(model)
    before = copy.deepcopy(model.state_dict())
    trainer_of(tmp_path, model).train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == set(head_parameters(model)) and len(changed) == 2


@pytest.mark.parametrize("num_subnets", [0, 2])
def test_frozen_statistics_stay_and_normalise_the_images(tmp_path, num_subnets: int):
    model = small_model()
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(2.0)
    images = torch.stack([Images()[index]["pixel_values"] for index in range(10)])
    expected = nn.functional.cross_entropy(
        copy.deepcopy(model).double().eval()(images.double()), torch.arange(10) % 3
    ).item()
    before = copy.deepcopy(model.state_dict())
    settings = {"num_subnets": num_subnets, "resolutions": [16, 12], "max_steps": 1, "logging_steps": 1}
    trainer = trainer_of(tmp_path, model, settings | {"per_device_train_batch_size": 10}, freeze_statistics=True)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged.get("loss_full", logged["loss"]) == pytest.approx(expected, rel=1e-5)
    kept = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert kept == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


# ---- weights of classes ----


@pytest.mark.parametrize("num_subnets", [0, 2])
def test_only_the_training_loss_has_the_weights(tmp_path, num_subnets: int):
    settings = {"num_subnets": num_subnets, "resolutions": [16], "max_steps": 1, "logging_steps": 1}
    settings |= {"learning_rate": 0.0, "per_device_train_batch_size": 10}

    def losses(weights: list[float] | None) -> tuple[float, float, float | None]:
        own = {} if weights is None else {"class_weights": torch.tensor(weights)}
        trainer = trainer_of(tmp_path, settings=settings, **own)
        trainer.train()
        logged = trainer.state.log_history[0]
        return logged.get("loss_full", logged["loss"]), trainer.evaluate()["eval_loss"], logged.get("loss_subnets")

    plain, evaluated, of_subnets = losses(None)
    parts = [losses([float(label == k) for k in range(3)])[0] for label in range(3)]
    weighted, evaluated_after, of_subnets_after = losses([1.0, 2.0, 3.0])
    assert sum(parts) == pytest.approx(plain, rel=1e-4)
    assert weighted == pytest.approx(sum(k * part for k, part in enumerate(parts, start=1)), rel=1e-4)
    assert evaluated_after == pytest.approx(evaluated, rel=1e-4)
    assert of_subnets_after == of_subnets  # which learn the prediction, whatever the classes weigh


# ---- averaged weights ----


def averages_by_hand(folder: Path, decay: float, settings: dict | None = None) -> dict[str, torch.Tensor]:
    """The average of the weights after each step, by timm's formula, in float64."""
    trainer = trainer_of(folder, settings=settings)
    steps = []
    step = trainer.training_step
    trainer.training_step = lambda *given: steps.append(copy.deepcopy(trainer.model.state_dict())) or step(*given)
    trainer.train()
    steps = [*steps[1:], trainer.model.state_dict()]
    average = {key: tensor.double() for key, tensor in steps[0].items()}
    for number, weights in enumerate(steps[1:], start=1):
        share = min(decay, 1 - (1 + number) ** (-2 / 3))
        average = {key: share * average[key] + (1 - share) * tensor.double() for key, tensor in weights.items()}
    return average


def assert_averaged(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_subnets", [0, 2])
def test_averaged_weights_are_evaluated_and_saved_and_the_trained_ones_go_on(tmp_path, num_subnets: int):
    settings = {"num_subnets": num_subnets, "min_width": 0.5, "resolutions": [16, 12]}
    expected = averages_by_hand(tmp_path / "plain", 0.5, settings)
    trainer = trainer_of(tmp_path / "own", settings=settings, ema_decay=0.5)
    trainer.train()
    trained = copy.deepcopy(trainer.model.state_dict())
    trainer.save_model()
    assert_averaged(load_file(tmp_path / "own" / "model.safetensors"), expected)
    averaged = small_model()
    averaged.load_state_dict({key: tensor.to(averaged.state_dict()[key].dtype) for key, tensor in expected.items()})
    reference = trainer_of(tmp_path / "reference", averaged).predict(Images())
    found = trainer.predict(Images())
    np.testing.assert_allclose(found.predictions, reference.predictions, rtol=1e-4, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.metrics["test_loss"], rel=1e-4)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in trainer.model.state_dict().items())


def test_a_resumed_training_averages_on(tmp_path):
    whole = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path / "whole", settings=whole, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    resumed = trainer_of(tmp_path / "resumed", settings=whole, ema_decay=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed.save_model()
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "resumed" / "model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_a_checkpoint_without_averaged_weights_cannot_be_averaged_on(tmp_path):
    trainer_of(tmp_path, settings={"save_strategy": "steps", "save_steps": 2}).train()
    with pytest.raises(ResumeError, match=f"checkpoint-2 has no {AVERAGE}, which a training with ema_decay goes on"):
        trainer_of(tmp_path, ema_decay=0.5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

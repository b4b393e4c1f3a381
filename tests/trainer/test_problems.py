"""Several classes in one image, a user's loss and a teacher in the trainer."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from gradaug_hf import GradAugConfig, GradAugTrainer, at_width, mean_average_precision
from gradaug_hf.trainer.card_facts import model_facts

MULTI = "multi_label_classification"
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
STEP = {"max_steps": 1, "per_device_train_batch_size": 6, "optim": "sgd", "lr_scheduler_type": "constant"}
HOT = (torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.5).float()
HOT[0] = torch.tensor([1.0, 1.0, 0.0, 0.0])


def resnet(problem_type: str | None = None) -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4)
    config.problem_type = problem_type
    return ResNetForImageClassification(config)


def plain_timm() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4)


def wrapper() -> nn.Module:
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=4))


def rows(labels: Tensor) -> list[dict[str, Any]]:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def config(folder: Path, **settings: Any) -> GradAugConfig:
    return GradAugConfig(str(folder), **{"resolutions": [32, 24], **STEP, **QUIET, **settings})


def pixels(data: list[dict[str, Any]]) -> Tensor:
    return torch.stack([row["pixel_values"] for row in data])


# ---- several classes in one image ----


@pytest.mark.parametrize(
    "make, labels", [(resnet, HOT.long()), (plain_timm, HOT), (wrapper, HOT.bool())], ids=["int", "float", "bool"]
)
def test_several_classes_in_an_image_are_trained_evaluated_and_saved(tmp_path, make, labels):
    data = rows(labels)
    args = config(tmp_path, problem_type=MULTI)
    trainer = GradAugTrainer(
        make(), args, train_dataset=data, eval_dataset=data, compute_metrics=mean_average_precision
    )
    expected = nn.functional.binary_cross_entropy_with_logits(_logits(trainer.model.train(), data), HOT).item()
    trainer.model.load_state_dict(make().state_dict())
    trainer.train()
    assert trainer.state.log_history[0]["loss_full"] == pytest.approx(expected, rel=1e-5)
    assert trainer.state.log_history[0]["loss_subnets"] > 0
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = _logits(trainer.model.eval(), data)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, HOT).item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert 0 < metrics["eval_map"] <= 1
    trainer.save_model()
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.problem_type == MULTI


def _logits(model: nn.Module, data: list[dict[str, Any]]) -> Tensor:
    output = model(pixels(data))
    return getattr(output, "logits", output)


@pytest.mark.parametrize("stated", [True, False])
def test_without_sub_networks_the_multi_label_loss_is_that_of_transformers(tmp_path, stated):
    data, settings = rows(HOT), {**STEP, **QUIET, "max_steps": 3}
    plain = Trainer(resnet(MULTI), TrainingArguments(str(tmp_path / "plain"), **settings), train_dataset=data)
    plain.train()
    model, args = (resnet(MULTI), {}) if stated else (resnet(), {"problem_type": MULTI})
    args = GradAugConfig(str(tmp_path / "own"), num_subnets=0, remove_unused_columns=True, **settings, **args)
    own = GradAugTrainer(model, args, train_dataset=data)
    own.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, own)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    expected = plain.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.model.state_dict().items())


def test_without_sub_networks_a_timm_model_has_the_same_multi_label_loss(tmp_path):
    data = rows(HOT)
    trainer = GradAugTrainer(plain_timm(), config(tmp_path, num_subnets=0, problem_type=MULTI), train_dataset=data)
    trainer.train()
    expected = nn.functional.binary_cross_entropy_with_logits(plain_timm().train()(pixels(data)), HOT)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_mixed_multi_hot_labels_are_trained(tmp_path):
    GradAugTrainer(
        plain_timm(), config(tmp_path, mixup_alpha=0.4, problem_type=MULTI), train_dataset=rows(HOT)
    ).train()


def test_another_problem_or_labels_that_do_not_fit_it_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="problem_type is 'single_label_classification', but config.problem_type of"):
        GradAugTrainer(resnet(MULTI), config(tmp_path, problem_type="single_label_classification"))
    with pytest.raises(ValueError, match="config.problem_type is 'regression'; GradAug needs one of"):
        GradAugTrainer(resnet("regression"), config(tmp_path), train_dataset=rows(HOT))
    with pytest.raises(ValueError, match="multi_label_classification expects multi-hot ones"):
        GradAugTrainer(resnet(MULTI), config(tmp_path), train_dataset=rows(torch.arange(6) % 4))
    with pytest.raises(ValueError, match="label smoothing is 0.1, but only the cross-entropy"):
        GradAugTrainer(resnet(MULTI), config(tmp_path, label_smoothing_factor=0.1), train_dataset=rows(HOT))


# ---- a user's loss ----


def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none") * (1 + labels)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def of_items(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    return (nn.functional.cross_entropy(logits, labels, reduction="none") * (1 + labels)).sum() / num_items_in_batch


@pytest.mark.parametrize(
    "make, loss, accumulated", [(resnet, weighted, 2), (plain_timm, of_items, 2), (resnet, of_items, 1)]
)
def test_a_users_loss_is_that_of_the_full_network(tmp_path, make, loss, accumulated):
    data = rows(torch.arange(6) % 4)
    batch = {"per_device_train_batch_size": 6 // accumulated, "gradient_accumulation_steps": accumulated}
    args = config(tmp_path, kl_weight=0.0, learning_rate=0.1, max_grad_norm=0, weight_decay=0.0, **batch)
    model, reference = _without_norm(make()), _without_norm(make())
    trainer = GradAugTrainer(model, args, train_dataset=data, eval_dataset=data, compute_loss_func=loss)
    trainer.train()
    expected = weighted(reference(pixels(data)), torch.arange(6) % 4)
    expected.backward()
    assert trainer.state.log_history[0]["loss_full"] == pytest.approx(expected.item(), rel=1e-5)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter, other - 0.1 * other.grad, rtol=0, atol=1e-6)
    with torch.no_grad():
        after = weighted(model(pixels(data)), torch.arange(6) % 4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after.item(), rel=1e-5)


def _without_norm(model: nn.Module) -> nn.Module:
    """Return a model whose batches can be divided."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                kept = nn.Sequential(*[getattr(child, part) for part in ("drop", "act") if hasattr(child, part)])
                setattr(module, name, kept)
    return model


def test_a_users_loss_and_label_smoothing_are_refused_together(tmp_path):
    args = config(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label smoothing is 0.1"):
        GradAugTrainer(resnet(), args, train_dataset=rows(torch.arange(6) % 4), compute_loss_func=weighted)


# ---- a teacher ----


def test_a_teacher_is_neither_trained_nor_saved(tmp_path):
    data, teacher = rows(torch.arange(6) % 4), nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    start = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    args = config(tmp_path, learning_rate=0.1, save_strategy="steps", save_steps=1)
    trainer = GradAugTrainer(resnet(), args, train_dataset=data, teacher=teacher)
    trainer.train()
    assert all(torch.equal(tensor, start[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == resnet().state_dict().keys()
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained.isdisjoint(map(id, teacher.parameters()))
    assert model_facts(trainer).subnets["they learned"] == "the predictions of another model, a Sequential"
    assert trainer.settings()["teacher"] == "Sequential"


def test_sub_networks_of_a_trainer_learn_the_prediction_of_its_teacher(tmp_path):
    data, teacher, model = rows(torch.arange(6) % 4), nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), resnet()
    trainer = GradAugTrainer(model, config(tmp_path, resolutions=[24]), train_dataset=data, teacher=teacher)
    small = nn.functional.interpolate(pixels(data), size=(24, 24), mode="bilinear", align_corners=True)
    target, expected = teacher(pixels(data)).softmax(dim=1), 0.0
    for subnet in trainer.subnet_sampler.sample(0):
        with at_width(model.train(), subnet.width):
            expected += (target * (target.log() - model(small).logits.log_softmax(dim=1))).sum().item() / 6
    trainer.train()
    assert trainer.state.log_history[0]["loss_subnets"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_without_pupils_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher is given, but with num_subnets=0 there are no sub-networks"):
        GradAugTrainer(resnet(), config(tmp_path, num_subnets=0), teacher=plain_timm())
    model = resnet()
    with pytest.raises(ValueError, match="shares layers with the model that is trained"):
        GradAugTrainer(model, config(tmp_path), teacher=model)

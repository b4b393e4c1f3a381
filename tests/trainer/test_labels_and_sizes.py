"""Labels, logits and image sizes that a trainer meets, from the first step to the folder that it saves."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.data.transforms import cifar_transform
from gradaug_hf.hub.preprocessing import image_processor_of

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(config)


def plain_timm() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4)


def trainer_of(folder: Any, model: nn.Module, labels: Callable[[int], Any], **options: Any) -> GradAugTrainer:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": labels(i)} for i, image in enumerate(images)]
    args = GradAugConfig(str(folder), resolutions=[32, 24], max_steps=1, per_device_train_batch_size=4, **QUIET)
    return GradAugTrainer(model, args, train_dataset=data, eval_dataset=data, **options)


@pytest.mark.parametrize("make", [resnet, plain_timm])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_class_indices_of_any_integers_are_trained_and_evaluated_alike(tmp_path, make, dtype):
    expected = trainer_of(tmp_path, make(), lambda i: i % 4)
    found = trainer_of(tmp_path, make(), lambda i: torch.tensor(i % 4, dtype=dtype))
    for trainer in (expected, found):
        trainer.train()
    assert found.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


@pytest.mark.parametrize("make", [resnet, plain_timm])
def test_multi_hot_labels_are_refused_before_training_and_in_evaluation(tmp_path, make):
    with pytest.raises(ValueError, match=r"sums to 2 .*\(multi-label\)"):
        trainer_of(tmp_path, make(), lambda i: torch.tensor([1.0, 1.0, 0.0, 0.0]))
    trainer = trainer_of(tmp_path, make(), lambda i: torch.eye(4)[i % 4] + (i == 7) * torch.eye(4)[0])
    with pytest.raises(ValueError, match=r"soft label 7 .*\(multi-label\)"):
        trainer.evaluate()


def test_probabilities_that_a_plain_training_takes_for_several_classes_are_warned_of(tmp_path):
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor([0.5, 0.5, 0.0, 0.0])} for _ in range(4)]
    args = GradAugConfig(str(tmp_path), num_subnets=0, max_steps=1, **QUIET)
    with pytest.warns(UserWarning, match='labels of a batch are probabilities.*problem_type="single_label_class'):
        GradAugTrainer(resnet(), args, train_dataset=data).train()
    model = resnet()
    model.config.problem_type = "single_label_classification"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = GradAugTrainer(model, args, train_dataset=data)
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.tensor(4.0).log().item(), abs=0.5)


@pytest.mark.parametrize("num_subnets", [0, 3])
def test_a_second_head_is_refused_whether_sub_networks_are_trained_or_not(tmp_path, num_subnets):
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, depth=1, img_size=32)
    model.set_distilled_training(True)
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i} for i in range(4)]
    args = GradAugConfig(str(tmp_path), resolutions=[32], num_subnets=num_subnets, max_steps=1, **QUIET)
    with pytest.raises(ValueError, match=r"A second head would not be trained.*set_distilled_training\(False\)"):
        GradAugTrainer(model, args, train_dataset=images).train()


def test_masked_classes_train_with_finite_gradients(tmp_path):
    class Masked(nn.Module):
        num_classes = 4

        def __init__(self) -> None:
            super().__init__()
            self.network = plain_timm()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).index_fill(1, torch.tensor([3], device=x.device), -torch.inf)

    trainer = trainer_of(tmp_path, Masked(), lambda i: i % 3)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert 0 < trainer.state.log_history[0]["loss_subnets"] < 10


def test_images_of_another_size_than_the_saved_folder_says_are_warned_of(tmp_path):
    trainer = trainer_of(tmp_path, plain_timm(), lambda i: i % 4)
    trainer.evaluate()
    with pytest.warns(UserWarning, match="images of 32 x 32 pixels were evaluated, but .* will have 160 x 160"):
        trainer.save_model()
    model = plain_timm()
    processor = image_processor_of(cifar_transform(False), model)
    trainer = trainer_of(tmp_path, model, lambda i: i % 4, processing_class=processor)
    trainer.evaluate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_model()

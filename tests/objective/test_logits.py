from collections import namedtuple

import pytest
import timm
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from gradaug_hf.objective.logits import logits_of, num_classes_of
from gradaug_hf.objective.objective import GradAug

TwoHeads = namedtuple("TwoHeads", ["logits", "aux_logits"])  # as of torchvision's Inception


@pytest.mark.parametrize("kind", ["tensor", "model output", "tuple"])
def test_logits_are_found_in_what_networks_return(kind):
    logits = torch.randn(2, 3)
    output = {"tensor": logits, "model output": ImageClassifierOutput(logits=logits), "tuple": (logits, None)}[kind]
    assert logits_of(output, 2) is logits


@pytest.mark.parametrize(
    "output, message",
    [
        ({"a": 1}, "returned a dict without logits"),
        (torch.zeros(2, 3, 4), r"logits of shape \(2, 3, 4\); expected \(2, classes\)"),
        (torch.zeros(3, 4), r"logits of shape \(3, 4\); expected \(2, classes\)"),
    ],
)
def test_what_holds_no_logits_is_named(output, message):
    with pytest.raises(ValueError, match=message):
        logits_of(output, 2)


@pytest.mark.parametrize("features", [torch.randn(2, 8), torch.randn(2, 8, 4, 4)])
def test_logits_are_told_from_features_by_the_number_of_classes(features):
    logits = torch.randn(2, 3)
    assert logits_of((features, logits), 2, 3) is logits
    assert logits_of((logits, features), 2, 3) is logits


@pytest.mark.parametrize(
    ("output", "num_classes"),
    [
        ((torch.randn(2, 3), torch.randn(2, 3)), 3),
        ([torch.randn(2, 3), torch.randn(2, 3)], None),
        (TwoHeads(torch.randn(2, 3), torch.randn(2, 3)), 3),
        ((torch.randn(2, 8), torch.randn(2, 3)), None),  # features, perhaps
        ((torch.randn(2, 8), torch.randn(2, 4)), 3),
    ],
)
def test_a_second_head_is_refused_and_never_ignored(output, num_classes):
    with pytest.raises(ValueError, match="the model returned 2 outputs.*A second head would not be trained"):
        logits_of(output, 2, num_classes)
    assert logits_of(TwoHeads(torch.ones(2, 3), None), 2, 3).sum() == 6


def test_another_number_of_logits_than_of_classes_is_refused():
    message = r"logits of shape \(2, 8\), but it states 3 classes.*reset_classifier\(3\)"
    for output in (torch.randn(2, 8), ImageClassifierOutput(logits=torch.randn(2, 8))):
        with pytest.raises(ValueError, match=message):
            logits_of(output, 2, 3)


def test_a_model_s_number_of_classes_is_what_it_states():
    assert num_classes_of(timm.create_model("test_resnet", num_classes=7)) == 7
    assert num_classes_of(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="num_classes of this ResNet is 0, so that it returns features"):
        num_classes_of(timm.create_model("test_resnet", num_classes=0))


def test_the_objective_trains_neither_features_nor_one_head_of_two():
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="num_classes of this ResNet is 0"):
        GradAug(timm.create_model("test_resnet", num_classes=0))
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, depth=1, img_size=32)
    gradaug = GradAug(model.train(), resolutions=[32])
    gradaug.backward(images, labels)
    assert model.head.weight.grad.abs().sum() > 0
    assert model.head_dist.weight.grad.abs().sum() > 0
    model.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"A second head would not be trained.*set_distilled_training\(False\)"):
        gradaug.backward(images, labels)
    model = timm.create_model("test_resnet", num_classes=5)
    model.fc = nn.Linear(model.num_features, 2)
    with pytest.raises(ValueError, match=r"\(2, 2\), but it states 5 classes"):
        GradAug(model.train(), resolutions=[32]).backward(images, labels)

"""Several classes in one image, other losses of the full network, and another model as the teacher."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from gradaug_hf import GradAug, Subnet
from gradaug_hf.objective.losses import binary_cross_entropy, binary_divergence, check_multi_hot
from tests.helpers.residual_network import (
    CLASSES,
    make_network,
    narrow_forward,
    objective_by_hand,
    resize_by_hand,
)

MULTI = "multi_label_classification"
SETTINGS = {"num_subnets": 3, "min_width": 0.5, "resolutions": [16, 12, 9], "seed": 3}
STEP = 4


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hot() -> Tensor:
    return (torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(2)) < 0.4).double()


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 4, 2, 2, 1, 3])


def copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in network.named_parameters()}


def assert_gradients(network: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=tolerance)


def sampled(gradaug: GradAug) -> list[tuple[float, int]]:
    return [(subnet.width, subnet.resolution) for subnet in gradaug.sampler.sample(STEP)]


# ---- the losses ----


def test_binary_losses_are_those_of_bernoulli_distributions():
    logits, target = (
        torch.tensor([[0.5, -1.0], [2.0, 0.0]]).double(),
        torch.tensor([[1.0, 0.25], [-3.0, 0.5]]).double(),
    )
    labels = torch.tensor([[1, 0], [1, 1]])
    loss, divergence = 0.0, 0.0
    for row in range(2):
        for column in range(2):
            q, p = (1 / (1 + math.exp(-each[row, column].item())) for each in (logits, target))
            loss -= math.log(q) if labels[row, column] else math.log(1 - q)
            divergence += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert binary_cross_entropy(logits, labels).item() == pytest.approx(loss / 4, abs=1e-14)
    assert binary_divergence(logits, target).item() == pytest.approx(divergence / 2, abs=1e-14)
    assert binary_divergence(target, target).item() == pytest.approx(0, abs=1e-15)
    assert binary_divergence(logits.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_extreme_and_masked_logits_have_finite_divergences_and_gradients():
    target = torch.tensor([[-torch.inf, 200.0, -200.0, 0.0]])
    logits = torch.tensor([[-torch.inf, 150.0, -150.0, 100.0]], requires_grad=True)
    loss = binary_divergence(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 100 - math.log(2), rel=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0, 0.0, 0.5]]))


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 1]), r"shape \(2,\) and dtype torch.int64; multi_label_classification expects .*\(N, 3\)"),
        (torch.zeros(2, 4), r"shape \(2, 4\)"),
        (torch.tensor([[0, 1, 1], [0, 2, 1]]), "label 1 of a batch has 2 for class 1"),
        (torch.tensor([[0, 1, -1.0]]), "label 0 of a batch has -1 for class 2"),
        (torch.tensor([[torch.nan, 0, 0]]), "label 0 of a batch has nan for class 0"),
    ],
)
def test_labels_that_are_not_multi_hot_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_multi_hot(labels, 3)


# ---- the objective ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_multi_label_gradients_are_those_of_the_formula_in_float64(images, hot, dtype):
    network = make_network()
    p = copies(network)
    gradaug = GradAug(network, problem_type=MULTI, kl_weight=0.7, **SETTINGS)
    logits = narrow_forward(p, images, 1.0)
    q = 1 / (1 + (-logits).exp())
    expected = -(hot * q.log() + (1 - hot) * (1 - q).log()).sum() / hot.numel()
    t = q.detach()
    for width, side in sampled(gradaug):
        q = 1 / (1 + (-narrow_forward(p, resize_by_hand(images, side), width)).exp())
        divergence = t * (t / q).log() + (1 - t) * ((1 - t) / (1 - q)).log()
        expected = expected + 0.7 * divergence.sum() / len(images)
    expected.backward()
    loss = gradaug.backward(images, hot.to(dtype), step=STEP)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert_gradients(network, {name: parameter.grad for name, parameter in p.items()})


def resnet(problem_type: str | None) -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4)
    config.problem_type = problem_type
    return ResNetForImageClassification(config)


def test_the_config_of_a_transformers_model_says_the_problem():
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    pixels = torch.randn(2, 3, 32, 32)
    model = resnet(MULTI)
    expected = model(pixels, labels=labels).loss.item()
    assert GradAug(model, num_subnets=0).loss(pixels, labels).item() == expected
    stated = resnet(None)
    GradAug(stated, problem_type=MULTI)
    assert stated.config.problem_type == MULTI
    with pytest.raises(ValueError, match="problem_type is 'single_label_classification', but config.problem_type of"):
        GradAug(model, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="config.problem_type is 'regression'; GradAug needs one of"):
        GradAug(resnet("regression"))
    with pytest.raises(ValueError, match="problem_type is 'several'; it must be None or one of"):
        GradAug(make_network(), problem_type="several")


def test_multi_hot_labels_without_the_problem_type_are_refused(images, hot):
    hot[1] = 1
    with pytest.raises(ValueError, match=r"sums to .*\(multi-label\) set problem_type='multi_label_classification'"):
        GradAug(make_network()).loss(images, hot)


# ---- another loss of the full network ----


def test_a_criterion_is_the_loss_of_the_full_network_alone(images, labels):
    network, weights = make_network(), torch.tensor([5.0, 1.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    p = copies(network)
    gradaug = GradAug(network, criterion=nn.CrossEntropyLoss(weight=weights), **SETTINGS)
    _, divergence = objective_by_hand(p, images, labels, sampled(gradaug))
    log_p = narrow_forward(p, images, 1.0).log_softmax(dim=1)[range(6), labels]
    expected = divergence - (weights[labels] * log_p).sum() / weights[labels].sum()
    expected.backward()
    assert gradaug.backward(images, labels, step=STEP).item() == pytest.approx(expected.item(), abs=1e-10)
    assert_gradients(network, {name: parameter.grad for name, parameter in p.items()})


def test_a_criterion_gets_logits_of_float32_under_autocast():
    seen = []

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return logits.mean()

    with torch.autocast("cpu", torch.bfloat16):
        GradAug(make_network().float(), num_subnets=0, criterion=criterion).loss(
            torch.randn(2, 3, 16, 16), torch.ones(2)
        )
    assert seen == [torch.float32]


def test_a_criterion_that_gives_no_scalar_is_refused(images, labels):
    with pytest.raises(ValueError, match=r"criterion returned a shape \(6,\); expected a tensor without dimensions"):
        GradAug(make_network(), criterion=nn.CrossEntropyLoss(reduction="none")).loss(images, labels)
    with pytest.raises(ValueError, match="criterion returned a float"):
        GradAug(make_network(), criterion=lambda logits, labels: 0.5).loss(images, labels)


@pytest.mark.parametrize("others", [{"criterion": nn.CrossEntropyLoss()}, {"problem_type": MULTI}])
def test_label_smoothing_goes_with_the_cross_entropy_alone(others):
    with pytest.raises(ValueError, match="label smoothing is 0.1, but only the cross-entropy"):
        GradAug(make_network(), label_smoothing=0.1, **others)


# ---- a teacher ----


@pytest.mark.parametrize("parts", [False, True])
def test_sub_networks_learn_the_prediction_of_a_teacher_in_evaluation_mode(images, labels, parts):
    network = make_network()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES), nn.Dropout(0.5)).double().train()
    p = copies(network)
    share = {"subnet_images": "split"} if parts else {}
    gradaug = GradAug(network, teacher=teacher, **SETTINGS, **share)
    linear = teacher[1]
    target = (images.flatten(1) @ linear.weight.T + linear.bias).softmax(dim=1).detach()
    expected = objective_by_hand(p, images, labels, [])[0]
    for subnet in gradaug.sampler.sample(STEP):
        seen = list(range(6)) if subnet.part is None else list(subnet.part.indices(6))
        log_q = narrow_forward(p, resize_by_hand(images[seen], subnet.resolution), subnet.width).log_softmax(dim=1)
        expected = expected + (target[seen] * (target[seen].log() - log_q)).sum() / len(seen)
    expected.backward()
    assert gradaug.backward(images, labels, step=STEP).item() == pytest.approx(expected.item(), abs=1e-10)
    assert_gradients(network, {name: parameter.grad for name, parameter in p.items()})
    assert linear.weight.grad is None and linear.weight.requires_grad and not teacher.training


def test_a_teacher_equal_to_the_full_network_changes_nothing(images, labels):
    """Its batch norm takes the stored statistics, so that it is the full network of a model without."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    network = network.double()
    with_teacher, without = copy.deepcopy(network), copy.deepcopy(network)
    found = GradAug(with_teacher, teacher=network, **SETTINGS).backward(images, labels, step=STEP)
    expected = GradAug(without, **SETTINGS).backward(images, labels, step=STEP)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert_gradients(with_teacher, {name: parameter.grad for name, parameter in without.named_parameters()}, 1e-12)


def test_a_teacher_is_asked_once_for_a_step_and_never_without_sub_networks(images, labels):
    teacher, seen = make_network(), []
    teacher.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    gradaug = GradAug(make_network(), teacher=teacher)
    for subnets in ([], [Subnet(0.5, 12), Subnet(0.9, 16)]):
        for p in gradaug.passes(images, labels, subnets):
            p.loss.backward()
    assert seen == [6]


def test_a_teacher_that_cannot_teach_is_refused(images, labels):
    network = make_network()
    with pytest.raises(ValueError, match="teacher is a str; it must be a model"):
        GradAug(network, teacher="resnet50")
    for shared in (network, nn.Sequential(network)):
        with pytest.raises(ValueError, match=r"shares layers with the model that is trained.*copy.deepcopy\(model\)"):
            GradAug(network, teacher=shared)
    with pytest.raises(ValueError, match="with subnet_target='label' no sub-network learns its prediction"):
        GradAug(network, teacher=make_network(), subnet_target="label")
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double()
    with pytest.raises(ValueError, match=r"sub-network's logits have shape \(6, 5\).* \(6, 3\)"):
        GradAug(network, teacher=other, **SETTINGS).loss(images, labels)

"""Weights that hooks compute, features that hooks capture and forwards that were replaced are planned as they run."""

import types

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from gradaug_hf.slimming import at_width, extract_subnet, make_slimmable, slicing_report, subnet_pass

SIDE = 8
WIDTHS = (0.5, 0.75, 1.0)


class Scales(prune.BasePruningMethod):
    """A pruning method of a user's own."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, importance_scores: Tensor, default_mask: Tensor) -> Tensor:
        return (importance_scores > 0).to(default_mask)


def quantised(conv: nn.Conv2d) -> None:
    """A hook of a user's own that computes a weight, from a parameter of another name."""
    weight = conv.weight
    del conv.weight
    conv.register_parameter("raw", weight)

    def compute(module: nn.Conv2d, args: tuple[Tensor]) -> None:
        module.weight = (module.raw * 8).round() / 8 + module.raw - module.raw.detach()

    conv.register_forward_pre_hook(compute)


def scaled(conv: nn.Conv2d) -> None:
    """A hook of a user's own that changes an output, by a parameter."""
    conv.register_parameter("scale", nn.Parameter(torch.rand(conv.out_channels, 1, 1)))
    conv.register_forward_hook(lambda module, args, output: output * module.scale)


# What is done to a convolution -> the least share of the multiply-adds that is sliced all the same.
COMPUTED = {
    "weight norm of before": (lambda conv: nn.utils.weight_norm(conv), 0.6),
    "spectral norm of before": (lambda conv: nn.utils.spectral_norm(conv), 0.0),
    "pruned": (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), 1.0),
    "pruned twice": (lambda conv: [prune.random_unstructured(conv, name, 0.2) for name in ("weight", "weight")], 1.0),
    "pruned by a method of one's own": (lambda conv: Scales.apply(conv, "weight"), 1.0),
    "weight norm": (lambda conv: parametrizations.weight_norm(conv), 0.6),
    "spectral norm": (lambda conv: parametrizations.spectral_norm(conv), 0.0),
    "a hook that computes the weight": (quantised, 0.0),
    "a hook that changes the output": (scaled, 0.0),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [layer for c in (8, 16, 8) for layer in (nn.LazyConv2d(c, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    model(images())
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_subnetworks_of_computed_weights_run_and_equal_their_extraction(kind, training):
    model = network()
    compute, least = COMPUTED[kind]
    compute(model[2])
    model.train(training)
    expected = model(images()).detach()
    make_slimmable(model, input_size=SIDE)
    for width in WIDTHS:
        with subnet_pass(model, width):
            output = model(images())
            output.square().sum().backward()
        with torch.no_grad():
            dense = extract_subnet(without_graph(model), width)
            assert torch.allclose(dense(images()), output, atol=1e-5) or "spectral" in kind and training
    if not ("spectral" in kind and training):  # each pass of training improves the estimate of the norm
        assert torch.allclose(model(images()), expected, atol=1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())
    report = slicing_report(model)
    assert report.sliced_macs >= least
    if not least:
        assert 0 < report.sliced_macs < 1
        assert report.refused["2"]


def without_graph(model: nn.Module) -> nn.Module:
    """A copy of which weights that a hook computed are no part of a graph, which `copy.deepcopy` refuses."""
    for module in model.modules():
        if isinstance(vars(module).get("weight"), Tensor):
            vars(module)["weight"] = vars(module)["weight"].detach()
    return model


@torch.no_grad()
def test_a_pruned_layer_computes_with_the_kept_part_of_its_mask():
    model = network()
    prune.l1_unstructured(model[2], "weight", 0.5)
    make_slimmable(model, input_size=SIDE)
    weights = model.state_dict()
    x = images()
    for layer, (kept, before) in {0: (4, 3), 2: (8, 4), 4: (4, 8)}.items():
        weight = weights["2.weight_orig"] * weights["2.weight_mask"] if layer == 2 else weights[f"{layer}.weight"]
        x = nn.functional.conv2d(x, weight[:kept, :before], weights[f"{layer}.bias"][:kept], padding=1).relu()
    expected = nn.functional.linear(x.mean((2, 3)), weights["8.weight"][:, :4], weights["8.bias"])
    with at_width(model, 0.5):
        assert torch.allclose(model(images()), expected, atol=1e-6)


def test_hooks_of_a_user_do_not_fire_in_the_analysis_and_their_layer_stays_whole_with_the_reason():
    model, calls = network(), []
    model[2].register_forward_hook(lambda *_: calls.append("after"))
    model[2].register_forward_pre_hook(lambda *_: calls.append("before"))
    make_slimmable(model, input_size=SIDE)
    assert calls == []
    report = slicing_report(model)
    assert "it has a hook" in report.refused["2"] and "after make_slimmable" in report.refused["2"]
    assert [unit.size for unit in report.units] == [8]
    with at_width(model, 0.5):
        model(images())
    assert calls == ["before", "after"]


@pytest.mark.parametrize("name, side", [("pit_ti_224", 224), ("legacy_xception", 96)])
def test_networks_that_give_features_by_hooks_are_sliced(name, side):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    make_slimmable(model, input_size=side)
    assert slicing_report(model).sliced_macs > 0.3
    x = torch.empty(2, 3, side, side, device="meta")
    shapes = [feature.shape for feature in model(x)]
    assert len(shapes) > 1
    with at_width(model, 0.5):
        assert [feature.shape for feature in model(x)] == shapes


@pytest.mark.parametrize("ran_before", [False, True])
def test_backbones_of_transformers_that_capture_outputs_by_hooks_are_sliced(ran_before):
    from transformers import Dinov2Backbone, Dinov2Config

    config = Dinov2Config(hidden_size=36, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
    backbone = Dinov2Backbone(config).eval()
    x = torch.randn(2, 3, 28, 28)
    if ran_before:
        backbone(x)
    make_slimmable(backbone, input_size=28)
    report = slicing_report(backbone)
    assert report.sliced_macs > 0.5, report
    full = backbone(x).feature_maps
    with torch.no_grad(), at_width(backbone, 0.5):
        narrow = backbone(x).feature_maps
        dense = extract_subnet(backbone, 0.5)(x).feature_maps
    assert [feature.shape for feature in narrow] == [feature.shape for feature in full]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(narrow, dense, strict=True))


# ---- replaced forwards ----


def doubled(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, 2 * x)


@pytest.mark.parametrize("layer", [None, 2])
def test_a_forward_that_was_replaced_by_a_method_is_followed(layer):
    model = network()
    module = model if layer is None else model[layer]
    module.forward = types.MethodType(doubled, module)
    make_slimmable(model, input_size=SIDE)
    assert slicing_report(model).sliced_macs == 1
    with torch.no_grad(), at_width(model, 0.5):
        assert torch.allclose(model(images()), extract_subnet(model, 0.5)(images()), atol=1e-6)


@pytest.mark.parametrize("layer", [None, 2])
def test_a_forward_that_was_replaced_by_a_function_around_the_model_keeps_it_whole_with_the_reason(layer):
    model = network()
    module = model if layer is None else model[layer]
    original = module.forward
    module.forward = lambda x: original(2 * x)
    expected = model(images())
    make_slimmable(model, input_size=SIDE)
    report = slicing_report(model)
    assert report.sliced_macs == 0
    assert f"the forward of {'the model' if layer is None else layer} was replaced" in report.refused[""]
    assert "types.MethodType" in report.refused[""]
    with subnet_pass(model, 0.5):
        assert torch.equal(model(images()), expected)


def test_parameters_that_the_traced_pass_does_not_use_stay_whole():
    model = network()
    model.register_parameter("spare", nn.Parameter(torch.zeros(6, 6)))
    make_slimmable(model, input_size=SIDE)
    assert "no operation of the traced pass uses it" in slicing_report(model).refused[""]
    with at_width(model, 0.5):
        assert model.spare.shape == (6, 6)

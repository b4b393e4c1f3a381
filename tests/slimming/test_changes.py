"""A model that was changed since it was made slimmable never runs by the old plan; `unpatch` makes it a plain one."""

import copy
import importlib.util
from functools import cache

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune

from gradaug_hf.objective.objective import GradAug
from gradaug_hf.slimming import (
    at_width,
    extract_subnet,
    make_slimmable,
    set_width,
    slicing_report,
    subnet_pass,
    unpatch,
)
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.slimming.widths import is_slimmable, num_droppable_blocks

WIDTH = 0.5


class Lora(nn.Module):
    """A linear layer with an adapter of low rank beside it, as peft puts them in."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def add_lora(model: nn.Module) -> None:
    model.requires_grad_(False)
    for block in model.layer2:
        block.conv1 = nn.Sequential(block.conv1, nn.Conv2d(block.conv1.out_channels, block.conv1.out_channels, 1))
    model.fc = Lora(model.fc)


def widen_classifier(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(torch.zeros(20, model.fc.in_features))
    model.fc.bias = nn.Parameter(torch.zeros(20))


CHANGES = {
    "reset_classifier": lambda model: model.reset_classifier(3),
    "no classifier": lambda model: model.reset_classifier(0),
    "LoRA": add_lora,
    "convert_sync_batchnorm": lambda model: setattr(model, "bn1", convert_sync_batchnorm(model.bn1)),
    "freeze_batch_norm_2d": lambda model: setattr(model, "layer1", freeze_batch_norm_2d(model.layer1)),
    "another weight": widen_classifier,
    "a copied layer": lambda model: setattr(model, "fc", copy.deepcopy(model.fc)),
    "pruning": lambda model: prune.l1_unstructured(model.layer2[0].conv1, "weight", 0.3),
    "parametrization": lambda model: parametrizations.weight_norm(model.layer2[0].conv1),
    "spectral norm of before": lambda model: nn.utils.spectral_norm(model.layer2[0].conv1),
    "weight norm of before": lambda model: nn.utils.weight_norm(model.layer2[0].conv1),
}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


@cache
def _slimmable_resnet() -> nn.Module:
    return make_slimmable(resnet(), input_size=32)


def slimmable_resnet() -> nn.Module:
    return copy.deepcopy(_slimmable_resnet())


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def changed(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model that was changed after, and one that was changed instead of, being made slimmable."""
    slimmable, plain = slimmable_resnet(), resnet()
    for model in (slimmable, plain):
        torch.manual_seed(1)
        CHANGES[request.param](model)
    return slimmable, plain


every_change = pytest.mark.parametrize("changed", CHANGES, indirect=True)


@every_change
def test_the_full_model_computes_as_one_that_was_changed_without_slimming(changed):
    slimmable, plain = (model.eval() for model in changed)
    if any(isinstance(module, nn.SyncBatchNorm) for module in plain.modules()):
        assert slimmable.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(slimmable(images()), plain(images()))


@every_change
def test_no_subnetwork_runs_until_it_is_made_slimmable_again(changed):
    slimmable, plain = changed
    uses = [
        lambda: set_width(slimmable, WIDTH),
        lambda: at_width(slimmable, WIDTH).__enter__(),
        lambda: subnet_pass(slimmable, WIDTH).__enter__(),
        lambda: extract_subnet(slimmable, WIDTH),
        lambda: slicing_report(slimmable),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"changed after gradaug_hf.make_slimmable\(model\): .*; call it again"):
            use()
    assert not is_slimmable(slimmable)
    make_slimmable(slimmable, input_size=32)
    make_slimmable(plain, input_size=32)
    with torch.no_grad(), at_width(slimmable.eval(), WIDTH), at_width(plain.eval(), WIDTH):
        assert torch.equal(slimmable(images()), plain(images()))
    assert slicing_report(slimmable).sliced_macs == slicing_report(plain).sliced_macs > 0.5


def test_the_error_names_the_module_that_was_put_in():
    model = slimmable_resnet()
    model.fc = nn.Linear(model.fc.in_features, 3)
    with pytest.raises(ValueError, match=r"ResNet was changed .*: fc \(Linear\) was put in or changed; call it again"):
        set_width(model, WIDTH)
    model = slimmable_resnet()
    widen_classifier(model)
    with pytest.raises(ValueError, match=r": fc \(Linear\) has parameters of another shape; call it again"):
        set_width(model, WIDTH)


def test_a_layer_that_was_taken_out_is_noticed():
    layers = nn.Conv2d(3, 8, 3), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = make_slimmable(nn.Sequential(*layers), input_size=8)
    del model[1]
    with pytest.raises(ValueError, match="a module was taken out or moved; call it again"):
        set_width(model, WIDTH)


def test_the_objective_plans_a_changed_model_anew():
    model = slimmable_resnet()
    model.reset_classifier(3)
    gradaug = GradAug(model, min_width=WIDTH, resolutions=[32])
    gradaug.backward(images(), torch.tensor([0, 1, 2]))
    assert extract_subnet(model, WIDTH).fc.weight.shape == (3, model.fc.in_features // 2)


def test_a_change_between_two_steps_of_the_objective_is_refused():
    model = resnet()
    gradaug = GradAug(model, min_width=WIDTH, resolutions=[32])
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="was changed after"):
        gradaug.backward(images(), torch.tensor([0, 1, 2]))


def test_blocks_of_a_changed_model_are_not_dropped_by_old_shortcuts():
    model = make_droppable(resnet(), input_size=32)
    assert num_droppable_blocks(model) == 4
    model.layer1[0].conv1 = nn.Sequential(model.layer1[0].conv1)
    assert num_droppable_blocks(model) == 0
    with pytest.raises(ValueError, match=r"was changed after gradaug_hf.slimming.depth.make_droppable\(model\)"):
        subnet_pass(model, 1.0, [0]).__enter__()
    with pytest.raises(ValueError, match="call it again"):
        make_droppable(model, input_size=32)
    assert num_droppable_blocks(make_droppable(unpatch(model), input_size=32)) == 4


def test_what_leaves_the_layers_in_place_is_no_change():
    model = slimmable_resnet()
    model.requires_grad_(False).eval().double().half()
    model.to(memory_format=torch.channels_last)
    model.load_state_dict(model.state_dict())
    model.fc.weight = nn.Parameter(torch.zeros_like(model.fc.weight))
    model.fc.register_forward_hook(lambda module, args, output: None)
    model.set_grad_checkpointing()
    for other in (model, copy.deepcopy(model), nn.Sequential(model), torch.compile(model)):
        assert is_slimmable(other)
        set_width(other, WIDTH)


# ---- plain classes ----


def test_unpatching_gives_the_plain_classes_parameters_and_outputs_back():
    plain = resnet()
    model = copy.deepcopy(plain)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    make_droppable(make_slimmable(model, input_size=32), input_size=32)
    set_width(model, WIDTH)
    assert unpatch(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in plain.modules()]
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == pointers
    assert torch.equal(model(images()), plain(images()))
    with pytest.raises(ValueError, match="ResNet is not slimmable"):
        set_width(model, WIDTH)
    assert unpatch(plain) is plain


@pytest.mark.parametrize(
    "tool",
    [
        torch.jit.script,
        lambda model: quantize_dynamic(model, {nn.Linear}),
        lambda model: quantize_dynamic(model, {nn.Linear}, inplace=True),
    ],
)
def test_tools_that_go_by_the_class_of_a_layer_name_unpatch_and_work_after_it(tool):
    model = make_slimmable(resnet(), input_size=32).eval()
    expected = model(images())
    with pytest.raises(RuntimeError, match=r"call gradaug_hf.unpatch\(model\) first"):
        tool(model)
    result = tool(unpatch(model))
    assert torch.allclose(result(images()), expected, atol=0.1)
    assert not isinstance(getattr(result, "fc", None), nn.Linear)


def test_a_parametrization_is_taken_off_again_as_off_a_plain_model():
    model = make_slimmable(resnet(), input_size=32).eval()
    expected = model(images())
    parametrizations.weight_norm(model.layer2[0].conv1)
    assert torch.allclose(model(images()), expected, atol=1e-5)
    parametrize.remove_parametrizations(model.layer2[0].conv1, "weight")
    assert type(model.layer2[0].conv1) is nn.Conv2d


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_of_peft_are_sliced_after_making_slimmable_again():
    from peft import LoraConfig, get_peft_model

    model = make_slimmable(timm.create_model("test_vit", num_classes=5))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"]))
    with pytest.raises(ValueError, match="was changed after"):
        set_width(adapted, WIDTH)
    make_slimmable(adapted)
    assert slicing_report(adapted).sliced_macs > 0.8
    with subnet_pass(adapted.train(), WIDTH):
        adapted(torch.randn(2, 3, 160, 160)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert gradients and all("lora" in name and gradient is not None for name, gradient in gradients.items())

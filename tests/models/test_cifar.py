"""What all networks for small images promise, whatever their blocks."""

import copy

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import DropBlock2d
from timm.models import group_parameters
from torch import Tensor, nn

from gradaug_hf import at_width, make_slimmable, slicing_report
from gradaug_hf.models.cifar import CifarNetwork
from tests.helpers.oracle import kept_entries, randomised, relative_error, zeroed

NAMES = ["wrn16_2", "resnet20_cifar", "pyramidnet110_a48"]
LONG = ["pyramidnet110_a48", "resnet110_cifar", "pyramidnet200_a240"]
# The long networks are traced in the tests that are run on demand; short ones of their kind are sliced elsewhere.
SLICED = ["wrn16_2", "resnet20_cifar", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
RATES = {"drop_path_rate": 0.4, "drop_block_rate": 0.2}


def images(batch: int, side: int = 16) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def network(name: str) -> CifarNetwork:
    return timm.create_model(name, num_classes=5)


def blocks_of(network: CifarNetwork) -> list[nn.Module]:
    return [*network.layer1, *network.layer2, *network.layer3]


@pytest.mark.parametrize("size", [8, 9, 24, 28, 32, (16, 40)])
def test_any_image_of_eight_pixels_and_more_is_accepted(network: CifarNetwork, size: int | tuple[int, int]):
    height, width = (size, size) if isinstance(size, int) else size
    assert network(torch.randn(2, 3, height, width)).shape == (2, 5)


def test_pretrained_cfg_carries_cifar(network: CifarNetwork):
    config = resolve_model_data_config(network)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == pytest.approx((125.3 / 255, 123.0 / 255, 113.9 / 255))
    assert config["std"] == pytest.approx((63.0 / 255, 62.1 / 255, 66.7 / 255))
    assert config["crop_pct"] == 1.0


def test_convolutions_are_initialised_by_fan_out(network: CifarNetwork):
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_image_channels_and_pooling_can_be_changed(name: str):
    network = timm.create_model(name, num_classes=5, in_chans=1, global_pool="catavgmax")
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 5)
    assert network.head_hidden_size == network.fc.in_features == 2 * network.num_features


def test_features_and_head_make_up_the_forward(network: CifarNetwork):
    network.eval()
    x = images(2)
    features = network.forward_features(x)
    assert features.shape == (2, network.num_features, 4, 4)
    assert network.forward_head(features, pre_logits=True).shape == (2, network.head_hidden_size)
    assert torch.equal(network.forward_head(features), network(x))


def test_classifier_can_be_replaced(network: CifarNetwork):
    features = network.forward_features(images(2))
    network.reset_classifier(7, "max")
    assert network.get_classifier() is network.fc
    assert network.num_classes == 7
    pooled = features.amax((2, 3))
    torch.testing.assert_close(network.forward_head(features), pooled @ network.fc.weight.T + network.fc.bias)
    network.reset_classifier(0)
    torch.testing.assert_close(network.forward_head(features), pooled)


def test_gradient_checkpointing_leaves_the_gradients_unchanged(name: str):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=5, **RATES)
        network.set_grad_checkpointing(checkpointing)
        network(images(4)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, msg=parameter)


def test_parameters_are_grouped_by_stem_block_and_the_rest(network: CifarNetwork):
    groups = group_parameters(network, network.group_matcher())
    blocks = len(blocks_of(network))
    stages = group_parameters(network, network.group_matcher(coarse=True))
    assert (len(groups), len(stages)) == (1 + blocks + 1, 1 + 3 + 1)
    assert all(key.startswith(("conv1.", "bn1.")) for key in groups[0])
    assert set(groups[blocks]) == {key for key, _ in network.named_parameters() if f"layer3.{blocks // 3 - 1}." in key}
    assert {key.split(".")[0] for key in stages[2]} == {"layer2"}
    assert {"fc.weight", "fc.bias"} <= set(groups[blocks + 1])


def test_saved_folder_loads_as_a_local_timm_model(network: CifarNetwork, tmp_path):
    network.eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images(2)), network(images(2)))


def test_drop_rates_leave_parameters_and_evaluation_unchanged(name: str, network: CifarNetwork):
    dropped = timm.create_model(name, num_classes=5, **RATES)
    dropped.load_state_dict(network.state_dict())
    x = images(2)
    assert not torch.allclose(dropped(x), network(x), rtol=1e-2)
    dropped.load_state_dict(network.state_dict())
    assert torch.equal(dropped.eval()(x), network.eval()(x))


def test_paths_are_dropped_ever_more_often_from_the_first_block_to_the_last(name: str):
    blocks = blocks_of(timm.create_model(name, drop_path_rate=0.4))
    assert isinstance(blocks[0].drop_path, nn.Identity)
    rates = [0.4 * index / (len(blocks) - 1) for index in range(1, len(blocks))]
    assert [block.drop_path.drop_prob for block in blocks[1:]] == pytest.approx(rates)


def test_dropblock_has_timm_s_settings_in_the_last_two_stages(name: str):
    network = timm.create_model(name, drop_block_rate=0.2)
    assert not any(isinstance(module, DropBlock2d) for module in network.layer1.modules())
    for stage, block_size, gamma_scale in ((network.layer2, 5, 0.25), (network.layer3, 3, 1.0)):
        drops = [block.drop_block for block in stage]
        assert len({id(drop) for drop in drops}) == len(stage)
        assert {(d.drop_prob, d.block_size, d.gamma_scale) for d in drops} == {(0.2, block_size, gamma_scale)}


def test_dropblock_zeroes_positions_in_all_channels_of_a_residual_while_training(name: str):
    block = timm.create_model(name, drop_block_rate=0.2).layer3[1]
    seen = []
    block.drop_block.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    block(torch.randn(8, block.bn1.num_features, 8, 8))
    zero = seen[0] == 0
    assert torch.equal(zero.all(1), zero.any(1))
    assert 0.05 < zero.float().mean() < 0.4


@pytest.mark.parametrize("rate", ["drop_path_rate", "drop_block_rate"])
@pytest.mark.parametrize("value", [-0.1, 1])
def test_a_rate_that_is_no_probability_below_one_is_refused(name: str, rate: str, value: float):
    with pytest.raises(ValueError, match=rf"{rate} is {value}; a drop rate lies in \[0, 1\)"):
        timm.create_model(name, **{rate: value})


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize("rates", [{}, RATES])
def test_all_channels_but_image_and_classes_are_sliced(name: str, rates: dict[str, float]):
    network = timm.create_model(name, num_classes=5, **rates)
    report = slicing_report(make_slimmable(network))
    assert report.sliced_macs == 1
    assert not report.refused
    assert report.sliced_params == 1 - network.fc.bias.numel() / report.params()


@pytest.mark.parametrize("name", SLICED)
@torch.no_grad()
def test_subnet_equals_the_full_network_with_left_out_channels_zeroed(name: str):
    torch.manual_seed(0)
    untouched = randomised(timm.create_model(name, num_classes=5), images(8))
    model = make_slimmable(copy.deepcopy(untouched).double())
    x = images(2).double()
    for width in (0.5, 0.75, 0.9):
        with at_width(model, width):
            output = model(x)
        assert relative_error(output, zeroed(untouched, kept_entries(model, width))(x)) < 1e-10
        assert relative_error(output, model(x)) > 1e-3


def test_residuals_are_scaled_ever_more_often_from_block_to_block(name: str):
    blocks = blocks_of(timm.create_model(name, shake_drop_rate=0.6))
    assert [block.drop_path.rate for block in blocks] == pytest.approx(
        [0.6 * index / len(blocks) for index in range(1, len(blocks) + 1)]
    )


def test_a_residual_may_be_scaled_and_dropped(name: str):
    shake_drop, drop_path = timm.create_model(name, shake_drop_rate=0.6, drop_path_rate=0.4).layer3[-1].drop_path
    assert (shake_drop.rate, drop_path.drop_prob) == pytest.approx((0.6, 0.4))

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from gradaug_hf.objective.objective import GradAug
from gradaug_hf.objective.resolutions import ResolutionTrial
from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.slimming import (
    at_width,
    extract_subnet,
    make_slimmable,
    recalibrate_batchnorm,
    slicing_report,
    subnet_pass,
)
from gradaug_hf.slimming.depth import find_shortcuts, make_droppable
from gradaug_hf.slimming.widths import num_droppable_blocks
from tests.helpers.residual_network import gradients_by_hand, make_network, narrow_forward, resize_by_hand

BLOCKS = ["block1", "block2", "block3"]
# Networks of timm, each with shortcuts of its own kind, and how many of their residual blocks can be dropped.
NETWORKS = {
    "test_resnet": (4, 4),
    "resnet20_cifar": (9, 9),
    "test_convnext": (9, 9),
    "test_vit": (6, 6),
    "test_byobnet": (4, 4),
    "mobilenetv3_small_050": (7, 12),
}


# Of the networks that the slow sweep computes in float64.
MOST_PARAMETERS = 100_000_000


class Zeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 4, 2, 2, 1, 3])


def state_of(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (pointer, tensor) in after.items():
        assert pointer == before[name][0], name
        assert torch.equal(tensor, before[name][1]), name


# ---- the objective ----


@pytest.mark.parametrize("mode, step", [("depth", 17), ("width+depth", 34)])  # steps that sample every combination
@pytest.mark.parametrize("joint", [False, True])
def test_gradients_and_loss_of_a_step_are_those_of_the_formula(images, labels, mode, step, joint):
    network = make_network()
    settings = {"min_width": 0.5, "resolutions": [16, 12, 9], "min_survival": 0.3}
    gradaug = GradAug(network, num_subnets=4, subnet_mode=mode, kl_weight=0.7, **settings)
    subnets = gradaug.sampler.sample(step)
    dropped = [[BLOCKS[index] for index in subnet.dropped_blocks(3)] for subnet in subnets]
    assert {frozenset(names) for names in dropped} == {
        frozenset(names) for names in ([], ["block2"], ["block3"], ["block2", "block3"])
    }
    assert (len({subnet.width for subnet in subnets}) > 1) == (mode == "width+depth")
    by_hand = [(subnet.width, subnet.resolution, *names) for subnet, names in zip(subnets, dropped, strict=True)]
    expected_loss, expected = gradients_by_hand(network, images, labels, by_hand, kl_weight=0.7)
    if joint:
        loss = gradaug.loss(images, labels, step=step)
        loss.backward()
    else:
        loss = gradaug.backward(images, labels, step=step)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-10)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10, msg=lambda m, n=name: n + m)


def test_only_the_full_pass_writes_batch_norm_statistics(images, labels):
    network, plain = make_network(), make_network()
    gradaug = GradAug(network, subnet_mode="depth")
    subnets = [Subnet(1.0, 12, seed, survival=0.3) for seed in range(6)]
    passes = list(gradaug.passes(images, labels, subnets))
    assert any(p.dropped for p in passes)
    plain(images)
    buffers = dict(network.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_the_full_pass_and_evaluation_keep_all_blocks(images, labels):
    network, plain = make_network(), make_network()
    gradaug = GradAug(network, subnet_mode="depth", min_survival=0.1)
    full = next(gradaug.passes(images, labels, gradaug.sampler.sample(0)))
    assert torch.equal(full.logits, plain(images).detach())
    gradaug.backward(images, labels)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain.eval()(images))


def test_a_dropped_block_is_not_computed(images, labels):
    network = make_network()
    computed = []
    for name in BLOCKS:
        network.get_submodule(name).conv1.register_forward_hook(lambda *_, name=name: computed.append(name))
    gradaug = GradAug(network, subnet_mode="depth")
    for p in gradaug.passes(images, labels, [Subnet(seed=seed, survival=0.4) for seed in range(5)]):
        assert computed == [name for index, name in enumerate(BLOCKS) if index not in p.dropped]
        computed.clear()


def test_a_subnetwork_keeps_its_blocks_until_the_next_pass_is_asked_for(images, labels):
    network = make_network()
    subnet = next(
        Subnet(seed=seed, survival=0.3) for seed in range(9) if 2 in Subnet(0, 0, seed, 0.3).dropped_blocks(3)
    )
    passes = GradAug(network, subnet_mode="depth").passes(images, labels, [subnet])
    next(passes)
    next(passes)
    x = torch.randn(1, 12, 4, 4, dtype=torch.float64)
    assert torch.equal(network.block3(x), x.relu())
    passes.close()
    assert not torch.equal(network.block3(x), x.relu())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_network_has_the_same_gradients(images, labels, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = make_network()

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.relu(self.network.bn(self.network.stem(x)))
            for name in BLOCKS:
                block = self.network.get_submodule(name)
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return self.network.fc(x.mean(dim=(2, 3)))

    settings = {"num_subnets": 4, "subnet_mode": "depth", "min_survival": 0.3, "resolutions": [16, 12]}
    expected, model = make_network(), Checkpointed()
    GradAug(expected, **settings).backward(images, labels, step=5)
    make_droppable(model.network)
    GradAug(model, **settings).backward(images, labels, step=5)
    for name, parameter in expected.named_parameters():
        found = model.network.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-12, msg=lambda m, n=name: n + m)


def test_a_survival_without_droppable_blocks_is_refused(images, labels):
    with pytest.raises(ValueError, match=r"survival 0\.5, but no block of ResidualNetwork can .*make_droppable"):
        list(GradAug(make_network()).passes(images, labels, [Subnet(survival=0.5)]))


# ---- shortcuts ----


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.* are never dropped")
def test_a_network_without_its_blocks_is_the_network_whose_drop_paths_drop(name):
    check_dropping_all(timm.create_model(name, num_classes=5), *NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", json.loads((Path(__file__).parent / "smallest.json").read_text()).values())
@pytest.mark.filterwarnings("ignore:.* are never dropped")
def test_so_is_the_smallest_network_of_every_module_of_timm(name):
    network = timm.create_model(name, num_classes=5)
    if sum(parameter.numel() for parameter in network.parameters()) > MOST_PARAMETERS:
        pytest.skip(f"{name} is too large for float64")
    shortcuts, refused = find_shortcuts(network)
    if not shortcuts:
        pytest.skip(f"no residual block of {name} can be dropped")
    check_dropping_all(network, len(shortcuts), len(shortcuts) + len(refused))


def check_dropping_all(network: nn.Module, droppable: int, blocks: int) -> None:
    """Compare outputs and gradients with those of a copy whose drop paths give zeros."""
    torch.manual_seed(0)
    reference = copy.deepcopy(network).double().train()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in reference.modules():  # what is random by itself cannot be compared
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    network = copy.deepcopy(reference)
    shortcuts, refused = find_shortcuts(network)
    assert (len(shortcuts), len(shortcuts) + len(refused)) == (droppable, blocks)
    make_droppable(network)
    sizes = [(3, 64, 64), network.pretrained_cfg["input_size"]]
    size = next(size for size in sizes if ResolutionTrial(network).error_at(size[-1]) is None)
    for block in shortcuts:
        for module in list(reference.get_submodule(block).modules()):
            for attribute in [*module._modules, *vars(module)]:
                if attribute.rstrip("0123456789").endswith("drop_path"):
                    setattr(module, attribute, Zeros())
    x = torch.randn(2, *size, dtype=torch.float64)
    expected = reference(x)
    expected.square().sum().backward()
    with subnet_pass(network, 1.0, range(droppable)):
        found = network(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert any(gradient is None for gradient in gradients.values())
    for name, parameter in reference.named_parameters():
        gradient = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-8, msg=lambda m, n=name: n + m)


def test_resnet110_loses_blocks_by_the_papers_rule():
    network = timm.create_model("resnet110_cifar", num_classes=5)
    shortcuts, refused = find_shortcuts(network)
    assert refused == {}
    assert list(shortcuts) == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(18)]
    for index, (name, shortcut) in enumerate(shortcuts.items()):
        path = "downsample" if name in ("layer2.0", "layer3.0") else None
        assert (shortcut.index, shortcut.path, shortcut.act) == (index, path, "act2")
    sampler = SubnetSampler(3, resolutions=[32, 28, 24], subnet_mode="depth", min_survival=0.8)
    sampled = [subnet.dropped_blocks(54) for step in range(1000) for subnet in sampler.sample(step)]
    for index in (0, 26, 53):
        survival = 1 - 0.2 * index / 53
        assert sum(index not in blocks for blocks in sampled) / 3000 == pytest.approx(survival, abs=0.03)


def test_blocks_are_found_whatever_their_drop_path_is():
    for rate in (0.0, 0.3):
        network = timm.create_model("resnet18", num_classes=5, drop_path_rate=rate)
        assert any(isinstance(module, DropPath) for module in network.modules()) == (rate > 0)
        assert len(find_shortcuts(network)[0]) == 8


class OwnBlock(nn.Module):
    """`scale * x + drop_path(conv(x))`, of which no layer gives the first part unless the scale is 1."""

    def __init__(self, drop_path: bool, gain: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.skip = nn.Conv2d(3, 3, 1)
        self.gain = nn.Parameter(torch.ones(())) if gain else None
        if drop_path:
            self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv(x)
        residual = self.drop_path(residual) if hasattr(self, "drop_path") else residual
        return residual + (x if self.gain is None else self.gain * x)


def own_network(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))


def test_a_shortcut_that_happens_to_fit_the_values_of_now_is_not_taken():
    network = own_network(OwnBlock(True), OwnBlock(True, gain=True))
    with pytest.warns(UserWarning, match=r"1 of 2 residual blocks of Sequential are never dropped: 1 \(without its"):
        make_droppable(network)
    assert num_droppable_blocks(network) == 1
    assert network[1].gain == 1


def test_a_block_that_does_not_use_its_drop_path_is_never_dropped():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.drop_path = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    shortcuts, refused = find_shortcuts(own_network(Plain(), OwnBlock(True)))
    assert list(shortcuts) == ["1"]
    assert refused == {"0": "it has no shortcut: its drop path is not used"}


def test_a_network_without_residual_blocks_is_refused_by_name():
    with pytest.raises(ValueError, match=r"DLA has no residual block with a drop_path .* subnet_mode=\"width\""):
        make_droppable(timm.create_model("dla46x_c", num_classes=5))
    with pytest.raises(ValueError, match="Sequential has no residual block with a drop_path"):
        GradAug(own_network(OwnBlock(False)), subnet_mode="depth")
    with pytest.raises(ValueError, match="Sequential has no residual block .*; 0: without its residual branch"):
        make_droppable(own_network(OwnBlock(True, gain=True)))


# ---- the network is left as it is ----


def test_finding_shortcuts_leaves_the_network_and_random_numbers_untouched():
    network = timm.create_model("test_resnet", num_classes=5)
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    classes = [type(module) for module in network.modules()]
    calls = []
    network.layer2.register_forward_hook(lambda *_: calls.append(1))
    before, random_state = state_of(network), torch.get_rng_state()
    find_shortcuts(network)
    assert_same_state(network, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in network.modules()] == modes
    assert [type(module) for module in network.modules()] == classes
    assert calls == []


def test_a_droppable_network_has_the_state_dict_and_outputs_of_before(images):
    network, plain = make_network(), make_network()
    before = state_of(network)
    make_droppable(network)
    assert_same_state(network, before)
    assert isinstance(network.block1, type(plain.block1))
    for training in (True, False):
        assert torch.equal(network.train(training)(images), plain.train(training)(images))
    make_droppable(network)
    assert num_droppable_blocks(network) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("slimmable", [False, True])
def test_a_copy_drops_blocks_of_its_own(images, copied, slimmable):
    network = make_network()
    if slimmable:
        make_slimmable(network, input_size=16)
    make_droppable(network)
    other = copied(network)
    width = 0.5 if slimmable else 1.0
    expected = narrow_forward(dict(network.named_parameters()), images, width, ["block3"])
    with subnet_pass(other, width, [2]):
        torch.testing.assert_close(other(images), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(network(images), make_network()(images), rtol=0, atol=0)


@pytest.mark.parametrize("depth_first", [False, True])
def test_a_network_is_slimmable_and_droppable_in_either_order(images, depth_first):
    network = make_network()
    for make in (make_droppable, make_slimmable)[:: 1 if depth_first else -1]:
        make(network)
    assert slicing_report(network).sliced_macs > 0.5
    p = dict(network.named_parameters())
    small = resize_by_hand(images, 12)
    with subnet_pass(network, 0.5, [1, 2]):
        torch.testing.assert_close(network(small), narrow_forward(p, small, 0.5, BLOCKS[1:]), rtol=0, atol=1e-12)
    with at_width(network, 0.5):
        torch.testing.assert_close(network(small), narrow_forward(p, small, 0.5), rtol=0, atol=1e-12)
    network.eval()
    with recalibrate_batchnorm(network, 0.5, [images]):
        expected = network(images)
        subnet = extract_subnet(network, 0.5)
    torch.testing.assert_close(subnet(images), expected, rtol=0, atol=1e-12)
    assert type(subnet.block1) is type(make_network().block1)


def test_a_droppable_network_that_was_not_made_slimmable_has_no_width(images):
    network = make_droppable(make_network())
    for use in (lambda: subnet_pass(network, 0.5).__enter__(), lambda: slicing_report(network)):
        with pytest.raises(ValueError, match="ResidualNetwork is not slimmable"):
            use()

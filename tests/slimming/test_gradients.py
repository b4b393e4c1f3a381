"""Gradients of slices that are added to those of the parameters in place."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradaug_hf.objective.objective import GradAug
from gradaug_hf.slimming import gradients, make_slimmable
from tests.helpers.residual_network import gradients_by_hand, make_network

SETTINGS = {"num_subnets": 3, "min_width": 0.5, "resolutions": [16, 12, 9], "seed": 3}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.fixture
def added(monkeypatch) -> list[Tensor]:
    """Have all slices added in place, and return those parameters that were."""
    found = []
    monkeypatch.setattr(gradients, "FEWEST_ELEMENTS", 0)
    original = gradients.can_add_directly

    def seen(tensor: Tensor) -> bool:
        if can := original(tensor):
            found.append(tensor)
        return can

    monkeypatch.setattr("gradaug_hf.slimming.patching.can_add_directly", seen)
    return found


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_they_are_those_of_views_to_the_last_bit_and_those_of_the_formula(batch, added, monkeypatch, memory_format):
    network, images = make_network().to(memory_format=memory_format), batch[0].contiguous(memory_format=memory_format)
    gradaug = GradAug(network, **SETTINGS)
    widths = [(subnet.width, subnet.resolution) for subnet in gradaug.sampler.sample(0)]
    _, by_hand = gradients_by_hand(network, *batch, widths)
    gradaug.backward(images, batch[1], 0)
    found = gradients_of(network)
    assert {id(p) for p in added} > {id(p) for p in network.parameters() if p.ndim == 4}
    network.zero_grad()
    monkeypatch.setattr(gradients, "FEWEST_ELEMENTS", 10**9)
    gradaug.backward(images, batch[1], 0)
    for ours, expected, name in zip(found, gradients_of(network), by_hand, strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()
        torch.testing.assert_close(ours, by_hand[name], rtol=0, atol=1e-10)


def test_steps_are_added_up_and_a_parameter_without_a_gradient_yet_gets_one(batch, added):
    network = make_slimmable(make_network())
    gradaug = GradAug(network, **SETTINGS)
    gradaug.backward(*batch, 0)
    once = [gradient.clone() for gradient in gradients_of(network)]
    gradaug.backward(*batch, 0)
    assert all(torch.allclose(a, 2 * b, rtol=1e-10) for a, b in zip(gradients_of(network), once, strict=True))
    network.zero_grad()
    passes = gradaug.passes(*batch, gradaug.sampler.sample(0), direct=True)
    next(passes)  # whose backward is left out
    next(passes).loss.backward()
    assert added and all(gradient is not None for gradient in gradients_of(network))


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_parameter_see_each_pass(batch, added, kind):
    network = make_slimmable(make_network())
    parameter, calls = next(p for p in network.parameters() if p.ndim == 4), []
    getattr(parameter, kind)(calls.append)
    GradAug(network, **SETTINGS).backward(*batch, 0)
    assert len(calls) == 4 and not any(each is parameter for each in added) and added


def test_gradients_of_gradients_are_refused_rather_than_wrong(batch, added):
    gradaug = GradAug(make_network(), **SETTINGS)
    with pytest.raises(RuntimeError, match="create_graph=True is not for GradAug.backward; call GradAug.loss"):
        gradaug.backward(*batch, 0, partial(Tensor.backward, create_graph=True))


def test_a_joint_loss_leaves_the_parameters_in_the_graph(batch, added):
    network = make_network()
    loss = GradAug(network, **SETTINGS).loss(*batch, 0)
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, list(network.parameters())))
    assert not added


def test_only_passes_whose_gradients_stay_in_the_process_are_added_in_place(batch, added, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(make_slimmable(make_network()))
        gradaug = GradAug(model, **SETTINGS)
        gradaug.backward(*batch, 0)
        assert not added
        with model.no_sync():
            gradaug.backward(*batch, 0)
        assert added
        gradaug.backward(*batch, 0)
    finally:
        dist.destroy_process_group()
    alone = make_network()
    alone.load_state_dict(model.module.state_dict())
    three = GradAug(alone, **SETTINGS)
    for _ in range(3):
        three.backward(*batch, 0)
    for ours, expected in zip(gradients_of(model), gradients_of(alone), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)

import copy

import pytest
import timm
import torch

import gradaug_hf


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return gradaug_hf.make_slimmable(timm.create_model("resnet10t", num_classes=10)).eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 32, 32, generator=generator) + 2 for _ in range(3)]


def test_statistics_are_the_average_over_the_batches(model, batches):
    with gradaug_hf.recalibrate_batchnorm(model, 0.75, batches):
        norm = model.conv1[1]  # the first one: what it sees does not depend on other statistics
        mean, var = norm.running_mean, norm.running_var
        seen = []
        handle = norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(batch)
        handle.remove()
    expected_mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    expected_var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(mean, expected_mean, atol=1e-5)
    assert torch.allclose(var, expected_var, rtol=1e-4)


def test_the_subnet_runs_in_eval_mode_inside(model, batches):
    with torch.no_grad(), gradaug_hf.at_width(model, 0.75):
        poor = model(batches[0])
    with torch.no_grad(), gradaug_hf.recalibrate_batchnorm(model, 0.75, batches):
        calibrated = model(batches[0])
        alone = model(batches[0][:1])
    assert not torch.allclose(poor, calibrated)
    assert torch.allclose(alone, calibrated[:1], atol=1e-5)


def test_extracting_inside_takes_the_recalibrated_statistics(model, batches):
    with torch.no_grad(), gradaug_hf.recalibrate_batchnorm(model, 0.75, batches):
        expected = model(batches[0])
        subnet = gradaug_hf.extract_subnet(model, 0.75)
    assert torch.allclose(subnet(batches[0]), expected, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_modes_and_width_come_back_bit_identical(model, batches, fails):
    model.layer1.train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    expected = model(batches[0])
    for name, value in before.items():
        model.state_dict()[name].copy_(value)  # the call above was in training mode in layer1
    try:
        with gradaug_hf.recalibrate_batchnorm(model, 0.5, batches):
            model(batches[0])
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model(batches[0]), expected)
    assert model.bn1.momentum == 0.1


def test_no_batches_are_refused(model):
    with pytest.raises(ValueError, match="batches is empty"), gradaug_hf.recalibrate_batchnorm(model, 0.5, []):
        pass
    assert not model.bn1._overrides

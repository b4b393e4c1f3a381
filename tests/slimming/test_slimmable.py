import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

import gradaug_hf
from gradaug_hf.slimming import make_slimmable, subnet_pass


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=10)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}


def output_at(model: nn.Module, width: float, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), gradaug_hf.at_width(model, width):
        return model(images)


def test_state_dict_keys_and_pointers_do_not_change(model, images):
    before = pointers(model)
    parameters = list(model.parameters())
    assert gradaug_hf.make_slimmable(model) is model
    assert pointers(model) == before
    with gradaug_hf.at_width(model, 0.5):
        model(images).sum().backward()
        assert pointers(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_classes_and_printed_structure_stay_those_of_the_network(model):
    printed = str(model)
    gradaug_hf.make_slimmable(model)
    assert str(model) == printed
    assert isinstance(model.bn1, nn.BatchNorm2d)


def test_making_slimmable_twice_is_once(model, images):
    once = gradaug_hf.make_slimmable(copy.deepcopy(model)).eval()
    twice = gradaug_hf.make_slimmable(gradaug_hf.make_slimmable(model)).eval()
    assert [type(module) for module in once.modules()] == [type(module) for module in twice.modules()]
    assert torch.equal(output_at(once, 0.75, images), output_at(twice, 0.75, images))


def test_a_new_classifier_is_sliced_after_making_slimmable_again(model, images):
    gradaug_hf.make_slimmable(model)
    model.reset_classifier(3)
    gradaug_hf.make_slimmable(model)
    assert output_at(model, 0.5, images).shape == (4, 3)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_slimmable_and_independent(model, images, duplicate):
    gradaug_hf.make_slimmable(model).eval()
    if duplicate == "deepcopy":
        copied = copy.deepcopy(model)
    elif duplicate == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert torch.equal(output_at(copied, 0.75, images), output_at(model, 0.75, images))
    gradaug_hf.set_width(copied, 0.5)
    full = model(images)
    assert torch.equal(full, output_at(model, 1.0, images))
    assert not torch.equal(copied(images), full)


def test_moving_to_another_dtype_and_device_keeps_it_slimmable(model, images):
    gradaug_hf.make_slimmable(model).eval()
    model.double()
    assert output_at(model, 0.75, images.double()).dtype == torch.float64
    model.to("meta")
    assert output_at(model, 0.75, images.double().to("meta")).shape == (4, 10)


def test_hooks_on_modules_still_fire_with_narrow_tensors(model, images):
    gradaug_hf.make_slimmable(model)
    seen = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    output_at(model, 0.75, images)
    output_at(model, 1.0, images)
    assert seen == [96, 128]


def test_user_hooks_do_not_fire_while_the_network_is_analysed(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    gradaug_hf.make_slimmable(model)
    assert calls == []


def test_analysis_leaves_mode_statistics_and_random_state_alone(model):
    model.eval()
    model.bn1.train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    gradaug_hf.make_slimmable(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.bn1.training and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_at_width_restores_the_width_after_an_exception(model, images):
    gradaug_hf.make_slimmable(model).eval()
    gradaug_hf.set_width(model, 0.75)
    expected = model(images)
    with pytest.raises(RuntimeError, match="stop"), gradaug_hf.at_width(model, 0.5):
        raise RuntimeError("stop")
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("width", [0, -0.5, 1.01])
def test_a_width_out_of_range_is_refused(model, width):
    gradaug_hf.make_slimmable(model)
    with pytest.raises(ValueError, match=rf"width is {width}.*\(0, 1\]"):
        gradaug_hf.set_width(model, width)


def test_a_network_that_is_not_slimmable_is_named(model):
    with pytest.raises(ValueError, match="ResNet is not slimmable: call gradaug_hf.make_slimmable"):
        gradaug_hf.set_width(model, 0.5)


@pytest.mark.parametrize("size", [0, (3, -1, 32), (1, 2, 3, 4), 32.5])
def test_an_input_size_that_is_none_is_refused(model, size):
    with pytest.raises(ValueError, match="input_size is"):
        gradaug_hf.make_slimmable(model, input_size=size)


@pytest.mark.parametrize("divisor", [0, -8, 1.5])
def test_a_width_divisor_that_is_not_positive_is_refused(model, divisor):
    with pytest.raises(ValueError, match="width_divisor is"):
        gradaug_hf.make_slimmable(model, width_divisor=divisor)


def test_channel_counts_are_multiples_of_the_divisor(model):
    gradaug_hf.make_slimmable(model, width_divisor=8)
    subnet = gradaug_hf.extract_subnet(model, 0.9)
    assert {conv.out_channels % 8 for conv in subnet.modules() if isinstance(conv, nn.Conv2d)} == {0}


@pytest.mark.parametrize("width", [1.0, 0.75])
def test_subnet_passes_leave_batch_norm_buffers_bit_identical(model, images, width):
    gradaug_hf.make_slimmable(model).train()
    model(images)
    before = copy.deepcopy(dict(model.named_buffers()))
    with subnet_pass(model, width):
        model(images).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model(images)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_subnet_passes_use_batch_statistics(model, images):
    gradaug_hf.make_slimmable(model).train()
    with torch.no_grad(), subnet_pass(model, 0.5):
        seen = []
        model.bn1.register_forward_hook(lambda module, args, output: seen.append(output.mean((0, 2, 3))))
        model(images)
    assert len(seen[0]) == 32
    assert torch.allclose(seen[0], torch.zeros(32), atol=1e-5)


@pytest.mark.parametrize("width, kept", [(0.5, 4), (1.0, 8)])
def test_a_subnetwork_with_a_single_value_of_each_channel_uses_the_running_statistics(width, kept):
    torch.manual_seed(0)
    conv, norm, head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    make_slimmable(model, input_size=8).train()
    x = torch.randn(1, 3, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)  # as a plain model does
    before = copy.deepcopy(model.state_dict())
    with subnet_pass(model, width):
        output = model(x)
        output.sum().backward()
    hidden = nn.functional.conv2d(x, conv.weight[:kept], conv.bias[:kept]).flatten(1)
    hidden = (hidden - norm.running_mean[:kept]) / (norm.running_var[:kept] + norm.eps).sqrt()
    expected = nn.functional.linear(hidden.relu(), head.weight[:, :kept], head.bias)
    assert torch.allclose(output, expected, atol=1e-6)
    assert norm.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_last_batch_of_one_image_trains_where_the_full_model_takes_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    gradaug = gradaug_hf.GradAug(model.train(), num_subnets=2, min_width=0.5, resolutions=[5])
    loss = gradaug.backward(torch.randn(1, 3, 16, 16), torch.tensor([0]))
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Unknown(nn.Module):
    """A network around an operation that the tracer does not know (a Fourier transform over the channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fft.rfft(self.before(x), dim=1).real
        x = nn.functional.pad(x, (0, 0, 0, 0, 0, 3))
        return self.head(self.hidden(self.inner(x)).mean((2, 3)))


def test_what_the_tracer_does_not_know_stays_whole_with_a_reason():
    model = gradaug_hf.make_slimmable(Unknown(), input_size=16)
    report = gradaug_hf.slicing_report(model)
    assert "_fft_r2c" in report.refused["before"]
    assert 0 < report.sliced_macs < 1
    assert gradaug_hf.extract_subnet(model, 0.5).inner.weight.shape == (4, 8, 3, 3)


class Brittle(nn.Module):
    """A network that insists on the width of a layer in plain Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.shape[1] != 8:
            raise RuntimeError("eight channels, please")
        return self.head(self.second(x).mean((2, 3)))


def test_a_unit_that_does_not_run_narrower_is_found_and_stays_whole():
    model = gradaug_hf.make_slimmable(Brittle(), input_size=8)
    report = gradaug_hf.slicing_report(model)
    assert [unit.size for unit in report.units] == [16]
    assert "eight channels, please" in report.refused["first"]
    assert output_at(model, 0.5, torch.randn(2, 3, 8, 8)).shape == (2, 5)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.norm(self.conv(x)).sum().item())


def test_a_network_that_cannot_be_traced_is_not_sliced_and_says_why():
    model = gradaug_hf.make_slimmable(Broken(), input_size=8).train()
    report = gradaug_hf.slicing_report(model)
    assert report.sliced_macs == report.sliced_params == 0
    assert "does not run on the meta device" in next(iter(report.refused.values()))
    with subnet_pass(model, 0.5):
        model(torch.randn(2, 3, 8, 8))
    assert model.norm.num_batches_tracked == 0


class KeepsItsGains(nn.Module):
    """Keeps in eval mode what it made of a parameter, as several networks of timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.gains = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 5, bias=False)
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode and self.kept:
            self.kept = {}
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            gains = self.gains.exp()
        else:
            if "gains" not in self.kept:
                self.kept["gains"] = self.gains.exp()
            gains = self.kept["gains"]
        return self.head(self.conv(x).mean((2, 3)) * gains)


@torch.no_grad()
def test_what_a_network_keeps_in_eval_mode_is_kept_for_one_width_at_a_time():
    model = gradaug_hf.make_slimmable(KeepsItsGains(), input_size=4)
    x = torch.randn(2, 3, 4, 4)
    weights = model.state_dict()

    def expected(kept: int) -> torch.Tensor:
        hidden = nn.functional.conv2d(x, weights["conv.weight"][:kept], weights["conv.bias"][:kept]).mean((2, 3))
        return nn.functional.linear(hidden * weights["gains"][:kept].exp(), weights["head.weight"][:, :kept])

    for _ in range(2):
        model.eval()
        for width, kept in ((0.5, 4), (0.75, 6), (1.0, 8), (0.5, 4)):
            with gradaug_hf.at_width(model, width):
                assert torch.allclose(model(x), expected(kept)), width
            assert torch.allclose(gradaug_hf.extract_subnet(model, width)(x), expected(kept)), width
        model.train()
        weights["gains"].add_(1)

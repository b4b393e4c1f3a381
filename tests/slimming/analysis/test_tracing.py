import pytest
import torch
from torch import nn

import gradaug_hf
from gradaug_hf.slimming import register_layer
from gradaug_hf.slimming.analysis.tracing import LAYER_HANDLERS


class Spectral(nn.Module):
    """A layer of a user: a Fourier transform, which the tracer does not follow, scaled for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft2(x).abs()
        return spectrum.view(len(x), self.channels, -1).mean(2) * self.gain


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), Spectral(8), nn.Linear(8, 5))


@pytest.fixture
def handled():
    @register_layer(Spectral)
    def tie_spectral(trace, layer, x, out):
        batch, channels, *_ = trace.axes(x)
        trace.tie(channels, trace.axes(layer.gain)[0])
        trace.bind(layer, "channels", channels)
        trace.set_axes(out, (batch, channels))

    yield
    del LAYER_HANDLERS[Spectral]


def test_without_a_handler_the_layer_keeps_its_channels_whole():
    report = gradaug_hf.slicing_report(gradaug_hf.make_slimmable(network(), input_size=8))
    assert report.sliced_macs == 0
    assert "_fft_c2c is not known" in report.refused["0"]


def test_a_registered_handler_slices_through_a_layer_of_the_users_own(handled):
    model = gradaug_hf.make_slimmable(network(), input_size=8)
    assert gradaug_hf.slicing_report(model).sliced_macs == 1
    x = torch.randn(2, 3, 8, 8)
    conv, spectral, head = network()
    hidden = nn.functional.conv2d(x, conv.weight[:4], conv.bias[:4])
    hidden = torch.fft.fft2(hidden).abs().mean((2, 3)) * spectral.gain[:4]
    expected = nn.functional.linear(hidden, head.weight[:, :4], head.bias)
    with gradaug_hf.at_width(model, 0.5):
        assert torch.allclose(model(x), expected, rtol=1e-5)
    assert torch.allclose(gradaug_hf.extract_subnet(model, 0.5)(x), expected, rtol=1e-5)


class Twice(nn.Module):
    """A layer of a user with such a layer inside, and a transform behind it that the tracer does not follow either."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = Spectral(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(self.spectral(x), dim=0).abs()


def test_nothing_in_a_layer_with_a_handler_is_looked_into_behind_another_such_layer(handled):
    @register_layer(Twice)
    def tie_twice(trace, layer, x, out):
        trace.set_axes(out, trace.axes(x)[:2])

    model = gradaug_hf.make_slimmable(nn.Sequential(nn.Conv2d(3, 8, 3), Twice(), nn.Linear(8, 5)), input_size=8)
    del LAYER_HANDLERS[Twice]
    assert gradaug_hf.slicing_report(model).sliced_macs == 1


def test_a_handler_that_is_wrong_is_caught_by_the_proof():
    @register_layer(Spectral)
    def forgets_the_gain(trace, layer, x, out):
        batch, channels, *_ = trace.axes(x)
        trace.set_axes(out, (batch, channels))

    model = gradaug_hf.make_slimmable(network(), input_size=8)
    del LAYER_HANDLERS[Spectral]
    assert gradaug_hf.slicing_report(model).sliced_macs == 0
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_what_is_no_layer_class_is_refused():
    with pytest.raises(TypeError, match="subclass of torch.nn.Module"):
        register_layer("Spectral")

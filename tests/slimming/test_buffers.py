"""No buffer of a model differs after a sub-network's pass, whatever writes to it."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gradaug_hf.objective.objective import GradAug
from gradaug_hf.slimming import at_width, extract_subnet, make_slimmable, register_layer, slicing_report, subnet_pass
from gradaug_hf.slimming.analysis.tracing import LAYER_HANDLERS

CHANNELS = 8


class Layer(nn.Module):
    """A layer with a running mean of its channels and a counter, which it adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.rand(CHANNELS))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(x.mean((0, 2, 3)))
        return x + self.ema.view(1, -1, 1, 1)


class Assigns(Layer):
    def write(self, mean: Tensor) -> None:
        self.ema = 0.9 * self.ema + 0.1 * mean
        self.count += 1


class InPlace(Layer):
    def write(self, mean: Tensor) -> None:
        self.ema.lerp_(mean, 0.1)
        self.count.add_(1)


class ThroughData(Layer):
    def write(self, mean: Tensor) -> None:
        self.ema.data.copy_(0.9 * self.ema + 0.1 * mean)
        self.count.data += 1


class ThroughAView(Layer):
    def write(self, mean: Tensor) -> None:
        self.ema.view(1, -1)[0].lerp_(mean, 0.1)
        self.count[...] = self.count + 1


class AsKeywordArgument(Layer):
    def write(self, mean: Tensor) -> None:
        torch.add(self.ema, mean, alpha=0.1, out=self.ema)
        torch.add(self.count, 1, out=self.count)


class OnlySometimes(Layer):
    """Writes from its third pass on, which a trace does not see."""

    passes = 0

    def write(self, mean: Tensor) -> None:
        self.passes += 1
        if self.passes > 2:
            self.ema.mul_(0.5)
            self.count = self.count + 1


class AroundItsAttributes(Layer):
    def write(self, mean: Tensor) -> None:
        for buffer in self.buffers():
            buffer.add_(1)


class BatchNormByHand(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.ema, torch.ones_like(self.ema), training=self.training)


class CountsAlways(nn.BatchNorm2d):
    """A batch norm that pays no heed to `track_running_stats`."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
            self.num_batches_tracked += 1
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Untraceable(InPlace):
    def write(self, mean: Tensor) -> None:
        super().write(mean * float(mean.sum().item() < 1e9))


LAYERS = {
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
    "batch norm that counts always": lambda: CountsAlways(CHANNELS),
    **{
        cls.__name__: cls
        for cls in (Assigns, InPlace, ThroughData, ThroughAView, AsKeywordArgument, OnlySometimes)
        + (AroundItsAttributes, BatchNormByHand, Untraceable)
    },
}


def network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, CHANNELS, 3), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 5)
    return nn.Sequential(*layers)


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def state_of(model: nn.Module) -> dict[str, tuple[Tensor, int, Tensor]]:
    return {name: (buffer, buffer.data_ptr(), buffer.clone()) for name, buffer in model.named_buffers()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[Tensor, int, Tensor]]) -> None:
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, pointer, values) in before.items():
        assert after[name] is buffer and buffer.data_ptr() == pointer, name
        assert torch.equal(buffer, values), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_subnet_passes_leave_every_buffer_as_it_is(kind, training):
    model = make_slimmable(network(LAYERS[kind]()), input_size=8).train(training)
    for _ in range(2):
        model(images())
        before = state_of(model)
        for width in (1.0, 0.9, 0.5):
            with subnet_pass(model, width):
                model(images()).sum().backward()
                model(images())
            assert_untouched(model, before)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_full_model_goes_on_writing_its_buffers_as_without_subnetworks(kind):
    plain = network(LAYERS[kind]()).train()
    model = make_slimmable(copy.deepcopy(plain), input_size=8)
    for seed in range(4):
        expected = plain(images(seed))
        if kind == "OnlySometimes":  # it counts in Python, the passes of sub-networks too
            plain[1].passes += 1
        assert torch.equal(model(images(seed)), expected)
        with subnet_pass(model, 0.5):
            model(images(seed))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(model.buffers(), network(LAYERS[kind]()).buffers(), strict=True))


@pytest.mark.parametrize("kind", ["instance norm", "Assigns", "InPlace", "ThroughAView"])
def test_a_layer_that_writes_buffers_is_sliced_and_within_a_pass_reads_what_it_wrote(kind):
    model = make_slimmable(network(LAYERS[kind]()), input_size=8).train()
    assert slicing_report(model).sliced_macs == 1
    narrow = extract_subnet(model, 0.5).train()
    with subnet_pass(model, 0.5):
        for seed in range(3):
            assert torch.equal(model(images(seed)), narrow(images(seed)))


def test_a_layer_with_a_handler_of_its_own_is_watched_too():
    @register_layer(InPlace)
    def tie_channels(trace, layer, x, out):
        trace.tie(trace.axes(x)[1], trace.axes(layer.ema)[0])
        trace.set_axes(out, trace.axes(x))

    try:
        model = make_slimmable(network(InPlace()), input_size=8).train()
    finally:
        del LAYER_HANDLERS[InPlace]
    assert slicing_report(model).sliced_macs == 1
    before = state_of(model)
    with subnet_pass(model, 0.5):
        model(images())
    assert_untouched(model, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_buffers_of_their_own(duplicate):
    model = make_slimmable(network(Assigns()), input_size=8).train()
    with subnet_pass(model, 0.5):
        model(images())
        copied = duplicate(model)
    before, other = state_of(model), state_of(copied)
    with subnet_pass(copied, 0.5):
        copied(images())
    assert_untouched(copied, other)
    assert_untouched(model, before)


def test_values_that_are_loaded_or_cast_while_a_width_is_set_are_read():
    model = make_slimmable(network(Assigns()), input_size=8).eval()
    with at_width(model, 0.5):
        model(images())
        model[1].ema.fill_(float("nan"))  # the sub-network's own
        state = {**model.state_dict(), "1.ema": torch.ones(CHANNELS)}
        model.load_state_dict(state)
        assert torch.equal(model[1].ema, torch.ones(4))
        model.double()
        assert model(images().double()).dtype == torch.float64


def test_buffers_stay_when_layers_are_computed_anew_in_the_backward():
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](checkpoint(self[0], x, use_reentrant=False))

    inner = network(Assigns())
    model = make_slimmable(Checkpointed(inner[:3], inner[3:]), input_size=8).train()
    gradaug = GradAug(model, num_subnets=2, min_width=0.5, resolutions=[8])
    gradaug.backward(images(), torch.zeros(4, dtype=torch.long))
    assert model[0][1].count == 2  # the full model's pass, and the one of its backward


def test_buffers_stay_in_a_model_that_is_wrapped_for_several_processes(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(make_slimmable(network(Assigns()), input_size=8).train())
        wrapped(images()).sum().backward()
        before = state_of(wrapped)
        with subnet_pass(wrapped, 0.5):
            wrapped(images()).sum().backward()
    finally:
        dist.destroy_process_group()
    assert_untouched(wrapped, before)


def test_models_with_batch_norm_alone_are_not_copied_from():
    model = make_slimmable(network(nn.BatchNorm2d(CHANNELS)), input_size=8).train()
    with subnet_pass(model, 0.5):
        model(images())
        assert not model._width_state.guard.saved
        assert not any(buffers for buffers in model._width_state.own_buffers)


def test_a_buffer_is_copied_once_until_the_full_model_writes_to_it():
    model = make_slimmable(network(Layer()), input_size=8)
    model[1].write = lambda mean: None
    copies = []
    for _ in range(3):
        with subnet_pass(model, 0.5):
            copies.append([saved.value.data_ptr() for saved in model._width_state.guard.saved.values()])
    assert copies[0] and copies[0] == copies[1] == copies[2]


def test_compiled_subnetworks_leave_buffers_as_they_are():
    model = make_slimmable(network(Assigns()), input_size=8).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    reference = copy.deepcopy(model)
    for seed in range(3):
        assert torch.equal(compiled(images(seed)), reference(images(seed)))
        before = state_of(model)
        with subnet_pass(model, 0.5), subnet_pass(reference, 0.5):
            assert torch.allclose(compiled(images(seed)), reference(images(seed)))
        assert_untouched(model, before)
    assert len(graphs) <= 4
    torch._dynamo.reset()

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from gradaug_hf.objective.objective import GradAug
from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.slimming import at_width, make_slimmable
from gradaug_hf.trainer.compilation import number_of_graphs
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.utils.compat import compiles_stale_graphs, recompile_limits
from tests.helpers.residual_network import make_network

CPU = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
compiles = pytest.mark.skipif(compiles_stale_graphs(), reason="torch_compile is refused with this torch and Python")


@pytest.fixture(autouse=True)
def own_graphs():
    torch._dynamo.reset()
    counters.clear()
    limit, accumulated_limit, _ = recompile_limits()
    with torch._dynamo.config.patch({limit: 8, accumulated_limit: 256}):
        yield
    torch._dynamo.reset()


class EachInTurn(SubnetSampler):
    """Two sub-networks a step, so that all are met soon: each width with each resolution."""

    def sample(self, step: int) -> list[Subnet]:
        widths = [self.min_width, (self.min_width + self.max_width) / 2, self.max_width]
        every = [Subnet(width, side) for width in widths for side in self.resolutions]
        return [every[2 * step % len(every)], every[(2 * step + 1) % len(every)]]


def rows(count: int) -> list[dict]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return make_network().float()


def trainer_of(tmp_path, sampler: SubnetSampler | None = None, **settings) -> GradAugTrainer:
    settings = {"resolutions": [16, 12, 8], "min_width": 0.5, "per_device_train_batch_size": 4, **CPU, **settings}
    settings.setdefault("per_device_eval_batch_size", 4)
    args = GradAugConfig(str(tmp_path), **settings)
    return GradAugTrainer(network(), args, train_dataset=rows(8), eval_dataset=rows(8), subnet_sampler=sampler)


def each_in_turn() -> SubnetSampler:
    return EachInTurn(2, 0.5, resolutions=[16, 12, 8], width_levels=3)


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


@compiles
def test_each_width_and_resolution_is_one_graph_without_a_break(tmp_path):
    settings = {"max_steps": 5, "dataloader_drop_last": True, "logging_steps": 5}
    trainer = trainer_of(tmp_path, each_in_turn(), **settings, **COMPILED)
    trainer.train()
    # The full network, and 3 widths x 3 resolutions: more than the 8 graphs that torch.compile allows by itself.
    assert counters["stats"]["unique_graphs"] == 1 + 9
    assert counters["graph_break"] == {}
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 10  # none is compiled again
    trainer.evaluate()  # of the network itself, or with older versions of the compiled one
    assert counters["stats"]["unique_graphs"] <= 11

    plain = trainer_of(tmp_path, each_in_turn(), **settings)
    plain.train()
    again = trainer_of(tmp_path, each_in_turn(), **settings, **COMPILED)
    again.train()
    for found, expected in zip(weights(again.model), weights(plain.model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@compiles
def test_what_would_run_uncompiled_beyond_the_limit_is_an_error(tmp_path):
    class Continuous:
        resolutions = None

        def sample(self, step: int) -> list[Subnet]:
            return [Subnet(0.5 + step / 40)]

    trainer = trainer_of(tmp_path, Continuous(), max_steps=12, **COMPILED)
    with pytest.raises(FailOnRecompileLimitHit):
        trainer.train()
    assert trainer.state.global_step == 7  # with the full network's graph, 8 of them


@compiles
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "width_levels is None, .* set width_levels=3"),
        ({"subnet_mode": "depth"}, "subnet_mode 'depth' each drops other blocks"),
        ({"subnet_mode": "tokens"}, "subnet_mode 'tokens' each sees another share of the patches"),
    ],
)
def test_sub_networks_without_number_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **settings, **COMPILED)


def test_graphs_that_are_taken_for_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gradaug_hf.trainer.compilation.compiles_stale_graphs", lambda: True)
    with pytest.raises(
        ValueError, match=r"torch_compile with torch .* on Python 3\.13\.0 runs graphs of other widths"
    ):
        trainer_of(tmp_path, width_levels=3, **COMPILED)


@compiles
@pytest.mark.parametrize("settings", [{"num_subnets": 1}, {"max_width": 0.5}, {"num_subnets": 0}])
def test_a_single_width_needs_no_levels(tmp_path, settings):
    trainer_of(tmp_path, **settings, **COMPILED)


@compiles
def test_a_compiled_network_of_a_loop_of_ones_own_takes_its_widths(tmp_path):
    model = make_slimmable(network(), input_size=16)
    twin = make_slimmable(network(), input_size=16)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for each in (torch.compile(model, backend="eager", dynamic=False), twin):
        GradAug(each, min_width=0.5, width_levels=2, resolutions=[16, 12]).backward(images, labels, step=3)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert counters["graph_break"] == {}


@compiles
def test_training_and_evaluation_at_each_width_are_graphs_of_their_own_and_right():
    model = make_slimmable(network(), input_size=16)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    images = torch.randn(2, 3, 16, 16)
    with torch._dynamo.config.patch({recompile_limits()[-1]: True}), torch.no_grad():
        for _ in range(2):
            for training in (True, False):
                model.train(training)
                for width in (1.0, 0.5):
                    for side in (16, 12):
                        with at_width(model, width):
                            found, expected = (each(images[..., :side, :side]) for each in (compiled, model))
                        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert counters["stats"]["unique_graphs"] == 2 * 2 * 2
    assert counters["graph_break"] == {}


@compiles
def test_evaluation_without_training_is_compiled(tmp_path):
    trainer_of(tmp_path, each_in_turn(), **COMPILED).evaluate()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("images, training", [(1.0, 1 + 3 * 2), ("split", 1 + 3 * 2 * 2)])
def test_parts_of_two_sizes_have_graphs_of_their_own(tmp_path, images, training):
    args = GradAugConfig(str(tmp_path), dataloader_drop_last=True, **CPU)
    sampler = SubnetSampler(width_levels=3, resolutions=[16, 12], subnet_images=images)
    assert number_of_graphs(sampler, args) == training + 1

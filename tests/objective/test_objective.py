from collections.abc import Callable

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradaug_hf.objective.objective import GradAug
from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.slimming import make_slimmable
from tests.helpers.residual_network import (
    CLASSES,
    gradients_by_hand,
    make_network,
    narrow_forward,
    objective_by_hand,
    resize_by_hand,
)

SETTINGS = {"num_subnets": 3, "min_width": 0.5, "resolutions": [16, 12, 9], "seed": 3}
STEP = 4


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 4, 2, 2, 1, 3])


def sampled(gradaug: GradAug, step: int = STEP) -> list[tuple[float, int]]:
    return [(subnet.width, subnet.resolution) for subnet in gradaug.sampler.sample(step)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_reference_at_full_width_is_the_network_itself(images):
    network = make_network().train()
    p = dict(network.named_parameters())
    torch.testing.assert_close(network(images), narrow_forward(p, images, 1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_and_loss_of_a_step_are_those_of_the_formula(images, labels, soft):
    if soft:
        labels = torch.softmax(torch.randn(6, CLASSES, dtype=torch.float64), dim=1)
    network = make_network()
    gradaug = GradAug(network, kl_weight=0.7, **SETTINGS)
    assert len({width for width, _ in sampled(gradaug)}) == 3
    expected_loss, expected = gradients_by_hand(network, images, labels, sampled(gradaug), kl_weight=0.7)
    loss = gradaug.backward(images, labels, step=STEP)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-10)
    assert not loss.requires_grad
    assert_close(gradients(network), expected)


def test_subnetworks_may_learn_the_labels_instead(images, labels):
    network = make_network()
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in network.named_parameters()}
    gradaug = GradAug(network, subnet_target="label", kl_weight=0.7, **SETTINGS)
    expected = objective_by_hand(p, images, labels, [])[0]
    for width, side in sampled(gradaug):
        logits = narrow_forward(p, resize_by_hand(images, side), width)
        chosen = logits[range(len(labels)), labels]
        expected = expected + 0.7 * (logits.exp().sum(dim=1).log() - chosen).mean()
    expected.backward()
    assert gradaug.backward(images, labels, step=STEP).item() == pytest.approx(expected.item(), abs=1e-10)
    assert_close(gradients(network), {name: parameter.grad for name, parameter in p.items()})


def test_one_joint_backward_gives_the_gradients_of_pass_by_pass(images, labels):
    one, other = make_network(), make_network()
    loss = GradAug(one, **SETTINGS).loss(images, labels, step=STEP)
    loss.backward()
    value = GradAug(other, **SETTINGS).backward(images, labels, step=STEP)
    assert loss.item() == pytest.approx(value.item(), abs=1e-12)
    assert_close(gradients(one), gradients(other), tolerance=1e-12)


def test_a_step_leaves_the_batch_norm_buffers_of_a_plain_forward(images, labels):
    network, plain = make_network(), make_network()
    gradaug = GradAug(network, num_subnets=3, min_width=0.5, resolutions=[16])
    subnets = [Subnet(1.0, 12), Subnet(0.9, 16), Subnet(0.5, 9)]
    for p in gradaug.passes(images, labels, subnets):
        p.loss.backward()
    plain(images)
    buffers = dict(network.named_buffers())
    assert len(buffers) == 21
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_only_one_graph_is_alive_at_a_time(images, labels):
    network = make_network()
    alive, most = 0, 0

    def pack(tensor):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return Saved(tensor)

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

        def __del__(self):
            nonlocal alive
            alive -= 1

    def peak(run) -> int:
        nonlocal alive, most
        alive, most = 0, 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            run()
        return most

    plain = peak(lambda: nn.functional.cross_entropy(network(images), labels).backward())
    gradaug = GradAug(network, **SETTINGS)
    assert plain <= peak(lambda: gradaug.backward(images, labels)) <= plain + 20
    assert peak(lambda: gradaug.loss(images, labels).backward()) > 3 * plain


def test_each_pass_uses_what_was_sampled_and_the_widths_come_back(images, labels):
    network = make_network()
    gradaug = GradAug(network, **SETTINGS)
    widths = []
    network.fc.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    subnets = gradaug.sampler.sample(STEP)
    assert [p.subnet for p in gradaug.passes(images, labels, subnets)] == [None, *subnets]
    assert widths == [12, *(int(12 * subnet.width + 0.5) for subnet in subnets)]
    network(images)
    assert widths[-1] == 12


def test_a_subnetwork_keeps_its_width_until_the_next_pass_is_asked_for(images, labels):
    network = make_network()
    passes = GradAug(network, **SETTINGS).passes(images, labels, [Subnet(0.5, 16)])
    next(passes)
    next(passes)
    assert network.fc.weight.shape[1] == 6
    passes.close()
    assert network.fc.weight.shape[1] == 12


def test_the_full_network_comes_back_after_an_exception(images, labels):
    network = make_network()
    gradaug = GradAug(network, **SETTINGS)

    def fail_at_the_third(loss, calls=[]):  # noqa: B006
        calls.append(loss)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        gradaug.backward(images, labels, backward=fail_at_the_third)
    assert network.fc.weight.shape[1] == 12
    assert interrupt.tb  # while the frames of the failed call are still alive


def test_without_a_step_the_calls_are_counted(images, labels):
    gradaug = GradAug(make_network(), **SETTINGS)
    other = GradAug(make_network(), **SETTINGS)
    for step in (0, 1, 2):
        assert gradaug.loss(images, labels).item() == other.loss(images, labels, step=step).item()


def test_a_checkpointed_network_has_the_same_gradients(images, labels):
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.network, self.reentrant = make_network(), reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.relu(self.network.bn(self.network.stem(x)))
            for block in (self.network.block1, self.network.block2, self.network.block3):
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
            return self.network.fc(x.mean(dim=(2, 3)))

    expected = make_network()
    GradAug(expected, **SETTINGS).backward(images, labels, step=STEP)
    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        make_slimmable(model.network, input_size=16)
        GradAug(model, **SETTINGS).backward(images, labels, step=STEP)
        assert_close(gradients(model.network), gradients(expected), tolerance=1e-12)


def test_default_resolutions_follow_the_first_batch(images, labels):
    gradaug = GradAug(make_network(), num_subnets=2)
    gradaug.loss(images[..., :14, :14], labels)
    assert gradaug.sampler.resolutions == (14, 12, 10, 8)
    gradaug.loss(images, labels)
    assert gradaug.sampler.resolutions == (14, 12, 10, 8)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_default_resolutions_are_those_near_that_the_model_takes(labels, wrap: Callable[[nn.Module], nn.Module]):
    transformer = timm.create_model("test_vit", num_classes=5)  # in patches of 16 pixels
    gradaug = GradAug(wrap(transformer), num_subnets=2)
    with torch.compiler.set_stance("force_eager"):
        loss = gradaug.backward(torch.randn(len(labels), 3, 112, 112, generator=torch.Generator()), labels)
    assert gradaug.sampler.resolutions == (112, 96, 80, 64)
    assert loss.isfinite()


def test_a_model_that_takes_one_size_alone_warns_that_sub_networks_see_no_smaller_images(labels):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    gradaug = GradAug(timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape), num_subnets=1)
    with pytest.warns(UserWarning, match="takes images of 32 pixels alone, so its sub-networks see no smaller ones"):
        gradaug.backward(torch.randn(len(labels), 3, 32, 32), labels)
    assert gradaug.sampler.resolutions == (32,)


class Changing(nn.Module):
    """A network behind a change of its images."""

    num_classes = 5

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.change = make_network(), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(self.change(x))


def test_trying_a_model_leaves_the_random_numbers_of_its_training_as_they_are(images, labels):
    losses = []
    for resolutions in (None, [16, 14, 11, 9]):
        torch.manual_seed(0)
        noisy = Changing(lambda x: x * (1 + torch.rand(())))
        losses.append(GradAug(noisy, num_subnets=2, resolutions=resolutions).loss(images, labels))
    assert losses[0] == losses[1]


def test_a_model_that_cannot_be_tried_keeps_the_papers_resolutions(images, labels):
    # The meta device has no values that could be read.
    gradaug = GradAug(Changing(lambda x: x / max(x.abs().max().item(), 1.0)), num_subnets=1)
    gradaug.backward(images, labels)
    assert gradaug.sampler.resolutions == (16, 14, 11, 9)


def test_no_subnetworks_leave_the_plain_cross_entropy(images, labels):
    network = make_network()
    loss = GradAug(network, num_subnets=0, label_smoothing=0.1).loss(images, labels)
    expected = nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_between_the_steps_of_the_interval_the_full_network_learns_alone(images, labels):
    network = make_network()
    gradaug = GradAug(network, subnet_interval=2, **SETTINGS)
    always = GradAug(make_network(), **SETTINGS)
    for step in range(4):
        network.zero_grad()
        subnets = [] if step % 2 else sampled(always, step)
        expected_loss, expected = gradients_by_hand(network, images, labels, subnets)
        assert gradaug.backward(images, labels).item() == pytest.approx(expected_loss, abs=1e-10)
        assert_close(gradients(network), expected)


def test_a_transform_is_seen_by_the_subnetworks_only(images, labels):
    network = make_network()
    gradaug = GradAug(network, transform=torch.zeros_like, **SETTINGS)
    full, subnet = list(gradaug.passes(images, labels, [Subnet(1.0, 16)]))
    assert torch.equal(full.logits, network(images).detach())
    assert torch.equal(subnet.logits, network(torch.zeros_like(images)).detach())


def test_bad_input_is_named(images, labels):
    gradaug = GradAug(make_network(), **SETTINGS)
    with pytest.raises(ValueError, match="label 5 is out of range"):
        gradaug.backward(images, labels + 1)
    with pytest.raises(ValueError, match=r"images have shape \(3, 16, 16\)"):
        gradaug.backward(images[0], labels[:1])
    with pytest.raises(ValueError, match=r"logits of shape \(6, 5\); expected \(5, classes\)"):
        gradaug.backward(images, labels[:5])
    with pytest.raises(ValueError, match="kl_weight is -1"):
        GradAug(make_network(), kl_weight=-1)
    with pytest.raises(ValueError, match="subnet_target is 'hard'; it must be one of 'soft', 'label'"):
        GradAug(make_network(), subnet_target="hard")
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        GradAug(make_network(), label_smoothing=2)


@pytest.fixture
def two_processes(tmp_path, monkeypatch):
    """A process group that says it has two processes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield lambda: monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    dist.destroy_process_group()


def test_a_model_that_is_not_wrapped_in_several_processes_is_warned_about(two_processes, recwarn):
    model = make_network().float()
    wrapped = DistributedDataParallel(model)
    GradAug(model, resolutions=[16])
    two_processes()
    GradAug(wrapped, resolutions=[16])
    GradAug(torch.compile(wrapped), resolutions=[16])
    assert not any(warning.category is UserWarning for warning in recwarn)
    with pytest.warns(UserWarning, match="2 processes train, but this .* is not wrapped.*DistributedDataParallel"):
        GradAug(wrapped.module, resolutions=[16])

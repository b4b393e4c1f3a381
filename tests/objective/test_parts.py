"""Sub-networks that see a part of the batch, and a weight of their losses that rises."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from gradaug_hf import GradAug, Subnet, SubnetSampler, make_slimmable
from tests.helpers.residual_network import CLASSES, gradients_by_hand, make_network

SETTINGS = {"num_subnets": 3, "min_width": 0.5, "resolutions": [16, 12, 9], "seed": 3}
BLOCKS = ["block1", "block2", "block3"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(7, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 4, 2, 2, 1, 3, 1])


@dataclass(frozen=True)
class Chosen:
    """A part of chosen images."""

    chosen: tuple[int, ...]

    def indices(self, batch_size: int) -> list[int]:
        return list(self.chosen)


def parts(batch_size: int, subnet_images, step: int = 0, num_subnets: int = 3) -> list[list[int]]:
    sampler = SubnetSampler(num_subnets, subnet_images=subnet_images)
    return [subnet.part.indices(batch_size) for subnet in sampler.sample(step)]


# ---- which images ----


@pytest.mark.parametrize("batch_size, sizes", [(6, [2, 2, 2]), (25, [8, 9, 8]), (64, [21, 22, 21])])
def test_split_parts_are_disjoint_and_together_the_batch(batch_size, sizes):
    found = parts(batch_size, "split")
    assert [len(part) for part in found] == sizes
    assert sorted(sum(found, [])) == list(range(batch_size))


@pytest.mark.parametrize("share, sizes", [(0.5, [5, 5, 5]), (0.25, [3, 2, 3]), (0.9, [9, 9, 9])])
def test_a_share_gives_each_subnetwork_as_many_images_and_each_image_nearly_as_many_subnetworks(share, sizes):
    found = parts(10, share)
    assert [len(part) for part in found] == sizes
    assert all(len(set(part)) == len(part) for part in found)
    seen = Counter(sum(found, []))
    times = [seen[image] for image in range(10)]
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("batch_size, size", [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2)])
def test_a_part_has_two_images_where_the_batch_does(batch_size, size):
    for part in parts(batch_size, "split"):
        assert len(part) == len(set(part)) == size
        assert set(part) <= set(range(batch_size))


def test_every_subnetwork_gets_every_image_equally_often():
    counts = [Counter() for _ in range(3)]
    for step in range(3000):
        for count, part in zip(counts, parts(6, "split", step), strict=True):
            count.update(part)
    for count in counts:
        assert all(abs(count[image] - 1000) < 110 for image in range(6))  # the deviation is 26


def test_parts_are_a_function_of_seed_and_step_alone():
    first = SubnetSampler(**SETTINGS, subnet_images="split").sample(7)
    assert SubnetSampler(**SETTINGS, subnet_images="split").sample(7) == first
    assert SubnetSampler(**SETTINGS, subnet_images="split").sample(8)[0].part != first[0].part
    assert SubnetSampler(**{**SETTINGS, "seed": 4}, subnet_images="split").sample(7)[0].part != first[0].part


def test_subnetworks_are_those_of_the_whole_batch_but_for_their_part():
    whole, split = SubnetSampler(**SETTINGS), SubnetSampler(**SETTINGS, subnet_images="split")
    for step in range(5):
        assert [replace(subnet, part=None) for subnet in split.sample(step)] == whole.sample(step)


def test_one_subnetwork_splits_nothing():
    assert SubnetSampler(1, subnet_images="split").sample(0)[0].part is None


def test_a_share_may_be_text_as_on_a_command_line():
    assert SubnetSampler(subnet_images="0.5") == SubnetSampler(subnet_images=0.5)


@pytest.mark.parametrize("images", [0, 1.5, -0.1, float("nan"), "all", None, True])
def test_a_share_out_of_range_is_named(images):
    with pytest.raises(ValueError, match=rf"subnet_images is {images!r}; it must be 'split' or a share in \(0, 1\]"):
        SubnetSampler(subnet_images=images)


# ---- what they learn ----


@pytest.mark.parametrize("mode", ["width", "width+depth"])
@pytest.mark.parametrize("subnet_images", ["split", 0.4])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_are_those_of_the_formula_on_the_parts(images, labels, subnet_images, soft, mode):
    if soft:  # as Mixup and CutMix make them
        labels = torch.softmax(torch.randn(7, CLASSES, dtype=torch.float64), dim=1)
    network = make_network()
    own = {"subnet_images": subnet_images, "subnet_mode": mode, "min_survival": 0.3}
    gradaug = GradAug(network, kl_weight=0.7, **own, **SETTINGS)
    subnets = gradaug.sampler.sample(4)
    by_hand = [(s.width, s.resolution, *(BLOCKS[index] for index in s.dropped_blocks(3))) for s in subnets]
    seen = [subnet.part.indices(7) for subnet in subnets]
    expected_loss, expected = gradients_by_hand(network, images, labels, by_hand, 0.7, seen)
    with pytest.warns(UserWarning, match="images of a batch, and batch norm's statistics of fewer than 16 are noisy"):
        loss = gradaug.backward(images, labels, step=4)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-10)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10, msg=name)


def small_network() -> nn.Module:
    """A network whose output for an image does not depend on the other images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return make_slimmable(nn.Sequential(*layers).double(), input_size=16)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 3)])
@pytest.mark.parametrize("target", ["soft", "label"])
def test_the_mean_of_the_gradients_over_all_ways_to_split_is_the_published_one(images, labels, sizes, target):
    batch_size = sum(sizes)
    images, labels = images[:batch_size, :, :10, :10], labels[:batch_size]
    subnets = [Subnet(1.0, 10), Subnet(0.75, 8), Subnet(0.5, 9)][-len(sizes) :]
    network = small_network()
    gradaug = GradAug(network, subnet_target=target)

    def gradients(each: list[Subnet]) -> Tensor:
        network.zero_grad()
        for p in gradaug.passes(images, labels, each):
            p.loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    published = gradients(subnets)
    ways = list(_ways_to_split(range(batch_size), sizes))
    each = [gradients([replace(s, part=Chosen(part)) for s, part in zip(subnets, way, strict=True)]) for way in ways]
    torch.testing.assert_close(sum(each) / len(each), published, rtol=0, atol=1e-12)
    assert (each[0] - published).abs().max() > 1e-4


def _ways_to_split(items: Sequence[int], sizes: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    if not sizes:
        yield []
        return
    for part in combinations(items, sizes[0]):
        rest = [item for item in items if item not in part]
        yield from ([part, *others] for others in _ways_to_split(rest, sizes[1:]))


def test_inputs_of_each_image_follow_the_part_and_others_stay(images, labels):
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5).double()
            self.seen = []

        def forward(self, x, masks, names, flag, table):
            self.seen.append((masks, names, flag, table))
            return self.fc(x.mean(dim=(2, 3)))

    model = Asking()
    make_slimmable(model)
    inputs = {"masks": torch.arange(7), "names": list("abcdefg"), "flag": True, "table": torch.eye(3)}
    list(GradAug(model).passes(images, labels, [Subnet(part=Chosen((5, 2)))], **inputs))
    full, part = model.seen
    assert full[0].tolist() == list(range(7))
    assert (part[0].tolist(), part[1], part[2]) == ([5, 2], ["f", "c"], True)
    assert torch.equal(part[3], torch.eye(3))


def test_a_part_keeps_channels_last_memory(images, labels):
    seen = []
    network = make_network()
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = images.to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="a sub-network sees 3 of the 7 images"):
        list(GradAug(network).passes(images, labels, [Subnet(part=Chosen((5, 2, 0)))]))
    assert torch.equal(seen[1], images[[5, 2, 0]])
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def test_small_parts_are_warned_of_once_and_only_with_batch_norm(labels):
    images, labels = torch.randn(48, 3, 10, 10).double(), torch.zeros(48, dtype=torch.long)
    network = make_network()
    gradaug = GradAug(network, subnet_images="split", resolutions=[10])
    plain = GradAug(small_network(), subnet_images="split", resolutions=[10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradaug.loss(images, labels)  # parts of 16
        plain.loss(images[:9], labels[:9])
    with pytest.warns(UserWarning, match="a sub-network sees 15 of the 45 images") as caught:
        gradaug.loss(images[:45], labels[:45])
        gradaug.loss(images[:45], labels[:45])
    assert len(caught) == 1


# ---- a weight that rises ----


def test_the_weight_rises_linearly_from_zero_over_its_share_of_the_steps(images, labels):
    network = make_network()
    gradaug = GradAug(network, kl_weight=0.6, kl_warmup=0.5, total_steps=8, **SETTINGS)
    assert [gradaug.weight_at(step) for step in range(8)] == pytest.approx([0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6, 0.6])
    for step in (0, 1, 6):
        network.zero_grad()
        subnets = [(subnet.width, subnet.resolution) for subnet in gradaug.sampler.sample(step)]
        expected_loss, expected = gradients_by_hand(network, images, labels, subnets, gradaug.weight_at(step))
        assert gradaug.backward(images, labels, step=step).item() == pytest.approx(expected_loss, abs=1e-10)
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10, msg=name)


def test_calls_without_a_step_are_counted_for_the_weight_too(images, labels):
    gradaug, other = (GradAug(make_network(), kl_warmup=1, total_steps=4, **SETTINGS) for _ in range(2))
    for step in range(3):
        assert gradaug.loss(images, labels).item() == other.loss(images, labels, step=step).item()


def test_what_a_rising_weight_needs_is_named(images, labels):
    with pytest.raises(ValueError, match=r"kl_warmup is 1.5; it must lie in \[0, 1\]"):
        GradAug(make_network(), kl_warmup=1.5)
    for steps in (None, 0, -1):
        with pytest.raises(ValueError, match=f"total_steps is {steps}; with kl_warmup it must be at least 1"):
            GradAug(make_network(), kl_warmup=0.5, total_steps=steps)
    gradaug = GradAug(make_network(), kl_warmup=0.5, total_steps=4)
    with pytest.raises(ValueError, match="step is None; with kl_warmup"):
        next(gradaug.passes(images, labels, []))

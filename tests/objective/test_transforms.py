import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.objective.transforms import RandomQuarterTurn, resize, transform_for_subnet
from tests.helpers.residual_network import resize_by_hand


@pytest.mark.parametrize("side", [5, 12, 20])
def test_resize_interpolates_bilinearly_with_aligned_corners(side: int):
    images = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    torch.testing.assert_close(resize(images, side), resize_by_hand(images, side), rtol=0, atol=1e-12)


def test_resize_keeps_the_shape_of_images_that_are_not_square():
    assert resize(torch.zeros(1, 3, 20, 30), 10).shape == (1, 3, 10, 15)


def test_images_of_the_right_size_are_returned_as_they_are():
    images = torch.randn(1, 3, 16, 24)
    assert resize(images, 16) is images


def test_resize_passes_gradients_on():
    images = torch.randn(1, 1, 8, 8, requires_grad=True)
    resize(images, 5).sum().backward()
    assert images.grad.sum().item() == pytest.approx(25, abs=1e-4)


def test_a_subnetwork_sees_the_transform_then_its_resolution():
    images = torch.randn(2, 3, 12, 12)
    seen = transform_for_subnet(images, Subnet(0.9, 6), lambda x: x.rot90(dims=(2, 3)))
    assert torch.equal(seen, resize(images.rot90(dims=(2, 3)), 6))
    assert transform_for_subnet(images, Subnet(0.9)) is images


def test_quarter_turns_are_equally_likely_and_turn_all_images_alike():
    images = torch.randn(3, 2, 4, 4)
    turned = [images] + [torch.stack([turn_by_hand(image) for image in images])]
    while len(turned) < 4:
        turned.append(torch.stack([turn_by_hand(image) for image in turned[-1]]))
    counts = [0] * 4
    for seed in range(400):
        seen = transform_for_subnet(images, Subnet(seed=seed), RandomQuarterTurn())
        counts[next(turns for turns in range(4) if torch.equal(seen, turned[turns]))] += 1
    assert counts == pytest.approx([100] * 4, abs=35)  # the deviation is 8.7


def turn_by_hand(image: Tensor) -> Tensor:
    """A quarter turn counter-clockwise: the last column becomes the first row."""
    return torch.stack([image[:, :, column] for column in reversed(range(image.shape[2]))], dim=1)


@pytest.mark.parametrize(
    "transform",
    [
        RandomQuarterTurn(),
        v2.RandomAffine(degrees=30),
        v2.RandomErasing(p=1.0),
        v2.Compose([v2.ColorJitter(brightness=0.5), v2.RandomHorizontalFlip()]),
        v2.RandomChoice([v2.RandomVerticalFlip(), RandomQuarterTurn()]),
        lambda images: images * random.random(),
        lambda images: images * float(np.random.rand()),
    ],
    ids=["turn", "affine", "erasing", "compose", "choice", "random", "numpy"],
)
def test_any_transform_samples_from_the_subnetworks_seed_alone(transform):
    images = torch.rand(2, 3, 8, 8)
    first = []
    for salt in (1, 2):
        random.seed(salt)
        np.random.seed(salt)
        torch.manual_seed(salt)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        first.append([transform_for_subnet(images, Subnet(seed=seed), transform) for seed in range(8)])
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(torch.equal(one, other) for one, other in zip(*first, strict=True))
    assert any(not torch.equal(seen, first[0][0]) for seen in first[0])


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_named(images: Tensor):
    with pytest.raises(ValueError, match="images have shape .* expected floating point"):
        resize(images, 4)

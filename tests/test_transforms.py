import pytest
import torch
from torch import Tensor

from gradaug_hf.subnets import Subnet
from gradaug_hf.transforms import resize, transform_for_subnet
from tests.residual_network import resize_by_hand


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


def test_random_numbers_of_a_transform_come_from_the_subnetworks_seed_alone():
    def noisy(images: Tensor) -> Tensor:
        return images + torch.randn_like(images)

    images = torch.zeros(1, 1, 4, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = transform_for_subnet(images, Subnet(seed=3), noisy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(transform_for_subnet(images, Subnet(seed=3), noisy), first)
    assert not torch.equal(transform_for_subnet(images, Subnet(seed=4), noisy), first)


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_named(images: Tensor):
    with pytest.raises(ValueError, match="images have shape .* expected floating point"):
        resize(images, 4)

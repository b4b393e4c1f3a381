import pytest
import torch

from gradaug_hf.slimming.patterns import Cut, Kept, Whole, Width, kept_channels, pattern_size, take_pattern


@pytest.mark.parametrize(
    ("size", "width", "divisor", "kept"),
    [
        (64, 1.0, 1, 64),
        (64, 0.9, 1, 58),  # 57.6 rounds up
        (5, 0.9, 1, 5),  # 4.5 rounds up: floor(4.5 + 0.5)
        (5, 0.5, 1, 3),
        (3, 0.1, 1, 1),  # never less than one channel
        (64, 0.9, 8, 56),  # 57.6 is nearer to 56 than to 64
        (64, 0.95, 8, 64),
        (64, 0.01, 8, 8),  # never less than one multiple
        (12, 0.9, 8, 8),
        (4, 0.5, 8, 4),  # fewer channels than the divisor stay whole
        (20, 1.0, 8, 20),  # full width is not rounded
    ],
)
def test_kept_channels_follow_the_paper_and_the_divisor(size, width, divisor, kept):
    assert kept_channels(size, width, divisor) == kept


def test_a_pattern_keeps_the_first_channels_of_every_piece():
    x = torch.arange(2 * 3 + 4 + 2 * 2 * 2)
    pattern = (Kept(repeat=2, size=3, block=1), Whole(4), Kept(repeat=2, size=2, block=2))
    taken = take_pattern(x, 0, pattern, Width(0.5))
    assert taken.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 14, 15]
    assert pattern_size(pattern, Width(0.5)) == 12


def test_a_single_run_is_a_view_of_the_tensor():
    x = torch.randn(8, 6)
    taken = take_pattern(x, 0, (Kept(1, 8, 1),), Width(0.75))
    assert taken.shape == (6, 6)
    assert taken.data_ptr() == x.data_ptr()


def test_a_slice_begins_where_its_tensor_does():
    x = torch.arange(20)[8:].view(4, 3)
    taken = Cut.of(((Kept(1, 4, 1),), (Whole(3),))).take(x, Width(0.5))
    assert taken.tolist() == [[8, 9, 10], [11, 12, 13]]


def test_the_divisor_counts_positions_that_come_together():
    heads = Kept(repeat=1, size=6, block=16, granule=16)
    assert heads.size_at(Width(0.5, divisor=8)) == 3 * 16


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_slice_of_several_dimensions_and_its_gradient_keep_the_memory_format(memory_format):
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
    taken = Cut.of(((Kept(1, 8, 1),), (Kept(1, 6, 1),), (Whole(3),), (Whole(3),))).take(weight, Width(0.5))
    assert torch.equal(taken, weight[:4, :3])
    assert taken.data_ptr() == weight.data_ptr() and taken.stride() == weight.stride()
    assert taken.grad_fn.next_functions[0][0].name() == "torch::autograd::AccumulateGrad"  # one full-size gradient
    taken.square().sum().backward()
    expected = torch.zeros_like(weight)
    expected[:4, :3] = 2 * weight.detach()[:4, :3]
    assert torch.equal(weight.grad, expected)
    assert weight.grad.is_contiguous(memory_format=memory_format)


def test_dimensions_of_several_pieces_are_taken_beside_those_of_one():
    weight = torch.arange(8 * 6.0).view(8, 6)[:, 1:]  # memory that is not its own alone
    taken = Cut.of(((Kept(2, 4, 1),), (Kept(1, 5, 1),))).take(weight, Width(0.5))
    assert torch.equal(taken, weight[[0, 1, 4, 5], :3])

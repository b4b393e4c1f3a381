import pytest

from gradaug_hf.experiments.cost import relative_cost


@pytest.mark.parametrize(
    ("num_subnets", "min_width", "resolutions", "expected"),
    [
        (3, 0.9, [224, 192, 160, 128], 2.68),
        (2, 0.9, [224, 192, 160, 128], 2.10),
        (1, 0.9, [224, 192, 160, 128], 1.52),
        (3, 0.8, [32, 28, 24], 2.76),
        (0, 0.8, [32, 28, 24], 1.00),
    ],
)
def test_cost_is_that_of_the_paper(num_subnets: int, min_width: float, resolutions: list[int], expected: float):
    assert relative_cost(num_subnets, min_width, 1.0, resolutions, resolutions[0]) == pytest.approx(expected, abs=0.01)


def test_sub_networks_that_leave_nothing_out_cost_a_full_pass_each():
    assert relative_cost(4, 1.0, 1.0, [32], 32) == 5


@pytest.mark.parametrize("share, expected", [(1.0, 2.76), (1 / 3, 1.59), (0.5, 1.88)])
def test_sub_networks_on_a_part_of_the_images_cost_that_part(share: float, expected: float):
    assert relative_cost(3, 0.8, 1.0, [32, 28, 24], 32, share) == pytest.approx(expected, abs=0.01)

import statistics

import pytest

from gradaug_hf import SubnetSampler
from gradaug_hf.experiments.cost import relative_cost
from gradaug_hf.objective.sampling import SubnetSettings


@pytest.mark.parametrize(
    ("num_subnets", "min_width", "resolutions", "expected"),
    [
        (3, 0.9, [224, 192, 160, 128], 2.68),
        (3, 0.9, None, 2.68),
        (2, 0.9, [224, 192, 160, 128], 2.10),
        (1, 0.9, [224, 192, 160, 128], 1.52),
        (3, 0.8, [32, 28, 24], 2.76),
        (0, 0.8, [32, 28, 24], 1.00),
    ],
)
def test_cost_is_that_of_the_paper(num_subnets: int, min_width: float, resolutions: list[int], expected: float):
    settings = SubnetSettings(num_subnets, min_width, 1.0, resolutions)
    assert relative_cost(settings) == pytest.approx(expected, abs=0.01)


def test_sub_networks_that_leave_nothing_out_cost_a_full_pass_each():
    assert relative_cost(SubnetSettings(4, 1.0, 1.0, [32])) == 5
    assert relative_cost(SubnetSettings(4, 1.0, 1.0, [16]), side=32) == 2


@pytest.mark.parametrize("images, expected", [(1.0, 2.76), ("split", 1.59), (0.5, 1.88)])
def test_sub_networks_on_a_part_of_the_images_cost_that_part(images: float | str, expected: float):
    settings = SubnetSettings(3, 0.8, 1.0, [32, 28, 24], subnet_images=images)
    assert relative_cost(settings) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"width_levels": 3, "max_width": 0.9},
        {"subnet_mode": "depth", "min_survival": 0.4},
        {"subnet_mode": "width+depth", "subnet_images": "split"},
        {"subnet_mode": "tokens", "min_tokens": 0.3},
        {"subnet_interval": 3, "subnet_images": 0.5},
    ],
)
def test_the_cost_is_the_mean_over_what_the_sampler_samples(changes: dict):
    sampler = SubnetSampler(3, 0.6, resolutions=[32, 24, 16], **changes)
    blocks, batch, side = 9, 12, 32

    def share(subnet) -> float:
        seen = len(subnet.part.indices(batch)) / batch if subnet.part else 1.0
        kept = 1 - len(subnet.dropped_blocks(blocks)) / blocks
        return seen * kept * subnet.tokens * (subnet.width * subnet.resolution / side) ** 2

    costs = [1 + sum(share(subnet) for subnet in sampler.sample(step)) for step in range(6000)]
    assert relative_cost(sampler) == pytest.approx(statistics.mean(costs), abs=0.03)

import random
import statistics
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import gradaug_hf
from gradaug_hf.objective.sampling import Subnet, SubnetSampler

SETTINGS = {"num_subnets": 3, "min_width": 0.8, "resolutions": [32, 28, 24], "seed": 5}


def test_a_new_process_samples_the_same_subnetworks():
    code = f"""
import sys, types
package = sys.modules["gradaug_hf"] = types.ModuleType("gradaug_hf")  # the whole of it would take long to import
package.__path__ = {gradaug_hf.__path__!r}
from gradaug_hf.objective.sampling import SubnetSampler
print(SubnetSampler(**{SETTINGS!r}).sample(1234))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == repr(SubnetSampler(**SETTINGS).sample(1234))


def test_what_is_sampled_depends_on_step_and_seed_only():
    sampler = SubnetSampler(**SETTINGS)
    first = sampler.sample(7)
    assert sampler.sample(8) != first
    assert sampler.sample(7) == first
    assert SubnetSampler(**{**SETTINGS, "seed": 6}).sample(7) != first


def test_global_random_numbers_neither_matter_nor_change():
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    first = SubnetSampler(**SETTINGS).sample(0)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(1)
    assert SubnetSampler(**SETTINGS).sample(0) == first


def test_widths_descend_to_the_minimum_and_stay_in_their_range():
    sampler = SubnetSampler(4, 0.6, 0.9, [32])
    for step in range(200):
        widths = [subnet.width for subnet in sampler.sample(step)]
        assert len(widths) == 4
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] == 0.6
        assert widths[0] <= 0.9
        assert widths[-2] > 0.6


def test_widths_are_uniform_and_resolutions_equally_likely_for_every_subnetwork():
    sampler = SubnetSampler(2, 0.8, 1.0, [32, 28, 24])
    sampled = [sampler.sample(step) for step in range(3000)]
    wide = [subnets[0].width for subnets in sampled]
    assert statistics.mean(wide) == pytest.approx(0.9, abs=0.004)  # the deviation of the mean is 0.00105
    assert statistics.stdev(wide) == pytest.approx(0.2 / 12**0.5, abs=0.003)
    for index in (0, 1):
        counts = [sum(subnets[index].resolution == side for subnets in sampled) for side in (32, 28, 24)]
        assert sum(counts) == 3000
        assert all(abs(count - 1000) < 110 for count in counts)  # the deviation is 26
    both_full = sum(subnets[0].resolution == subnets[1].resolution == 32 for subnets in sampled)
    assert abs(both_full - 3000 / 9) < 75  # sampled with replacement; the deviation is 17


def test_width_levels_are_evenly_spaced_and_all_sampled():
    sampler = SubnetSampler(3, 0.7, 1.0, [32], width_levels=4)
    widths = {subnet.width for step in range(300) for subnet in sampler.sample(step)}
    assert sorted(widths) == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-12)
    assert max(widths) <= 1.0


def test_subnetworks_of_random_depth_are_wide_and_all_lose_blocks_at_random():
    sampler = SubnetSampler(3, 0.6, 0.9, [32, 24], subnet_mode="depth", min_survival=0.7)
    for step in range(20):
        assert [(subnet.width, subnet.survival) for subnet in sampler.sample(step)] == [(1.0, 0.7)] * 3
    both = SubnetSampler(**SETTINGS, subnet_mode="width+depth", min_survival=0.7)
    narrow = SubnetSampler(**SETTINGS, min_survival=0.7)
    for step in range(20):
        assert both.sample(step) == [replace(subnet, survival=0.7) for subnet in narrow.sample(step)]
        assert {subnet.survival for subnet in narrow.sample(step)} == {1.0}


def test_the_survival_of_blocks_falls_linearly_from_one_at_the_first():
    samples = 4000
    counts = [0] * 5
    for seed in range(samples):
        for index in Subnet(seed=seed, survival=0.6).dropped_blocks(5):
            counts[index] += 1
    assert counts[0] == 0
    for count, expected in zip(counts, (0, 0.1, 0.2, 0.3, 0.4), strict=True):
        assert count / samples == pytest.approx(expected, abs=0.035)  # the deviation of the last is 0.0077


def test_blocks_are_dropped_independently_of_each_other():
    dropped = [Subnet(seed=seed, survival=0.5).dropped_blocks(3) for seed in range(4000)]
    assert sum({1, 2} <= blocks for blocks in dropped) / 4000 == pytest.approx(0.25 * 0.5, abs=0.025)


def test_dropped_blocks_depend_on_the_seed_of_the_pass_alone():
    subnet = Subnet(seed=9, survival=0.5)
    assert subnet.dropped_blocks(54) == subnet.dropped_blocks(54)
    assert Subnet(width=0.5, resolution=8, seed=9, survival=0.5).dropped_blocks(54) == subnet.dropped_blocks(54)
    assert Subnet(seed=10, survival=0.5).dropped_blocks(54) != subnet.dropped_blocks(54)


def test_without_random_depth_no_block_is_dropped():
    assert not any(Subnet(seed=seed).dropped_blocks(54) for seed in range(100))


def test_a_single_block_is_the_last():
    kept = sum(not Subnet(seed=seed, survival=0.25).dropped_blocks(1) for seed in range(2000))
    assert kept / 2000 == pytest.approx(0.25, abs=0.045)  # the deviation is 0.0097


@pytest.mark.parametrize("survival", [0.0, 1.2, float("nan")])
def test_a_survival_out_of_range_is_named(survival):
    with pytest.raises(ValueError, match=rf"survival is {survival}; it must lie in \(0, 1\]"):
        Subnet(survival=survival).dropped_blocks(3)


def test_one_subnetwork_is_the_narrowest_and_none_is_none():
    assert [subnet.width for subnet in SubnetSampler(1, 0.75).sample(3)] == [0.75]
    assert SubnetSampler(0).sample(3) == []


def test_with_an_interval_every_kth_step_has_the_subnetworks_it_has_without():
    always, every_third = SubnetSampler(**SETTINGS), SubnetSampler(**SETTINGS, subnet_interval=3)
    for step in range(12):
        assert every_third.sample(step) == (always.sample(step) if step in (0, 3, 6, 9) else [])


def test_without_resolutions_images_are_left_as_they_are():
    assert all(subnet.resolution is None for subnet in SubnetSampler(3).sample(0))


def test_seeds_differ_between_the_subnetworks_of_a_step():
    seeds = [subnet.seed for step in range(50) for subnet in SubnetSampler(3).sample(step)]
    assert len(set(seeds)) == 150


def test_a_subnet_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Subnet().width = 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_subnets": -1}, "num_subnets is -1"),
        ({"num_subnets": 1.5}, "num_subnets is 1.5"),
        ({"min_width": 0.0}, r"min_width is 0.0; it must lie in \(0, 1\]"),
        ({"min_width": 1.2}, r"min_width is 1.2"),
        ({"min_width": float("nan")}, "min_width is nan"),
        ({"max_width": 0.8}, r"max_width is 0.8; it must lie in \[min_width, 1\] = \[0.9, 1\]"),
        ({"max_width": 1.1}, "max_width is 1.1"),
        ({"width_levels": 1}, "width_levels is 1"),
        ({"subnet_mode": "height"}, r"subnet_mode is 'height'; .* one of 'width', 'depth', 'width\+depth'"),
        ({"subnet_interval": 0}, "subnet_interval is 0; it must be an integer of at least 1"),
        ({"subnet_interval": 1.5}, "subnet_interval is 1.5"),
        ({"min_survival": 0}, r"min_survival is 0; it must lie in \(0, 1\]"),
        ({"resolutions": []}, r"resolutions is \[\]"),
        ({"resolutions": [32, 0]}, r"resolutions is \[32, 0\]"),
        ({"resolutions": [32.5]}, r"resolutions is \[32.5\]"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SubnetSampler(**settings)

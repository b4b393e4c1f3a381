import signal

import pytest
import torch

from tests.helpers.sharding import STEPS, in_two_processes, train

MODES = ["width", "depth", "width+depth"]
BLOCKS = {
    "vit": ["", "blocks.0", "blocks.1", "blocks.2", "norm"],
    "convnext": ["", "stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"],
    "resnet": ["", "bn1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"],
}


def trained(tmp_path, network: str, environ: dict[str, str] | None = None, **settings) -> list[dict]:
    """Gradients and weights of two processes with DDP, then with FSDP2."""
    found = []
    for name in ("ddp", "fsdp"):
        folder = tmp_path / name
        run = lambda folder=folder: train(folder, network, **settings)  # noqa: E731
        assert in_two_processes(run, name == "fsdp", **environ or {}) == [0, 0]
        found.append(torch.load(folder.with_suffix(".pt")))
    return found


def assert_equal(found: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert len(found["gradients"]) == len(expected["gradients"]) == STEPS
    pairs = zip([*found["gradients"], found["weights"]], [*expected["gradients"], expected["weights"]], strict=True)
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_divided_parameters_train_as_whole_ones_do(tmp_path):
    ddp, fsdp = trained(tmp_path, "vit", subnet_mode="width+depth")
    assert ddp["sharded"] == []
    assert fsdp["sharded"] == BLOCKS["vit"]
    assert_equal(fsdp, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", BLOCKS)
def test_divided_parameters_train_as_whole_ones_do_by_every_mode(tmp_path, network, mode):
    ddp, fsdp = trained(tmp_path, network, subnet_mode=mode)
    assert fsdp["sharded"][: len(BLOCKS[network])] == BLOCKS[network]
    assert_equal(fsdp, ddp)


OTHERS = {
    "joint": ({}, {"subnet_backward": "joint"}),
    "kept whole after the forward": ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}),
    "computed again": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
    "gradients cross after each pass": (
        {},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    ),
    "loaded by one process": ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}),
    "label": ({}, {"subnet_target": "label", "subnet_images": "split", "num_subnets": 2}),
    "tokens": ({}, {"subnet_mode": "tokens"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_divided_parameters_train_as_whole_ones_do_by_every_setting(tmp_path, name):
    environ, settings = OTHERS[name]
    ddp, fsdp = trained(tmp_path, "vit", environ, **{"subnet_mode": "width+depth", **settings})
    assert_equal(fsdp, ddp)

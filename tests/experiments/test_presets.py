import pytest
import torch
from torch import nn

from gradaug_hf.experiments.arguments import parse
from gradaug_hf.experiments.cost import relative_cost
from gradaug_hf.experiments.methods import METHODS
from gradaug_hf.experiments.presets import computes_bfloat16, preset_settings
from gradaug_hf.experiments.run import SETTINGS
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.trainer import GradAugTrainer
from tests.helpers.residual_network import make_network


def parsed(flags: str, **settings) -> dict:
    args, config = parse({**SETTINGS, "report_to": "none", **settings}, METHODS, None, flags.split())
    return vars(args) | vars(config)


@pytest.fixture
def cpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


FAST = {"bf16": True, "use_cpu": True, "channels_last": True, "width_divisor": 8, "width_levels": 5}


def test_the_fast_preset_is_what_the_documentation_says(cpu_with_bfloat16, tmp_path):
    assert preset_settings("fast") == FAST
    config = GradAugConfig(str(tmp_path), **preset_settings("fast"))
    assert {name: getattr(config, name) for name in FAST} == FAST


@pytest.mark.parametrize(("min_width", "resolutions"), [(0.9, [224, 192, 160, 128]), (0.8, [32, 28, 24]), (0.9, None)])
def test_the_light_preset_costs_at_most_1_6_plain_steps(cpu_with_bfloat16, tmp_path, min_width, resolutions):
    light = preset_settings("light")
    assert light == FAST | {"subnet_mode": "depth", "subnet_images": 0.25}
    config = GradAugConfig(str(tmp_path), **light, min_width=min_width, resolutions=resolutions)
    assert 1.4 < relative_cost(config, None if resolutions else 224) <= 1.6


@pytest.mark.parametrize("method", ["baseline", "mixup"])
def test_the_light_preset_leaves_plain_training_without_sub_networks(tmp_path, method):
    settings = parsed(f"--preset light --method {method} --output_dir {tmp_path}")
    assert settings["num_subnets"] == 0 and settings["channels_last"]
    assert parsed("--preset light")["subnet_mode"] == "depth"
    assert parsed("--preset light --subnet_mode width")["subnet_mode"] == "width"


def test_the_exact_preset_sets_nothing():
    assert preset_settings("exact") == {}


def test_a_cpu_without_bfloat16_keeps_float32(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False}, raising=False)
    assert not computes_bfloat16(use_cpu=True)
    assert preset_settings("fast") == {"channels_last": True, "width_divisor": 8, "width_levels": 5}


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="preset is 'quick'; it must be one of 'exact', 'fast', 'light'"):
        preset_settings("quick")


def test_without_a_preset_a_run_is_exact(tmp_path):
    settings = parsed(f"--output_dir {tmp_path}")
    assert settings["preset"] == "exact"
    assert not settings["channels_last"] and not settings["bf16"]
    assert (settings["width_divisor"], settings["width_levels"]) == (1, None)


def test_flags_and_file_win_over_the_preset_and_it_over_method_and_recipe(cpu_with_bfloat16, tmp_path):
    assert FAST.items() <= parsed("--preset fast", width_levels=7).items()
    file = tmp_path / "run.yaml"
    file.write_text("preset: fast\nwidth_divisor: 16\nchannels_last: false\n")
    settings = parsed(f"{file} --width_levels 3 --bf16 false")
    assert settings["preset"] == "fast"
    assert (settings["width_divisor"], settings["width_levels"]) == (16, 3)
    assert not settings["channels_last"] and not settings["bf16"]


def test_float16_replaces_the_bfloat16_of_the_preset(cpu_with_bfloat16):
    settings = parsed("--preset fast --fp16")
    assert settings["fp16"] and not settings["bf16"]


# ---- channels-last memory ----


def is_channels_last(network: nn.Module) -> bool:
    weights = [p for p in network.parameters() if p.ndim == 4]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("as_function", [False, True])
def test_channels_last_holds_from_the_first_step_to_a_resumed_one_and_changes_no_result(tmp_path, as_function):
    def train(channels_last: bool, max_steps: int, resume: bool = False) -> GradAugTrainer:
        args = GradAugConfig(
            str(tmp_path / str(channels_last)), min_width=0.5, resolutions=[16, 12], channels_last=channels_last,
            max_steps=max_steps, save_steps=2, save_strategy="steps", per_device_train_batch_size=4, use_cpu=True,
            report_to="none", disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-3, optim="sgd",
            ignore_config_change=True,
        )  # fmt: skip
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        data = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
        network = make_network(dtype=torch.float32)
        given = {"model_init": lambda: make_network(dtype=torch.float32)} if as_function else {"model": network}
        trainer = GradAugTrainer(**given, args=args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    expected = train(False, 4).model.state_dict()
    assert is_channels_last(train(True, 2).model)
    trainer = train(True, 4, resume=True)
    assert is_channels_last(trainer.model)
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in trainer.model.parameters())
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)

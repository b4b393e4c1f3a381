import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gradaug_hf.data.collator import collate_images
from gradaug_hf.hub.configs import save_configs
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.sharding import check_sharding, check_version, keep_contiguous, plan_sharding, stores_parts
from tests.helpers.checkpoints import save_images
from tests.helpers.sharding import (
    CLASSES,
    NETWORKS,
    SIDE,
    STEPS,
    in_two_processes,
    resnet,
    rows,
    save_and_push,
    train,
    train_from_last,
    vit,
)
from tests.helpers.small_training import checkpoints

ROOT = Path(__file__).parents[2]
ACCELERATE = "accelerate.commands.launch --config_file recipes/accelerate/fsdp2.yaml"
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
    assert fsdp["reductions"] == STEPS * len(BLOCKS["vit"])  # once in a step
    assert_equal(fsdp, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", BLOCKS)
def test_divided_parameters_train_as_whole_ones_do_by_every_mode(tmp_path, network, mode):
    ddp, fsdp = trained(tmp_path, network, subnet_mode=mode)
    assert fsdp["sharded"][: len(BLOCKS[network])] == BLOCKS[network]
    assert_equal(fsdp, ddp)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_its_digits(tmp_path):
    settings = {"subnet_mode": "width+depth"}
    assert in_two_processes(lambda: train(tmp_path / "float32", "vit", **settings), fsdp=False) == [0, 0]
    assert in_two_processes(lambda: train(tmp_path / "bfloat16", "vit", bf16=True, **settings)) == [0, 0]
    first, second = (torch.load(tmp_path / f"{name}.pt")["gradients"][0] for name in ("bfloat16", "float32"))
    found, expected = (torch.cat([tensor.flatten() for tensor in each.values()]) for each in (first, second))
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.02


OTHERS = {
    "joint": ({}, {"subnet_backward": "joint"}),
    "kept whole after the forward": ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}),
    "kept in the memory of the host": ({"FSDP_OFFLOAD_PARAMS": "true"}, {}),
    "computed again": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
    "gradients cross after each pass": (
        {},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    ),
    "label": ({}, {"subnet_target": "label", "subnet_images": "split", "num_subnets": 2}),
    "tokens": ({}, {"subnet_mode": "tokens"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_divided_parameters_train_as_whole_ones_do_by_every_setting(tmp_path, name):
    environ, settings = OTHERS[name]
    ddp, fsdp = trained(tmp_path, "vit", environ, **{"subnet_mode": "width+depth", **settings})
    assert_equal(fsdp, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kept whole after the forward", "kept in the memory of the host", "computed again"])
def test_memory_is_saved_without_another_bit_in_gradients_and_weights(tmp_path, name):
    found = []
    for number, environ in enumerate((OTHERS[name][0], {})):
        run = lambda number=number: train(tmp_path / f"{number}", "vit", subnet_mode="width+depth")  # noqa: E731
        assert in_two_processes(run, **environ) == [0, 0]
        found.append(torch.load(tmp_path / f"{number}.pt"))
    assert_equal(*found, tolerance=0)
    assert bool(found[0]["recomputed"]) == (name == "computed again")


def reversed_batch(rows: list[dict]) -> dict:
    return collate_images(rows[::-1])


@pytest.mark.slow
def test_batch_norm_in_float32_differs_as_by_the_order_of_the_images_in_a_batch(tmp_path):
    """Another order of a sum is another rounding, of which batch norm over two images makes more with each step."""
    found = {}
    for name, collator in (("ddp", None), ("fsdp", None), ("reversed", reversed_batch)):
        run = lambda name=name, collator=collator: train(  # noqa: E731
            tmp_path / name, resnet().float(), data_collator=collator, subnet_mode="width"
        )
        assert in_two_processes(run, fsdp=name == "fsdp") == [0, 0]
        found[name] = torch.load(tmp_path / f"{name}.pt")["gradients"]
    far = {name: [farthest(*pair) for pair in zip(found[name], found["ddp"], strict=True)] for name in found}
    assert far["fsdp"][0] < 1e-6
    assert far["reversed"][-1] > 1e-4
    assert far["fsdp"][-1] < 10 * far["reversed"][-1]


def farthest(found: dict, expected: dict) -> float:
    return max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())


def settings(tmp_path, **given) -> GradAugConfig:
    return GradAugConfig(str(tmp_path), report_to="none", use_cpu=True, **given)


def accelerator(mixed_precision: str = "no", **plugin) -> SimpleNamespace:
    usual = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**usual, **plugin}))
    return SimpleNamespace(state=state, mixed_precision=mixed_precision)


def test_what_cannot_be_divided_is_refused_by_name(tmp_path):
    args = settings(tmp_path)
    check_sharding(args, accelerator(), vit())
    refused = {
        "FSDP1 .* fsdp_version to 2": (args, accelerator(fsdp_version=1)),
        "fsdp_cpu_ram_efficient_loading is true": (args, accelerator(cpu_ram_efficient_loading=True)),
        "torch_compile is True": (settings(tmp_path, torch_compile=True), accelerator()),
    }
    for message, (given, how) in refused.items():
        with pytest.raises(ValueError, match=message):
            check_sharding(given, how, vit())
    check_sharding(args, accelerator("bf16"), vit())
    with pytest.raises(ValueError, match="mixed precision is 'bf16', .* ResNet has batch norm"):
        check_sharding(args, accelerator("bf16"), resnet())


@pytest.mark.parametrize(("num_subnets", "summed_in"), [(0, torch.bfloat16), (1, torch.float32)])
def test_blocks_are_found_and_the_gradients_of_passes_summed_in_float32(num_subnets, summed_in):
    policy = MixedPrecisionPolicy(*[torch.bfloat16] * 3)
    how = accelerator(transformer_cls_names_to_wrap=None, mixed_precision_policy=policy)
    plan_sharding(how, vit(), num_subnets)
    plugin = how.state.fsdp_plugin
    assert plugin.transformer_cls_names_to_wrap == ["Block"]
    assert (plugin.mixed_precision_policy.param_dtype, plugin.mixed_precision_policy.reduce_dtype) == (
        torch.bfloat16,
        summed_in,
    )
    for names, model, expected in ((["Mlp"], vit(), ["Mlp"]), (None, of_transformers(), ["ViTLayer"])):
        how = accelerator(transformer_cls_names_to_wrap=names, mixed_precision_policy=None)
        plan_sharding(how, model, num_subnets)
        assert how.state.fsdp_plugin.transformer_cls_names_to_wrap == expected


FIELDS = {
    "fsdp_reshard_after_forward: true": "fsdp_reshard_after_forward: false",
    "fsdp_offload_params: false": "fsdp_offload_params: true",
    "fsdp_activation_checkpointing: false": "fsdp_activation_checkpointing: true",
    "FULL_STATE_DICT": "SHARDED_STATE_DICT",
    'mixed_precision: "no"': "mixed_precision: bf16",
}


@pytest.mark.parametrize("changed", [False, True])
def test_the_fields_of_the_file_reach_what_divides_the_blocks(tmp_path, monkeypatch, changed):
    text = Path(ROOT / "recipes/accelerate/fsdp2.yaml").read_text()
    for field, other in FIELDS.items():
        assert field in text
        text = text.replace(field, other) if changed else text
    (tmp_path / "fsdp2.yaml").write_text(text)
    line = ["--config_file", str(tmp_path / "fsdp2.yaml"), "--main_process_port", "0", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    if (precision := os.environ["ACCELERATE_MIXED_PRECISION"]) != "no":  # as AcceleratorState does
        plugin.set_mixed_precision(precision)
    how = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")
    model, divided = vit(), []
    plan_sharding(how, model, num_subnets=2)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **how: divided.append((module, how)))
    fsdp2_prepare_model(how, model)
    blocks = {id(block) for block in model.blocks}
    given = [how for module, how in divided if id(module) in blocks]
    assert len(given) == len(blocks)
    assert all(how["reshard_after_forward"] is not changed for how in given)
    assert all(isinstance(how["offload_policy"], CPUOffloadPolicy) == changed for _, how in divided)
    policies = {(how["mp_policy"].param_dtype, how["mp_policy"].reduce_dtype) for _, how in divided}
    assert policies == {(torch.bfloat16, torch.float32) if changed else (None, None)}
    assert plugin.activation_checkpointing == changed
    assert stores_parts(how) == changed


def test_parameters_stay_contiguous(tmp_path):
    args = settings(tmp_path, channels_last=True)
    keep_contiguous(args, SimpleNamespace(state=SimpleNamespace()))
    assert args.channels_last
    with pytest.warns(UserWarning, match="FSDP2 takes contiguous parameters alone"):
        keep_contiguous(args, accelerator())
    assert not args.channels_last


def test_layers_that_are_not_the_same_twice_are_not_computed_again(tmp_path):
    args, again = settings(tmp_path), accelerator(activation_checkpointing=True)
    check_sharding(args, again, vit())
    for model, layer in (
        (vit(drop_path_rate=0.1), "blocks.1.drop_path1"),
        (resnet(), "conv1.1"),
        (vit(drop_rate=0.1), ""),
    ):
        with pytest.raises(ValueError, match=f"fsdp_activation_checkpointing is true.* {layer}.* has either"):
            check_sharding(args, again, model)


def test_tensors_that_are_split_are_refused(tmp_path):
    args = settings(tmp_path)
    for stage in (1, 2):
        zero = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))
        check_sharding(args, zero, vit())
    zero.state.deepspeed_plugin.zero_stage = 3
    with pytest.raises(ValueError, match="ZeRO-3 .* stage 1 or 2, or FSDP2: accelerate launch"):
        check_sharding(args, zero, vit())
    module = pytest.importorskip("accelerate.parallelism_config", reason="new in accelerate 1.10")
    args.parallelism_config = module.ParallelismConfig(tp_size=2)
    with pytest.raises(ValueError, match="parallelism_config is given, but tensor parallelism"):
        check_version(args)


KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def run_in_two(folder: Path, kind: str, count: int = 2, **settings) -> list[int]:
    return in_two_processes(lambda: train_from_last(folder, **settings), count=count, FSDP_STATE_DICT_TYPE=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path, kind):
    settings = {"subnet_mode": "width+depth"}
    assert run_in_two(tmp_path / "whole", kind, **settings) == [0, 0]
    assert -signal.SIGKILL in run_in_two(tmp_path / "killed", kind, stop_after=3, **settings)
    assert checkpoints(tmp_path / "killed") == [2]
    assert run_in_two(tmp_path / "killed", kind, **settings) == [0, 0]
    found, expected = (torch.load(tmp_path / name / "end.pt") for name in ("killed", "whole"))
    assert len(found) == len(expected) > 40
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_goes_on_with_another_number_of_processes(tmp_path, kind):
    assert run_in_two(tmp_path, kind, max_steps=2) == [0, 0]
    before = torch.load(tmp_path / "end.pt")
    settings = {"ignore_config_change": True, "learning_rate": 0.0}
    assert run_in_two(tmp_path, kind, count=3, max_steps=2, **settings) == [0, 0, 0]
    assert all(torch.equal(one, other) for one, other in zip(torch.load(tmp_path / "end.pt"), before, strict=True))
    assert run_in_two(tmp_path, kind, count=3, max_steps=4, **settings) == [0, 0, 0]
    assert checkpoints(tmp_path) == [2, 4]


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capfd):
    assert run_in_two(tmp_path, "FULL_STATE_DICT", max_steps=2) == [0, 0]
    assert run_in_two(tmp_path, "SHARDED_STATE_DICT", max_steps=2) == [1, 1]
    printed = capfd.readouterr().err
    assert "has no pytorch_model_fsdp_0/.metadata, from which FSDP2 resumes with fsdp_state_dict_type" in printed


def of_timm_wrapper() -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    size = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=size, num_labels=CLASSES)
    return TimmWrapperForImageClassification(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [NETWORKS["vit"], of_timm_wrapper])
def test_every_folder_that_is_saved_or_pushed_loads_in_timm_and_in_transformers(tmp_path, kind, model):
    run = lambda: save_and_push(tmp_path, model())  # noqa: E731
    assert in_two_processes(run, FSDP_STATE_DICT_TYPE=kind) == [0, 0]
    expected = torch.load(tmp_path / "logits.pt")
    images = torch.stack([row["pixel_values"] for row in rows(model())])
    checkpoint = tmp_path / "out" / f"checkpoint-{STEPS}"
    for folder in (tmp_path / "pushed", checkpoint):
        assert len(list(folder.glob("*.safetensors"))) == 1
        assert not any("fsdp" in name for name in load_file(folder / "model.safetensors"))
        with torch.no_grad():
            by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
            by_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
        torch.testing.assert_close(by_timm, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(by_transformers, expected, rtol=0, atol=1e-6)


def of_transformers() -> ViTForImageClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, num_labels=CLASSES, **size, **dropout))


@pytest.mark.slow
def test_a_model_of_transformers_is_divided_and_saved_whole(tmp_path):
    run = lambda: save_and_push(tmp_path, of_transformers(), subnet_mode="width")  # noqa: E731
    assert in_two_processes(run) == [0, 0]
    images = torch.stack([row["pixel_values"] for row in rows(of_transformers())])
    for folder in (tmp_path / "pushed", tmp_path / "out" / f"checkpoint-{STEPS}"):
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
        with torch.no_grad():
            found = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
        torch.testing.assert_close(found, torch.load(tmp_path / "logits.pt"), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--bf16"])
def test_a_recipe_trains_with_the_file_of_accelerate(tmp_path, flags):
    backbone, out = tmp_path / "backbone", tmp_path / "out"
    backbone.mkdir()
    save_configs(vit(), backbone)
    save_file(vit().state_dict(), backbone / "model.safetensors")
    images = save_images(tmp_path / "images", of_each_class=8)
    command = f"{ACCELERATE} --num_processes 2 --main_process_port 0 tests/helpers/run_sharded.py recipes/fine_tune.py"
    data = f"--model {backbone} --dataset_name {images} --image_size {SIDE} --batch_size 8 --output_dir {out}"
    steps = "--max_steps 2 --num_subnets 2 --resolutions 32 --dataloader_num_workers 0 --use_cpu"
    line = [sys.executable, "-m", *f"{command} {data} {steps} {flags}".split()]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"wrote the model and results.json to {out}" in done.stdout
    trained = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert all(parameter.isfinite().all() for parameter in trained.parameters())

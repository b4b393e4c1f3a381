import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from datasets import Dataset, Image
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, pipeline

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.loading import load_image_data
from gradaug_hf.data.transforms import cifar_transform
from gradaug_hf.experiments.arguments import parse
from gradaug_hf.experiments.methods import METHODS
from gradaug_hf.experiments.run import SETTINGS, Recipe
from gradaug_hf.hub.configs import save_configs
from gradaug_hf.hub.preprocessing import as_its_pipeline
from recipes import cifar_pyramidnet, cifar_resnet110_depth, cifar_wideresnet, imagenet_resnet50
from tests.recipes.conftest import QUICK, TRAINING_IMAGES

ROOT = Path(__file__).parents[2]
RECIPES = {
    "imagenet_resnet50": imagenet_resnet50.RECIPE,
    "cifar_wideresnet": cifar_wideresnet.RECIPE,
    "cifar_pyramidnet": cifar_pyramidnet.RECIPE,
    "cifar_resnet110_depth": cifar_resnet110_depth.RECIPE,
}
# A network of the recipe's kind that takes little time.
SMALL = {
    "imagenet_resnet50": "test_resnet",
    "cifar_wideresnet": "wrn16_2",
    "cifar_pyramidnet": "pyramidnet8_a12",
    "cifar_resnet110_depth": "resnet20_cifar",
}
NOT_FOR = {
    "imagenet_resnet50": set(),
    "cifar_wideresnet": {"bag_of_tricks"},
    "cifar_pyramidnet": {"bag_of_tricks"},
    "cifar_resnet110_depth": {"bag_of_tricks"},
}
EVERY_RUN = [(recipe, method) for recipe in RECIPES for method in METHODS if method not in NOT_FOR[recipe]]
# Each recipe and each method at least once; the other pairs take longer than a test should.
QUICK_RUNS = {
    *(
        ("cifar_wideresnet", m)
        for m in ("baseline", "dropblock", "mixup", "cutmix", "gradaug_cutmix", "gradaug_mixup")
    ),
    ("cifar_pyramidnet", "shakedrop"),
    ("cifar_pyramidnet", "gradaug"),
    ("cifar_resnet110_depth", "stochdepth"),
    ("cifar_resnet110_depth", "gradaug"),
    ("imagenet_resnet50", "bag_of_tricks"),
    ("imagenet_resnet50", "shakedrop"),
}
# From the paper and its configuration files, by hand.
PAPER = {
    "imagenet_resnet50": {
        "model": "resnet50", "dataset_name": "ILSVRC/imagenet-1k", "num_train_epochs": 120, "batch_size": 512,
        "learning_rate": 0.2, "lr_scheduler_type": "cosine", "lr_drops": [], "weight_decay": 1e-4, "min_width": 0.9,
        "subnet_mode": "width", "resolutions": [224, 192, 160, 128], "zero_init_last": False,
    },
    "cifar_wideresnet": {
        "model": "wrn28_10", "dataset_name": "uoft-cs/cifar100", "num_train_epochs": 200, "batch_size": 128,
        "learning_rate": 0.1, "lr_scheduler_type": "cosine", "lr_drops": [], "weight_decay": 5e-4, "min_width": 0.8,
        "subnet_mode": "width", "resolutions": [32, 28, 24],
    },
    "cifar_pyramidnet": {
        "model": "pyramidnet200_a240", "dataset_name": "uoft-cs/cifar100", "num_train_epochs": 300, "batch_size": 64,
        "learning_rate": 0.25, "lr_drops": [0.5, 0.75], "weight_decay": 1e-4, "min_width": 0.8,
        "subnet_mode": "width", "resolutions": [32, 28, 24],
    },
    "cifar_resnet110_depth": {
        "model": "resnet110_cifar", "dataset_name": "uoft-cs/cifar10", "num_train_epochs": 200, "batch_size": 128,
        "learning_rate": 0.1, "lr_scheduler_type": "cosine", "lr_drops": [], "weight_decay": 1e-4,
        "subnet_mode": "depth", "min_survival": 0.8, "resolutions": [32, 28, 24],
    },
}  # fmt: skip
PAPER_EVERYWHERE = {
    "method": "gradaug", "num_subnets": 3, "max_width": 1.0, "width_divisor": 1, "width_levels": None,
    "kl_weight": 1.0, "kl_warmup": 0.0, "subnet_images": 1.0, "subnet_target": "soft", "optim": "sgd",
    "max_grad_norm": 0.0, "warmup_epochs": 0, "warmup_steps": 0,
    "label_smoothing_factor": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "bf16": False, "fp16": False,
    "gradient_accumulation_steps": 1, "drop_path_rate": None, "drop_block_rate": None, "shake_drop_rate": None,
    "labels_per_class": None, "max_train_samples": None, "max_eval_samples": None, "max_steps": -1,
    "do_train": True, "streaming": False,
    "eval_strategy": "epoch", "save_strategy": "epoch", "subnet_rotation": False,
}  # fmt: skip


def settings_of(recipe: Recipe, flags: str = "") -> dict:
    args, config = parse({**SETTINGS, **recipe.settings}, recipe.methods, None, flags.split())
    return vars(args) | vars(config)


@pytest.mark.parametrize("name", RECIPES)
def test_without_flags_the_settings_are_the_papers(name: str):
    settings = settings_of(RECIPES[name])
    expected = PAPER[name] | PAPER_EVERYWHERE
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("cifar_pyramidnet", "cutmix", {"num_subnets": 0, "cutmix_alpha": 1, "mix_prob": 0.5}),
        ("cifar_pyramidnet", "gradaug_cutmix", {"num_subnets": 3, "cutmix_alpha": 1, "mix_prob": 0.5}),
        ("imagenet_resnet50", "cutmix", {"num_subnets": 0, "cutmix_alpha": 1, "mix_prob": 1, "num_train_epochs": 300}),
        ("imagenet_resnet50", "mixup", {"num_subnets": 0, "mixup_alpha": 0.2, "cutmix_alpha": 0}),
        ("cifar_wideresnet", "gradaug_mixup", {"num_subnets": 3, "mixup_alpha": 1, "cutmix_alpha": 0}),
        ("cifar_resnet110_depth", "stochdepth", {"num_subnets": 0, "drop_path_rate": 0.5}),
        (
            "imagenet_resnet50",
            "bag_of_tricks",
            {
                "num_subnets": 0, "model": "resnet50d", "label_smoothing_factor": 0.1, "mixup_alpha": 0.2,
                "lr_scheduler_type": "cosine", "warmup_epochs": 5, "zero_init_last": True,
            },
        ),
    ],
)  # fmt: skip
def test_method_sets_what_its_paper_does(name: str, method: str, expected: dict):
    settings = settings_of(RECIPES[name], f"--method {method}")
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "method"),
    [run if run in QUICK_RUNS else pytest.param(*run, marks=pytest.mark.slow) for run in EVERY_RUN],
)
def test_every_recipe_trains_by_every_method(name: str, method: str, run_recipe, small_pyramid):
    finished = run_recipe(RECIPES[name], f"--model {SMALL[name]} --method {method}")
    assert finished.result["steps"] == 2
    assert finished.result["method"] == method
    assert f"| {method} " in finished.printed
    assert ("loss_subnets" in finished.printed) == method.startswith("gradaug")
    trained = timm.create_model(f"local-dir:{finished.folder}", pretrained=True)
    assert trained.num_classes == 10
    assert all(p.isfinite().all() for p in trained.parameters())


def test_every_method_is_trained_by_a_quick_run():
    assert {recipe for recipe, _ in QUICK_RUNS} == set(RECIPES)
    assert {method for _, method in QUICK_RUNS} == set(METHODS)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in RECIPES for method in sorted(NOT_FOR[name])])
def test_method_that_a_network_cannot_take_is_refused_before_the_data_is_loaded(
    name, method, run_recipe, small_pyramid
):
    refuse(run_recipe, name, SMALL[name], method, "zero_init_last", NOT_FOR[name])


def test_method_that_needs_residual_blocks_is_refused_without_them(run_recipe):
    residual = {"dropblock", "stochdepth", "shakedrop", "bag_of_tricks"}
    refuse(run_recipe, "imagenet_resnet50", "vgg11", "shakedrop", "shake_drop_rate", residual)


def refuse(run_recipe, recipe: str, model: str, method: str, missing: str, not_for: set[str]) -> None:
    possible = ", ".join(m for m in METHODS if m not in not_for)
    message = f"{model} cannot be trained with method '{method}': it has no {missing}. Methods for it: {possible}"
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        run_recipe(RECIPES[recipe], f"--model {model} --method {method} --dataset_name /nowhere")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 9 --gradient_accumulation_steps 2", "batch_size is 9, which 1 processes with.*multiple of 2"),
        ("--per_device_train_batch_size 4", "per_device_train_batch_size follows from batch_size"),
        ("--labels_per_class 0", "labels_per_class is 0; it must be at least 1"),
        ("--min_width 0", "min_width is 0.0; it must lie in"),
        ("--do_train false --eval_strategy no", "do_train and do_eval are both False"),
        (
            "--load_best_model_at_end --eval_strategy epoch --save_strategy epoch",
            "results are those of the final epoch",
        ),
        ("--resume_from_checkpoint last", "resume_from_checkpoint is 'last', but .* holds no checkpoint"),
        ("--warmup_epochs 300", "warmup_epochs is 300.0; it must be below num_train_epochs"),
        ("--model resnet51", "model is 'resnet51', which is unknown; a timm model.*timm has .*resnet50"),
        ("--model nobody/nothing", "model 'nobody/nothing' is no folder, and the Hub cannot be reached"),
        ("--dataset_name nobody/nothing", "dataset 'nobody/nothing' is neither a file nor a folder here"),
        ("--eval_split dev", "no split 'dev'; splits found: train, test"),
        ("--streaming --skip_bad_images", "skip_bad_images is True; it must be False with streaming"),
        ("--streaming --labels_per_class 2", "labels_per_class needs to see all labels first"),
    ],
)
def test_wrong_arguments_end_in_one_message(flags: str, message: str, run_recipe):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run_recipe(cifar_wideresnet.RECIPE, f"--model wrn16_2 {flags}")


@pytest.mark.parametrize(
    ("saving", "checkpoint"),
    [
        ("--save_strategy epoch", "checkpoint-2"),
        pytest.param(
            "--save_strategy steps --save_steps 1 --dataloader_num_workers 2", "checkpoint-3", marks=pytest.mark.slow
        ),
        pytest.param(
            "--save_strategy steps --save_steps 1 --streaming --num_train_epochs 1 --batch_size 10",
            "checkpoint-2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_full_run_evaluates_each_epoch_and_goes_on_from_a_checkpoint_as_if_never_stopped(
    saving: str, checkpoint: str, run_recipe
):
    flags = "--model resnet20_cifar --max_steps -1 --num_train_epochs 2 --batch_size 20 --eval_strategy epoch "
    flags += f"--max_train_samples 40 --save_total_limit 3 {saving}"
    whole = run_recipe(cifar_wideresnet.RECIPE, flags)
    assert [step for step, _ in whole.result["curve"]] == ([4] if "streaming" in saving else [2, 4])
    assert whole.result["curve"][-1][1] == whole.result["top1"]
    resumed = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --resume_from_checkpoint {whole.folder / checkpoint}")
    for key in ("steps", "top1", "top5", "curve"):
        assert resumed.result[key] == whole.result[key]
    first, second = (timm.create_model(f"local-dir:{run.folder}", pretrained=True) for run in (whole, resumed))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_last_checkpoint_of_the_folder_is_found(run_recipe):
    flags = "--model resnet20_cifar --method baseline --save_strategy steps --save_steps 1 --logging_steps 1"
    started = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --save_total_limit 2")
    (started.folder / "results.json").unlink()
    resumed = run_recipe(
        cifar_wideresnet.RECIPE,
        f"{flags} --max_steps 3 --resume_from_checkpoint last --ignore_config_change --output_dir {started.folder}",
    )
    assert resumed.printed.count("'grad_norm'") == 1  # only the third step was left
    assert (started.folder / "results.json").exists()


@pytest.mark.slow
def test_changed_settings_of_an_interrupted_run_are_refused(run_recipe):
    flags = "--model resnet20_cifar --save_strategy steps --save_steps 1"
    folder = run_recipe(cifar_wideresnet.RECIPE, flags).folder
    flags += f" --output_dir {folder} --resume_from_checkpoint last --min_width 0.7 --labels_per_class 2"
    message = (
        "^error: .*checkpoint-2 was trained with other settings: labels_per_class was None and is 2; min_width was"
    )
    with pytest.raises(SystemExit, match=message):
        run_recipe(cifar_wideresnet.RECIPE, flags)
    run_recipe(cifar_wideresnet.RECIPE, f"{flags} --ignore_config_change")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_in_one_message(run_recipe):
    flags = "--model resnet20_cifar --learning_rate 1e38 --max_steps 4 --min_width 0.8"
    with pytest.raises(SystemExit, match=r"^error: the loss of step \d is not finite: .* of width 0.8 at \d\d pixels"):
        run_recipe(cifar_wideresnet.RECIPE, flags)


@pytest.fixture
def images_with_bad_ones(few_images: str, tmp_path: Path) -> str:
    """The few images, of which the fifth to train on and the third to evaluate on are cut off."""
    for split, bad in (("train", 4), ("test", 2)):
        images = Dataset.from_parquet(f"{few_images}/{split}.parquet", cache_dir=str(tmp_path / "cache"))
        images = images.cast_column("img", Image(decode=False))
        encoded = images["img"][:]
        encoded[bad] = {**encoded[bad], "bytes": encoded[bad]["bytes"][:100]}
        images = images.remove_columns("img").add_column("img", encoded, feature=Image(decode=False))
        (tmp_path / "data").mkdir(exist_ok=True)
        images.to_parquet(tmp_path / "data" / f"{split}.parquet")
    return str(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:skipped")
def test_bad_images_end_a_run_or_are_skipped_and_counted(images_with_bad_ones: str, run_recipe):
    flags = f"--model resnet20_cifar --method baseline --max_steps 13 --dataset_name {images_with_bad_ones}"
    flags += " --dataloader_num_workers 2"
    with pytest.raises(SystemExit, match="^error: the image in row 4 of split train cannot be decoded"):
        run_recipe(cifar_wideresnet.RECIPE, flags)
    run = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --skip_bad_images")
    assert "skipped 1 training images that cannot be decoded" in run.printed


def test_settings_may_come_from_a_file_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: resnet20_cifar\nmethod: cutmix\nlearning_rate: 1e-3\nweight_decay: 2e-4\nlr_drops: [0.5]\n"
        "resolutions: null\nlr_scheduler_kwargs: {num_cycles: 0.4}\nstreaming: false\n"
    )
    settings = settings_of(cifar_wideresnet.RECIPE, f"{file} --weight_decay 3e-4 --seed 5")
    expected = {
        "model": "resnet20_cifar", "method": "cutmix", "num_subnets": 0, "cutmix_alpha": 1.0, "learning_rate": 1e-3,
        "weight_decay": 3e-4, "lr_drops": [0.5], "resolutions": None, "lr_scheduler_kwargs": {"num_cycles": 0.4},
        "streaming": False, "seed": 5, "num_train_epochs": 200,
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    as_json = tmp_path / "run.json"
    as_json.write_text('{"learning_rate": 0.3, "num_subnets": 2, "eval_widths": []}')
    settings = settings_of(cifar_wideresnet.RECIPE, str(as_json))
    assert (settings["learning_rate"], settings["num_subnets"], settings["eval_widths"]) == (0.3, 2, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("min_widht: 0.9\nseed: 1\n", "sets min_widht, which is no setting"),
        ("- seed\n", "holds a list; expected settings by name"),
        ("a: [", "cannot be read as YAML or JSON"),
    ],
)
def test_file_that_is_not_of_settings_is_refused(tmp_path, content: str, message: str):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        settings_of(cifar_wideresnet.RECIPE, str(file))
    with pytest.raises(ValueError, match="absent.yaml cannot be read"):
        settings_of(cifar_wideresnet.RECIPE, str(tmp_path / "absent.yaml"))


def test_what_is_given_wins_over_method_and_recipe_even_by_another_name():
    settings = settings_of(cifar_pyramidnet.RECIPE, "--method gradaug_cutmix --mix_prob 0.9 --num_subnets 1")
    assert (settings["mix_prob"], settings["num_subnets"], settings["lr_drops"]) == (0.9, 1, [0.5, 0.75])
    settings = settings_of(cifar_pyramidnet.RECIPE, "--lr_scheduler_type cosine")
    assert settings["lr_drops"] == []
    settings = settings_of(imagenet_resnet50.RECIPE, "--method bag_of_tricks --warmup_steps 7 --model resnet18d")
    assert (settings["warmup_steps"], settings["warmup_epochs"], settings["model"]) == (7, 0, "resnet18d")


# ---- test only ----

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_MEAN, CIFAR10_STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)


@torch.inference_mode()
def top1_by_hand(network: torch.nn.Module, folder: str, mean: tuple, std: tuple) -> float:
    split = with_pixels(load_image_data(folder)["eval"], cifar_transform(False, mean=mean, std=std))
    images = torch.stack([example["pixel_values"] for example in split])
    logits = network.eval()(images)
    found = getattr(logits, "logits", logits).argmax(1)
    return (found == torch.tensor([example["labels"] for example in split])).float().mean().item()


def row_of(width: str, printed: str) -> list[float]:
    (row,) = (line for line in printed.splitlines() if line.startswith(f"| {width} "))
    return [float(cell) for cell in row.strip("| ").split("|")]


@pytest.mark.slow
def test_only_a_checkpoint_of_ours_is_evaluated_at_all_widths(run_recipe, few_images):
    trained = run_recipe(cifar_wideresnet.RECIPE, "--model resnet20_cifar --eval_widths 0.9 0.8")
    tested = run_recipe(
        cifar_wideresnet.RECIPE,
        f"--do_train false --do_eval --model {trained.folder} --eval_widths 0.9 0.8",
    )
    assert not (tested.folder / "results.json").exists()
    assert row_of("1", tested.printed)[1:] == pytest.approx([100 * trained.result[k] for k in ("top1", "top5")])
    for width, top1, top5 in trained.result["widths"]:
        assert row_of(f"{width:g}", tested.printed)[1:] == pytest.approx([100 * top1, 100 * top5])


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), CIFAR10_MEAN])
def test_only_a_checkpoint_of_timm_is_evaluated_with_its_own_mean(mean, tmp_path, run_recipe, few_images):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"mean": mean, "std": mean})
    for parameter in network.parameters():
        parameter.data.mul_(3)
    timm.models.save_for_hf(network, tmp_path / "checkpoint", safe_serialization=True)
    expected = top1_by_hand(network, few_images, mean, mean)
    flags = "--do_train false --do_eval --max_eval_samples 40"
    tested = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --model {tmp_path / 'checkpoint'}")
    assert row_of("1", tested.printed)[1] == pytest.approx(100 * expected, abs=1e-4)


def test_only_a_checkpoint_of_transformers_is_evaluated_and_trained_further(tmp_path, run_recipe, few_images):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    network = ResNetForImageClassification(config)
    network.save_pretrained(tmp_path)
    flags = f"--model {tmp_path} --max_eval_samples 40"
    tested = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --do_train false --do_eval")
    expected = top1_by_hand(network, few_images, CIFAR10_MEAN, CIFAR10_STD)
    assert row_of("1", tested.printed)[1] == pytest.approx(100 * expected, abs=1e-4)
    trained = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --learning_rate 1e-9 --weight_decay 0")
    again = ResNetForImageClassification.from_pretrained(trained.folder).eval()
    photo = PIL.Image.effect_noise((40, 50), 90).convert("RGB")
    with torch.no_grad():
        pixels = as_its_pipeline(cifar_transform(False), again)(photo)
        score, label = again(pixels[None]).logits.softmax(1).max(1)
    best = pipeline("image-classification", model=str(trained.folder), device="cpu")(photo)[0]
    assert best["label"] == CIFAR10_NAMES[label]
    assert best["score"] == pytest.approx(score.item(), abs=1e-6)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=0, atol=1e-6)
    with pytest.raises(SystemExit, match="cannot be trained with method 'stochdepth': it has no drop_path_rate"):
        run_recipe(cifar_wideresnet.RECIPE, f"{flags} --method stochdepth")


@pytest.mark.parametrize("flags", ["--do_train false --do_eval", ""], ids=["evaluate", "train"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_weights_that_are_cut_off_or_of_another_network_are_refused(library, flags, tmp_path, run_recipe):
    if library == "timm":
        network = timm.create_model("resnet20_cifar", num_classes=10)
        save_file(network.state_dict(), tmp_path / "model.safetensors")
        save_configs(network, tmp_path)
        missing = "layer1.0.conv1.weight"
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
        ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10)).save_pretrained(tmp_path)
        missing = "resnet.embedder.embedder.convolution.weight"
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    flags += f" --model {tmp_path}"
    file.write_bytes(whole[:-10])
    with pytest.raises(SystemExit, match="^error: .*model.safetensors is damaged or cut off"):
        run_recipe(cifar_wideresnet.RECIPE, flags)
    file.write_bytes(whole)
    state = load_file(file)
    del state[missing]
    save_file(state, file, metadata={"format": "pt"})
    if library == "timm" or "do_eval" in flags:
        with pytest.raises(SystemExit, match=f"^error: the weights of .*{missing}"):
            run_recipe(cifar_wideresnet.RECIPE, flags)


def test_only_a_checkpoint_with_other_classes_is_refused(tmp_path, run_recipe):
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=7), tmp_path, safe_serialization=True)
    with pytest.raises(SystemExit, match="has 7 classes, the data set 10"):
        run_recipe(cifar_wideresnet.RECIPE, f"--do_train false --do_eval --model {tmp_path}")


@pytest.mark.parametrize("recipe", [cifar_wideresnet.RECIPE, imagenet_resnet50.RECIPE], ids=["cifar", "imagenet"])
def test_a_pipeline_prepares_a_photo_as_the_recipe_s_evaluation_did(recipe, tmp_path, run_recipe, real_data):
    folder = run_recipe(recipe, "--model test_resnet --method baseline").folder
    photos = Dataset.from_parquet(str(real_data / "hymenoptera" / "validation.parquet"), cache_dir=str(tmp_path))
    photo = photos[0]["image"].convert("RGB").resize((450, 300))
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = recipe.transform(False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(photo)  # timm's of test_resnet
    with torch.no_grad():
        score, label = network(pixels[None]).softmax(1).max(1)
    best = pipeline("image-classification", model=str(folder), device="cpu")(photo)[0]
    assert best["label"] == CIFAR10_NAMES[label]
    assert best["score"] == pytest.approx(score.item(), abs=1e-5)


def test_a_checkpoint_is_trained_further_on_other_classes(tmp_path, run_recipe):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=7)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    save_configs(network, tmp_path, label_names=list("abcdefg"))
    flags = f"--model {tmp_path} --method baseline --learning_rate 1e-9 --weight_decay 0"
    folder = run_recipe(cifar_wideresnet.RECIPE, flags).folder
    again = AutoModelForImageClassification.from_pretrained(folder)
    assert list(again.config.id2label.values()) == CIFAR10_NAMES
    for name, parameter in network.named_parameters():
        if not name.startswith("fc."):
            torch.testing.assert_close(again.timm_model.get_parameter(name), parameter, rtol=0, atol=1e-6)


# ---- data and processes ----


STREAM = "--model resnet20_cifar --method baseline --streaming --batch_size 30"


def test_stream_is_trained_on_for_the_epochs_asked_for(run_recipe):
    flags = f"{STREAM} --max_steps -1 --num_train_epochs 2 --max_train_samples 100 --eval_strategy epoch"
    finished = run_recipe(cifar_wideresnet.RECIPE, flags)
    assert [step for step, _ in finished.result["curve"]] == [4, 8]  # 100 images are 4 batches


@pytest.mark.slow
def test_stream_of_shards_is_resumed_amid_an_epoch_with_the_numbers_of_workers_that_it_had(run_recipe):
    flags = "--model resnet20_cifar --streaming --batch_size 25 --max_steps -1 --num_train_epochs 2 "
    flags += "--eval_strategy epoch --save_strategy steps --save_steps 1 --save_total_limit 9 --num_subnets 1 "
    flags += "--dataloader_num_workers 2 --dataloader_persistent_workers true"
    whole = run_recipe(cifar_wideresnet.RECIPE, flags)
    assert [step for step, _ in whole.result["curve"]] == [4, 8]
    resumed = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --resume_from_checkpoint {whole.folder / 'checkpoint-6'}")
    first, second = (timm.create_model(f"local-dir:{run.folder}", pretrained=True) for run in (whole, resumed))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_stream_of_unknown_length_asks_for_the_steps(run_recipe, monkeypatch):
    monkeypatch.setattr("gradaug_hf.data.loading.count_images", lambda builder, splits: {})
    with pytest.raises(SystemExit, match="does not say how many images split 'train' has; give max_steps"):
        run_recipe(cifar_wideresnet.RECIPE, f"{STREAM} --max_steps -1")
    assert run_recipe(cifar_wideresnet.RECIPE, STREAM).result["steps"] == 2


def test_card_and_pictures_of_a_run_lie_next_to_its_results(run_recipe, few_images):
    finished = run_recipe(cifar_wideresnet.RECIPE, "--model wrn16_2 --max_steps 1")
    card = ModelCard.load(finished.folder / "README.md")
    top1 = card.data.eval_results[0]
    assert (top1.metric_value, top1.dataset_name) == (finished.result["top1"], Path(few_images).name)
    assert f"--dataset_name {Path(few_images).name} --output_dir {finished.folder.name}" in card.text
    assert str(finished.folder.parent) not in card.content
    assert sorted(file.name for file in (finished.folder / "plots").iterdir()) == ["curves.png", "subnets.png"]


@pytest.mark.slow
def test_sub_networks_may_see_turned_images(run_recipe):
    flags = "--model resnet20_cifar --resolutions 32 --max_steps 1"
    plain, turned = (run_recipe(cifar_wideresnet.RECIPE, f"{flags} {extra}") for extra in ("", "--subnet_rotation"))
    networks = [timm.create_model(f"local-dir:{run.folder}", pretrained=True) for run in (plain, turned)]
    assert not torch.equal(networks[0].fc.weight, networks[1].fc.weight)


@pytest.mark.slow
def test_resnet50_trains_on_photos_at_224(run_recipe, real_data):
    flags = f"--dataset_name {real_data}/imagenet-samples --eval_split train --batch_size 2 --max_eval_samples 2 "
    flags += (
        "--learning_rate 1e-3"  # diverging for want of images, the backward meets denormal numbers and takes minutes
    )
    finished = run_recipe(imagenet_resnet50.RECIPE, flags)
    assert finished.result["steps"] == 2
    assert finished.results["settings"]["resolutions"] == [224, 192, 160, 128]


def launch_twice(flags: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
    return subprocess.run(
        [*launcher, "recipes/cifar_wideresnet.py", *f"{QUICK} --model resnet20_cifar {flags}".split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_share_the_batch_and_speak_once(tmp_path, few_images):
    images = f"--dataset_name {few_images} --output_dir {tmp_path}"
    done = launch_twice(f"{images} --max_steps -1 --num_train_epochs 1 --batch_size 20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote the model and results.json") == 1
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["steps"] == TRAINING_IMAGES // 20


@pytest.mark.slow
def test_two_processes_end_in_one_message(tmp_path):
    done = launch_twice(f"--dataset_name /nowhere --output_dir {tmp_path}")
    assert done.returncode != 0
    assert done.stderr.count("error: dataset '/nowhere' cannot be loaded") == 1
    assert "main_process_first" not in done.stderr

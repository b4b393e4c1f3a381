import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    ViTImageProcessor,
)
from transformers import TimmWrapperForImageClassification as TimmWrapper
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.data.transforms import imagenet_transform
from gradaug_hf.hub.configs import (
    label_names,
    plain_state,
    save_configs,
    timm_network,
    warn_of_other_size,
    why_not_rebuilt,
)
from gradaug_hf.hub.preprocessing import as_its_pipeline, image_processor_of

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
# Loads folders with timm and with transformers.
LOAD = """
import sys
import timm, torch
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    images = torch.load(folder + "/images.pt")
    with torch.no_grad():
        found = [AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits]
        if '"timm_wrapper"' in open(folder + "/config.json").read():
            found.append(timm.create_model("local-dir:" + folder, pretrained=True).eval()(images))
    torch.save(found, folder + "/logits.pt")
"""
NAME_THE_PHOTO = """
import json, sys
from transformers import pipeline
photo, *folders = sys.argv[1:]
best = [pipeline("image-classification", model=folder, device="cpu")(photo)[0] for folder in folders]
print(json.dumps(best))
"""


def logits_by(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model.eval()(images)
    return getattr(output, "logits", output)


def write_folder(network: nn.Module, folder: Path, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(plain_state(network.state_dict()), folder / "model.safetensors")
    save_configs(network, folder, **options)
    return folder


def trained(
    model: nn.Module,
    folder: Path,
    *,
    side: int = 64,
    resolutions: tuple[int, ...] = (64, 48),
    channels: int = 3,
    steps: int = 1,
    resume: bool = False,
    **kwargs,
) -> GradAugTrainer:
    """A trainer after some steps on random images with named labels."""
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(channels, side, side), "labels": label} for label in range(7)]
    config = GradAugConfig(
        str(folder),
        max_steps=steps,
        num_subnets=1,
        resolutions=list(resolutions),
        report_to="none",
        use_cpu=True,
        save_steps=1,
        disable_tqdm=True,
    )
    trainer = GradAugTrainer(model, config, train_dataset=rows, **kwargs)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def wrapped() -> TimmWrapper:
    return TimmWrapper(TimmWrapperConfig(architecture="test_resnet", id2label=dict(enumerate(NAMES))))


def pretrained_wrapper(folder: Path) -> TimmWrapper:
    """A wrapper of a checkpoint that timm wrote, on images with another mean and deviation than timm's."""
    settings = {"mean": MEAN, "std": STD, "label_names": NAMES}
    network = timm.create_model("test_resnet", num_classes=7, pretrained_cfg_overlay=settings)
    timm.models.save_for_hf(network, folder, model_config={"label_names": NAMES}, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]  # which timm's own checkpoints on the Hub do not have, and transformers cannot read
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForImageClassification.from_pretrained(folder, num_labels=7)


def resnet() -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(NAMES))
    )
    return ResNetForImageClassification(config)


def vit() -> nn.Module:
    """A network of timm that takes images of one size alone."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, depth=2, global_pool="max")


def tied_resnet() -> nn.Module:
    """A network of timm in channels-last memory, of which two layers share their weights."""
    network = timm.create_model("test_resnet", num_classes=7).to(memory_format=torch.channels_last)
    first, second = network.layer1[0].bn1, network.layer1[0].bn2
    second.weight = first.weight
    return network


# ---- each way to make a model, and each folder that is written ----


def test_what_the_trainer_saves_loads_in_timm_and_transformers(tmp_path, elsewhere):
    models = {
        "timm": (lambda: timm.create_model("test_resnet", num_classes=7), {}),
        "wrapper": (wrapped, {}),
        "pretrained_wrapper": (lambda: pretrained_wrapper(tmp_path / "source"), {}),
        "resnet_of_transformers": (resnet, {"processing_class": ViTImageProcessor()}),
        "tied": (tied_resnet, {}),
        "grey": (lambda: timm.create_model("test_efficientnet", num_classes=7, in_chans=1), {"channels": 1}),
        "dynamic_vit": (
            lambda: timm.create_model("test_vit", num_classes=7, global_pool="avg", dynamic_img_size=True),
            {"side": 128, "resolutions": (128, 96)},
        ),
        "fixed_vit": (vit, {"resolutions": (64,)}),
    }
    expected = {}
    for name, (build, options) in models.items():
        model, images = trained_and_saved(build(), tmp_path / name, **options)
        for folder in (tmp_path / name, tmp_path / name / "checkpoint-1"):
            torch.save(images, folder / "images.pt")
            expected[folder] = logits_by(model, images)
    elsewhere.run(LOAD, *expected)
    for folder, logits in expected.items():
        found = torch.load(folder / "logits.pt")
        assert len(found) == (1 if "resnet_of_transformers" in str(folder) else 2)
        for by_library in found:
            assert torch.equal(by_library, logits), folder


def trained_and_saved(network: nn.Module, folder: Path, **options) -> tuple[nn.Module, Tensor]:
    """A model that was trained and saved, and images for it."""
    trainer = trained(network, folder, **options)
    model = trainer.model
    trainer.save_model()
    assert trainer.model is model
    side = options.get("side", 64)
    # As others load it; where the memory is in another order, kernels round differently.
    return model.to(memory_format=torch.contiguous_format), torch.randn(2, options.get("channels", 3), side, side)


def test_networks_of_the_paper_load_once_gradaug_hf_is_imported(tmp_path):
    network = timm.create_model("resnet20_cifar", num_classes=7)
    model, images = trained_and_saved(network, tmp_path, side=32, resolutions=(24,))
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
        by_transformers = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(logits_by(by_timm, images), logits_by(model, images))
        assert torch.equal(logits_by(by_transformers, images), logits_by(model, images))


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    for name, build in {
        "timm": lambda: timm.create_model("test_resnet", num_classes=7),
        "wrapper": wrapped,
        "resnet_of_transformers": resnet,
    }.items():
        torch.manual_seed(1)
        model = build()
        whole = trained(model, tmp_path / name, steps=2, processing_class=ViTImageProcessor())
        expected = {key: tensor.clone() for key, tensor in whole.model.state_dict().items()}
        for file in (tmp_path / name / "checkpoint-2").iterdir():
            file.unlink()
        (tmp_path / name / "checkpoint-2").rmdir()
        again = trained(build(), tmp_path / name, steps=2, resume=True, processing_class=ViTImageProcessor())
        assert again.state.global_step == 2
        for key, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_both_libraries_give_a_folder_another_number_of_classes(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=7)
    folder = str(write_folder(network, tmp_path, label_names=NAMES))
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    wrapper = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    for model, other in ((by_timm, by_timm), (wrapper, wrapper.timm_model)):
        assert other.fc.weight.shape[0] == 3
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(other.eval().forward_features(images), network.eval().forward_features(images))
        again = write_folder(other, tmp_path / type(model).__name__)
        config = json.loads((again / "config.json").read_text())
        assert config["num_classes"] == 3
        assert "label_names" not in config


# ---- the images ----


def with_other_statistics() -> nn.Module:
    settings = {"mean": MEAN, "std": STD}
    return timm.create_model("test_resnet", num_classes=7, global_pool="max", pretrained_cfg_overlay=settings)


def test_pipeline_names_the_class_of_a_photo_as_the_trained_network_does(tmp_path, real_data, elsewhere):
    photos = Dataset.from_parquet(str(next((real_data / "hymenoptera").rglob("*.parquet"))))
    photos[0]["image"].convert("RGB").save(tmp_path / "photo.png")
    models = {
        "wrapper": (wrapped, {}),
        "pretrained_wrapper": (lambda: pretrained_wrapper(tmp_path / "source"), {}),
        "other_statistics": (with_other_statistics, {}),
        "tied": (tied_resnet, {}),
        "dynamic_vit": (
            lambda: timm.create_model("test_vit", num_classes=7, dynamic_img_size=True),
            {"side": 128, "resolutions": (128, 96)},
        ),
        "resnet_of_transformers": (resnet, {}),
    }
    expected = {}
    for name, (build, options) in models.items():
        model = build()
        if isinstance(model, ResNetForImageClassification):
            evaluation = as_its_pipeline(imagenet_transform(False), model)
            options = {"processing_class": image_processor_of(evaluation, model)}
        else:
            config = resolve_model_data_config(timm_network(model))
            if name == "pretrained_wrapper":  # built with timm's own, not its checkpoint's
                config |= {"mean": MEAN, "std": STD}
            evaluation = create_transform(**config)
        model, _ = trained_and_saved(model, tmp_path / name, **options)
        with Image.open(tmp_path / "photo.png") as photo:
            score, label = logits_by(model, evaluation(photo)[None]).softmax(1)[0].max(0)
        names = label_names(model) or [f"LABEL_{index}" for index in range(7)]
        expected[tmp_path / name] = names[label], score.item()
    named = json.loads(elsewhere.run(NAME_THE_PHOTO, tmp_path / "photo.png", *expected))
    for folder, best, (label, score) in zip(expected, named, expected.values(), strict=True):
        assert best["label"] == label, folder
        assert best["score"] == pytest.approx(score, abs=1e-6), folder


def images_prepared_by(folder: Path) -> tuple[dict, dict]:
    """How timm and transformers prepare images for the network of a folder."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return resolve_model_data_config(network), AutoImageProcessor.from_pretrained(folder).data_config


def test_a_folder_keeps_the_statistics_of_the_checkpoint_that_was_trained_further(tmp_path):
    overlay = {"mean": MEAN, "std": STD}
    network = timm.create_model("test_resnet", num_classes=7, pretrained_cfg_overlay=overlay)
    wrapper = pretrained_wrapper(tmp_path / "source")
    assert wrapper.timm_model.pretrained_cfg["mean"] != MEAN  # which is therefore no place to look
    write_folder(network, tmp_path / "timm")
    wrapper.timm_model.load_state_dict(network.state_dict())
    folder = tmp_path / "wrapper"
    write_folder(wrapper.timm_model, folder)
    save_configs(wrapper, folder)
    for folder in (tmp_path / "timm", tmp_path / "wrapper"):
        for config in images_prepared_by(folder):
            assert (tuple(config["mean"]), tuple(config["std"])) == (MEAN, STD)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 96, "width": 96}, resample=3, image_mean=MEAN, image_std=STD),
        TimmWrapperImageProcessor(
            {
                "mean": MEAN,
                "std": STD,
                "input_size": (3, 96, 96),
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "squash",
            }
        ),
    ],
    ids=["vit", "timm"],
)
def test_a_folder_takes_over_what_the_image_processor_does(processor, tmp_path):
    network = timm.create_model("test_resnet", num_classes=7)
    folder = write_folder(network, tmp_path, processor=processor)
    for config in images_prepared_by(folder):
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == {
            "mean": MEAN,
            "std": STD,
            "input_size": (3, 96, 96),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }


def test_what_a_processor_says_does_not_break_a_network_of_another_input(tmp_path):
    processor = ViTImageProcessor(size={"height": 96, "width": 96})
    fixed = write_folder(vit(), tmp_path / "fixed", processor=processor)
    grey = write_folder(timm.create_model("test_resnet", in_chans=1), tmp_path / "grey", processor=processor)
    assert images_prepared_by(fixed)[0]["input_size"] == (3, 64, 64)
    assert images_prepared_by(grey)[0]["input_size"] == (1, 96, 96)


@pytest.mark.parametrize("build", [lambda: timm.create_model("test_resnet", num_classes=7), wrapped, resnet])
def test_images_of_another_size_than_the_folder_says_are_warned_of(build, tmp_path):
    model, processor = build(), ViTImageProcessor(size={"height": 96, "width": 96})
    with pytest.warns(UserWarning, match="images of 64 x 64 pixels were evaluated, but .* will have 96 x"):
        warn_of_other_size(model, processor, (64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_size(model, processor, (96, 96))
        if timm_network(model) is None:
            warn_of_other_size(model, None, (64, 64))  # no preprocessor_config.json is written
            return
    write_folder(timm_network(model), tmp_path)
    side = AutoImageProcessor.from_pretrained(tmp_path).data_config["input_size"][-1]
    with pytest.warns(UserWarning, match=f"preprocessor_config.json will have {side} x {side}: give the trainer the"):
        warn_of_other_size(model, None, (64, 64))


# ---- the classes ----


def test_class_names_come_from_the_configuration_or_else_from_the_data():
    features = Features({"label": ClassLabel(names=NAMES)})
    data = Dataset.from_dict({"label": [0, 1]}, features=features)
    network = timm.create_model("test_resnet")
    assert label_names(wrapped()) == NAMES
    assert label_names(network, None, data) == NAMES
    assert label_names(network, [1, 2]) is None

    class Images:  # as torchvision's ImageFolder
        classes = NAMES

    assert label_names(network, Images()) == NAMES


def test_names_and_descriptions_of_the_classes_are_kept_while_the_classes_are_the_same(tmp_path):
    descriptions = {name: f"an animal, the {name}" for name in NAMES}
    network = timm.create_model("test_resnet", num_classes=7)
    network.pretrained_cfg |= {"num_classes": 7, "label_names": NAMES, "label_descriptions": descriptions}
    kept = json.loads((write_folder(network, tmp_path / "kept") / "config.json").read_text())
    assert (kept["label_names"], kept["label_descriptions"]) == (NAMES, descriptions)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "kept")
    assert loaded.config.id2label == dict(enumerate(NAMES))

    others = [name.upper() for name in NAMES]
    new = json.loads((write_folder(network, tmp_path / "new", label_names=others) / "config.json").read_text())
    assert new["label_names"] == others
    assert "label_descriptions" not in json.dumps(new)


def test_names_that_are_not_of_the_network_s_classes_are_left_out(tmp_path):
    folder = write_folder(timm.create_model("test_resnet", num_classes=7), tmp_path, label_names=NAMES[:5])
    assert "label_names" not in json.loads((folder / "config.json").read_text())


# ---- what cannot be said in a folder ----


def test_only_networks_that_timm_built_are_timm_networks():
    network = timm.create_model("test_resnet")
    assert timm_network(network) is network
    model = wrapped()
    assert timm_network(model) is model.timm_model
    assert timm_network(nn.Linear(2, 2)) is None
    assert timm_network(resnet()) is None


def test_a_changed_network_says_so_and_keeps_its_weights_alone(tmp_path):
    network = timm.create_model("test_resnet", num_classes=7)
    assert why_not_rebuilt(network) is None
    network.fc = nn.Sequential(nn.Linear(96, 20), nn.Linear(20, 7))
    with pytest.warns(UserWarning, match=r"this ResNet will have its weights alone:.*fc.0.bias the shape None inst"):
        trainer = trained(network, tmp_path)
    trainer.save_model()
    assert not (tmp_path / "config.json").exists()
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


def test_an_argument_that_is_no_json_is_named():
    network = timm.create_model("test_resnet", act_layer=nn.SiLU)
    assert "its argument act_layer is <class" in why_not_rebuilt(network)
    assert why_not_rebuilt(timm.create_model("test_resnet", act_layer="silu")) is None


def test_a_network_of_transformers_without_an_image_processor_is_said_to_lack_it(tmp_path, recwarn):
    lacking = "give GradAugTrainer the image processor as processing_class"
    trained(resnet(), tmp_path / "with", processing_class=ViTImageProcessor())
    assert not [warning for warning in recwarn if lacking in str(warning.message)]
    with pytest.warns(UserWarning, match=lacking):
        trained(resnet(), tmp_path / "without")


def test_tensors_that_share_memory_or_are_not_contiguous_are_stored_one_by_one(tmp_path):
    matrix = torch.randn(3, 4)
    state = {"a": matrix, "tied": matrix, "turned": matrix.t(), "row": matrix[1]}
    safetensors.torch.save_file(plain_state(state), tmp_path / "x.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_network_that_no_library_knows_may_tie_its_tensors(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(3, 7))
    network[1].weight = network[0].weight
    trained(network, tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert torch.equal(weights["1.weight"], network[0].weight)

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification, TimmWrapperForImageClassification

from gradaug_hf.detection.detector import Detector, DetectorConfig, create_detector, load_backbone
from gradaug_hf.hub.configs import save_configs
from gradaug_hf.hub.networks import image_processor
from gradaug_hf.slimming import slicing_report
from tests.detection.conftest import CATEGORIES

SMALL = {"min_size": 64, "max_size": 96, "channels": 16, "box_head_size": 32, "rois_per_image": 16}


def make_detector(backbone: str = "test_resnet", **settings) -> Detector:
    torch.manual_seed(0)
    return create_detector(backbone, CATEGORIES, **(SMALL | settings))[0]


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 96, generator=generator), torch.rand(3, 90, 64, generator=generator)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[torch.nn.Module, str]:
    """A network of timm with five classes, and a folder of it."""
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", num_classes=5)
    folder = tmp_path_factory.mktemp("classifier")
    timm.models.save_for_hf(network, folder)
    save_configs(network, folder)
    return network, str(folder)


def test_the_pyramid_has_the_deepest_map_of_each_stride_from_four_on():
    detector = make_detector()
    pyramid = detector.rcnn.backbone
    assert pyramid.strides == [4, 8, 16, 32]
    levels = pyramid(torch.zeros(2, 3, 64, 96))
    sizes = {"0": (16, 24), "1": (8, 12), "2": (4, 6), "3": (2, 3), "pool": (1, 2)}
    assert {name: tuple(level.shape) for name, level in levels.items()} == {n: (2, 16, *s) for n, s in sizes.items()}
    anchors = [sizes for ((sizes),) in ((level,) for level in detector.rcnn.rpn.anchor_generator.sizes)]
    assert anchors == [(32,), (64,), (128,), (256,), (512,)]


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_convnext", "test_vit"])
def test_networks_of_other_families_are_backbones(backbone):
    detector = make_detector(backbone).eval()
    assert set(detector(images())[0]) == {"boxes", "labels", "scores", "masks"}
    detector.make_slimmable()
    assert slicing_report(detector).sliced_macs > 0


def test_a_network_without_feature_maps_is_refused():
    with pytest.raises(ValueError, match="WideResNet does not give its feature maps"):
        make_detector("wrn16_2")


def test_a_network_of_one_image_size_is_refused_with_what_helps():
    with pytest.raises(ValueError, match=r"cannot take images of 64 x 96 pixels .* backbone_args .*dynamic_img_size"):
        make_detector("vit_tiny_patch16_224")
    detector = make_detector("vit_tiny_patch16_224", backbone_args={"dynamic_img_size": True})
    assert detector.settings.backbone_args["dynamic_img_size"]


def test_a_slimmable_detector_gives_the_same_detections_and_has_the_same_state():
    detector = make_detector().eval()
    before, keys = detector(images()), list(detector.state_dict())
    detector.make_slimmable()
    assert list(detector.state_dict()) == keys
    for each, other in zip(detector(images()), before, strict=True):
        assert all(torch.equal(each[name], other[name]) for name in other)


def test_backbone_and_laterals_are_sliced_and_nothing_else():
    detector = make_detector()
    detector.make_slimmable()
    sliced = {name for name, module in detector.named_modules() if hasattr(type(module), "_unsliced")}
    assert {name for name in sliced if "laterals" in name} == {
        f"rcnn.backbone.bottom_up.laterals.{i}" for i in range(4)
    }
    assert all(name.startswith("rcnn.backbone.bottom_up.") for name in sliced)
    assert slicing_report(detector).sliced_macs == 1


def test_the_weights_of_a_checkpoint_are_the_backbones_and_the_rest_is_listed(classifier):
    network, folder = classifier
    detector, loaded = create_detector(folder, CATEGORIES, **SMALL)
    weights = network.state_dict()
    body = detector.bottom_up.body.model.state_dict()
    assert body.keys() == weights.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in body.items())
    assert f"{len(body)} of {len(weights)} tensors of {folder}" in loaded
    assert loaded.endswith("missing: none; left over: fc.weight, fc.bias")


def test_a_checkpoint_of_transformers_around_a_timm_network_is_a_backbone(classifier, tmp_path):
    network, folder = classifier
    TimmWrapperForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    assert image_processor(str(tmp_path)) is None
    detector, _ = create_detector(str(tmp_path), CATEGORIES, **SMALL)
    body = detector.bottom_up.body.model
    assert torch.equal(body.layer1[0].conv1.weight, network.layer1[0].conv1.weight)


def test_a_network_of_transformers_alone_is_refused(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a ResNetForImageClassification; it must be a network of timm"):
        create_detector(str(tmp_path), CATEGORIES)


def test_missing_weights_are_listed(classifier):
    network, _ = classifier
    weights = network.state_dict()
    del weights["layer1.0.conv1.weight"]
    assert "missing: layer1.0.conv1.weight; " in load_backbone(make_detector(), weights, "somewhere")


def test_the_statistics_of_the_images_are_the_networks_own():
    transform = make_detector("test_vit").rcnn.transform
    expected = timm.get_pretrained_cfg("test_vit")
    assert tuple(transform.image_mean) == expected.mean
    assert tuple(transform.image_std) == expected.std


def test_a_saved_detector_is_loaded_as_it_was(tmp_path):
    detector = make_detector(detector="faster_rcnn", anchor_scale=2.0).eval()
    detector.save_config(tmp_path)
    save_file(detector.state_dict(), tmp_path / "model.safetensors")
    loaded = Detector.load(str(tmp_path)).eval()
    assert loaded.settings.categories == CATEGORIES
    for each, other in zip(loaded(images()), detector(images()), strict=True):
        assert each.keys() == other.keys() == {"boxes", "labels", "scores"}
        assert all(torch.equal(each[name], other[name]) for name in other)


@pytest.mark.parametrize("text", ["{", "{}", '{"backbone": "test_resnet", "categories": [], "colour": 1}'])
def test_a_folder_of_something_else_is_refused_by_its_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        Detector.load(str(tmp_path))


def test_weights_that_are_missing_or_of_another_detector_are_refused(tmp_path):
    make_detector().save_config(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        Detector.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        Detector.load(str(tmp_path))
    save_file(make_detector(channels=8).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are not those of its config.json"):
        Detector.load(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "yolo"}, "detector is 'yolo'; it must be one of 'mask_rcnn', 'faster_rcnn'"),
        ({"min_size": 0}, "min_size is 0"),
        ({"max_size": 63}, "max_size is 63; it must be at least min_size, 64"),
        ({"anchor_scale": 0.0}, "anchor_scale is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig(backbone="test_resnet", categories=CATEGORIES, **(SMALL | settings))


def test_the_size_of_images_comes_back_after_a_pass_and_after_an_error():
    detector = make_detector().eval()
    seen = []
    detector.rcnn.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    transform = detector.rcnn.transform
    detector(images()[:1], resolution=32)
    detector(images()[:1])
    detector([torch.rand(3, 40, 120)], resolution=32)  # at most 48 long: 16 x 48, padded to multiples of 32
    with pytest.raises(AssertionError):
        detector([torch.zeros(3)], resolution=32)
    assert seen == [(32, 64), (64, 96), (32, 64)]
    assert (transform.min_size, transform.max_size) == ((64,), 96)


def test_the_first_images_do_not_mislead_the_pools():
    """An image of 40 pixels is padded to 64, so that its maps are larger than their strides foretell."""
    detector = make_detector(min_size=40, max_size=40).eval()
    detector([torch.rand(3, 40, 40)])
    assert detector.rcnn.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_the_config_is_json_of_plain_values(tmp_path):
    make_detector().save_config(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["backbone"] == "test_resnet"
    assert content["categories"] == CATEGORIES

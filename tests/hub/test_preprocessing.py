import numpy as np
import PIL.Image
import pytest
import timm
import torch
from timm.data import create_transform
from torchvision.transforms import v2
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    PoolFormerImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from gradaug_hf.data.transforms import cifar_transform, imagenet_transform
from gradaug_hf.hub.preprocessing import (
    as_its_pipeline,
    image_processor_doing,
    image_processor_of,
    input_config,
    processor_data_config,
    transform_data_config,
)

STATISTICS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
ROUNDING = 2e-6  # of pixels between 0 and 255, divided and then multiplied, or the other way round


@pytest.fixture
def photo() -> PIL.Image.Image:
    generator = np.random.default_rng(0)
    return PIL.Image.fromarray(generator.integers(0, 256, (230, 311, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "transform",
    [
        cifar_transform(False, **STATISTICS),
        cifar_transform(False, size=48),
        imagenet_transform(False),
        v2.Compose(
            [
                v2.Resize(301, v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(299),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [1.0] * 3),
            ]
        ),
    ],
)
def test_timm_does_to_an_image_what_an_evaluation_transform_does(transform, photo):
    expected = transform(photo)
    found = create_transform(**transform_data_config(transform))(photo)
    assert torch.allclose(found, expected, rtol=0, atol=ROUNDING)


def test_timm_resizes_to_exactly_the_side_of_the_transform():
    for side in range(224, 600):
        config = transform_data_config(v2.Compose([v2.Resize(side), v2.CenterCrop(224), v2.Normalize([0.5], [0.5])]))
        assert create_transform(**config).transforms[0].size == side


def test_a_transform_that_timm_cannot_repeat_is_refused():
    with pytest.raises(ValueError, match="has no CenterCrop, only Resize, Normalize"):
        transform_data_config(v2.Compose([v2.Resize(9), v2.Normalize([0], [1])]))


# Sides of 120 and 162 pixels, so that both libraries agree on where the middle is.
@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 96, "width": 96}, resample=3, image_mean=[0.1] * 3),
        BitImageProcessorPil(size={"shortest_edge": 120}, crop_size={"height": 96, "width": 96}, resample=2),
        ConvNextImageProcessorPil(size={"shortest_edge": 96}, crop_pct=0.8),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        PoolFormerImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, crop_pct=0.8),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_timm_does_to_an_image_what_a_processor_of_transformers_does(processor, photo):
    expected = processor(photo, return_tensors="pt")["pixel_values"][0]
    found = create_transform(**processor_data_config(processor))(photo)
    assert torch.allclose(found, expected, rtol=0, atol=ROUNDING)


def test_a_processor_that_only_normalises_says_only_how():
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    assert processor_data_config(processor) == {"mean": (0.1, 0.1, 0.1), "std": (0.2, 0.2, 0.2)}


def test_the_processor_of_a_transform_does_what_it_does(photo):
    transform = imagenet_transform(False, **STATISTICS)
    network = timm.create_model("test_resnet")
    processor = image_processor_of(transform, network)
    assert isinstance(processor, TimmWrapperImageProcessor)
    assert torch.allclose(processor(photo)["pixel_values"][0], transform(photo), rtol=0, atol=ROUNDING)

    resnet = ResNetForImageClassification(ResNetConfig(depths=[1], hidden_sizes=[8]))
    processor = image_processor_of(transform, resnet)
    own = BitImageProcessorPil.from_dict(processor.to_dict())
    assert torch.allclose(own(photo, return_tensors="pt")["pixel_values"][0], transform(photo), rtol=0, atol=ROUNDING)
    found = processor(photo, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(found, as_its_pipeline(transform, resnet)(photo), rtol=0, atol=ROUNDING)
    assert as_its_pipeline(transform, network) is transform


@pytest.mark.parametrize(
    ("side", "crop_pct", "expected"),
    [
        (None, None, (224, 0.875)),  # the model's own
        (224, None, (224, 0.875)),
        (288, None, (288, 0.875)),
        (96, None, (96, 0.8)),  # a smaller size keeps less of the photo
        (96, 0.875, (96, 0.875)),
        (None, 1.0, (224, 1.0)),
    ],
)
def test_a_model_of_timm_is_evaluated_by_its_own_crop_and_a_smaller_size_by_a_closer_one(side, crop_pct, expected):
    model = timm.create_model("tf_efficientnet_lite0")
    config = input_config(model, None, side, crop_pct)
    assert (*config["input_size"][1:], config["crop_pct"]) == (expected[0], *expected)
    assert config["crop_mode"] == "center"


def test_a_crop_that_keeps_less_than_the_closer_one_stays():
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 0.7, "crop_mode": "center"}
    assert input_config(model, None, 64)["crop_pct"] == 0.7


def test_a_processor_that_squashes_does_so_at_another_size_and_crops_where_it_is_told_to(photo):
    model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8))
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    squashed = input_config(model, processor, 96)
    assert (squashed["crop_mode"], squashed["crop_pct"]) == ("squash", 1.0)
    cropped = input_config(model, processor, 96, 0.75)
    pixels = image_processor_doing(cropped, model)(photo, return_tensors="pt")["pixel_values"][0]
    expected = v2.functional.center_crop(v2.functional.resize(photo, 128, cropped["interpolation"]), 96)
    mean, std = (torch.tensor(cropped[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert (
        pixels * std + mean - v2.functional.to_dtype(v2.functional.pil_to_tensor(expected), scale=True)
    ).abs().max() < 1.5 / 255

import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from transformers import ResNetConfig, ResNetForImageClassification, TimmWrapperForImageClassification

from gradaug_hf.data.transforms import cifar_transform, imagenet_transform
from gradaug_hf.experiments.evaluation.pixels import (
    PixelNetwork,
    load_pixel_network,
    native_side,
    pixel_transform,
    to_unit,
    weights_digest,
)
from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD
from tests.helpers.checkpoints import save_network


def image(width: int, height: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize(("size", "side"), [((32, 32), 32), ((40, 50), 32), ((300, 400), 224)])
def test_pixels_behind_the_normalisation_are_what_the_recipes_evaluate_on(size: tuple[int, int], side: int):
    if side == 32:
        expected = cifar_transform(False)(image(*size))
        mean, std = CIFAR_MEAN, CIFAR_STD
    else:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        expected = imagenet_transform(False, mean=mean, std=std)(image(*size))
    pixels = pixel_transform(side)(image(*size))
    assert pixels.dtype == torch.uint8
    normalised = PixelNetwork(torch.nn.Flatten(), mean, std)(to_unit(pixels)[None])
    torch.testing.assert_close(normalised[0], expected.flatten())


def test_an_image_that_is_very_long_is_quick():
    start = time.process_time()
    assert pixel_transform(224)(image(30_000, 1)).shape == (3, 224, 224)
    assert time.process_time() - start < 1


def test_a_loaded_network_is_evaluated_and_gets_no_gradients(tmp_path):
    folder = save_network(tmp_path / "net", seed=0)
    network = load_pixel_network(folder, ["a", "b", "c"])
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert native_side(network) == 32
    pixels = torch.rand(2, 3, 32, 32)
    outside = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    torch.testing.assert_close(network(pixels), outside((pixels - mean) / std))


def test_a_network_of_timm_in_the_wrapper_of_transformers_has_the_same_logits(tmp_path):
    folder = save_network(tmp_path / "net", seed=0)
    TimmWrapperForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "wrapped")
    processor = Path(folder) / "preprocessor_config.json"
    (tmp_path / "wrapped" / processor.name).write_text(processor.read_text())
    pixels = torch.rand(2, 3, 32, 32)
    logits = [load_pixel_network(str(path), ["a", "b", "c"])(pixels) for path in (folder, tmp_path / "wrapped")]
    torch.testing.assert_close(*logits)


def test_a_network_that_does_not_say_how_its_images_are_normalised_is_refused(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not say by which mean and std.*preprocessor_config.json"):
        load_pixel_network(str(tmp_path), ["a", "b", "c"])


def test_digest_tells_weights_apart(tmp_path):
    first, again, other = (
        load_pixel_network(save_network(tmp_path / name, seed), ["a", "b", "c"])
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert weights_digest(first) == weights_digest(again) != weights_digest(other)
    other.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(other)

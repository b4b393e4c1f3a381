import numpy as np
import PIL.Image
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import ResNetConfig, ResNetForImageClassification, default_data_collator

from gradaug_hf.data.collator import collate_images
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.trainer.trainer import GradAugTrainer

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
INTEGERS = [
    *(dtype for dtype in (int, np.int8, np.int16, np.int32, np.uint8, np.uint16)),
    *(dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64)),
]


def label(dtype: type | torch.dtype, value: int) -> object:
    return torch.tensor(value, dtype=dtype) if isinstance(dtype, torch.dtype) else dtype(value)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_integer_labels_of_every_kind_become_int64(dtype: type | torch.dtype, named: bool):
    pairs = [(image, label(dtype, value)) for image, value in zip(IMAGES, (3, 100), strict=True)]
    examples = [{"pixel_values": image, "labels": number} for image, number in pairs] if named else pairs
    batch = collate_images(examples)
    assert list(batch) == ["pixel_values", "labels"]
    assert torch.equal(batch["pixel_values"], IMAGES)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [3, 100]


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_probabilities_stay_as_they_are(make):
    batch = collate_images([(image, make([0.25, 0.75])) for image in IMAGES])
    assert batch["labels"].is_floating_point()
    assert batch["labels"].tolist() == [[0.25, 0.75]] * 2


def test_other_examples_are_those_of_the_default_collator():
    examples = [{"pixel_values": image, "label": 1, "row": 7, "mask": None, "name": "a"} for image in IMAGES]
    batch, expected = collate_images(examples), default_data_collator(examples)
    assert batch.keys() == expected.keys()
    for name in expected:
        assert torch.equal(batch[name], expected[name])
        assert batch[name].dtype == expected[name].dtype
    assert collate_images([{"labels": True}] * 2)["labels"].dtype == torch.bool


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "timm":
        return timm.create_model("test_resnet", num_classes=2)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    return ResNetForImageClassification(config)


def torch_collator(examples: list[tuple[Tensor, object]]) -> dict[str, Tensor]:
    return dict(zip(("pixel_values", "labels"), default_collate(examples), strict=True))


@pytest.mark.parametrize("kind", ["timm", "transformers"])
@pytest.mark.parametrize(
    ("num_subnets", "collator", "dtype"),
    [(0, None, torch.int32), (1, None, torch.uint8), (1, torch_collator, torch.int32), (1, torch_collator, int)],
)
def test_pairs_train_and_are_evaluated_whatever_integers_their_labels_are(
    tmp_path, kind: str, num_subnets: int, collator, dtype
):
    pairs = [(torch.randn(3, 32, 32), label(dtype, index % 2)) for index in range(4)]
    args = GradAugConfig(
        str(tmp_path), num_subnets=num_subnets, resolutions=[32], max_steps=1, per_device_train_batch_size=4,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = GradAugTrainer(
        network(kind), args, data_collator=collator, train_dataset=pairs, eval_dataset=pairs,
        compute_metrics=topk_accuracy,
    )  # fmt: skip
    assert trainer.train().training_loss > 0
    evaluated = trainer.evaluate()
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in pairs]))
    logits = logits if isinstance(logits, Tensor) else logits.logits
    labels = torch.tensor([0, 1, 0, 1])
    assert evaluated["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert evaluated["eval_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((IMAGES[0], 1, "a.png"), "an example is a tuple of 3; expected a pair of image and label"),
        ((PIL.Image.new("RGB", (4, 4)), 1), "one of Pillow; give its dataset a transform that makes it a tensor"),
    ],
)
def test_example_that_is_no_pair_is_refused(example: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        collate_images([example])

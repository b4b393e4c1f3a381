import copy
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
from transformers import TrainingArguments, default_data_collator

from gradaug_hf.trainer.checks import (
    LabelCheckingCollator,
    check_checkpointing,
    check_even_batches,
    check_launch,
    check_output_dir,
)
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.utils.compat import ACTIVATION_CHECKPOINTING


@pytest.fixture
def args(tmp_path) -> GradAugConfig:
    return GradAugConfig(str(tmp_path / "out"), report_to="none", use_cpu=True)


def test_an_output_folder_is_made(args, tmp_path):
    check_output_dir(args)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_named(args, tmp_path):
    (tmp_path / "file").write_text("")
    args.output_dir = str(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="output_dir is '.*/file/out', which cannot be written"):
        check_output_dir(args)
    args.output_dir = "/proc/self"
    with pytest.raises(ValueError, match="output_dir is '/proc/self', which cannot be written"):
        check_output_dir(args)


def test_one_process_on_the_cpu_is_fine(args):
    check_launch(args, deepspeed=False)


def test_several_gpus_in_one_process_are_refused_with_the_launch_line(args):
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch --num_processes 2"):
        check_launch(args, deepspeed=False)


def test_what_does_not_bear_several_backwards_is_refused_unless_joint(args):
    with pytest.raises(ValueError, match='DeepSpeed .* set subnet_backward="joint"'):
        check_launch(args, deepspeed=True)
    args.optim = SimpleNamespace(value="adalomo")
    with pytest.raises(ValueError, match="optim is 'adalomo'.*joint"):
        check_launch(args, deepspeed=False)
    args.subnet_backward = "joint"
    check_launch(args, deepspeed=True)


def test_a_static_graph_is_refused_also_when_joint(args):
    args.subnet_backward = "joint"
    args.ddp_static_graph = True
    with pytest.raises(ValueError, match="ddp_static_graph is True"):
        check_launch(args, deepspeed=False)


def test_processes_with_unequal_numbers_of_batches_are_refused(args, tmp_path, monkeypatch):
    uneven = GradAugConfig(str(tmp_path), use_cpu=True, accelerator_config={"even_batches": False})
    check_even_batches(uneven, range(17))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    check_even_batches(args, range(17))
    check_even_batches(uneven, range(32))
    with pytest.raises(
        ValueError, match=r"even_batches False, and 17 images are no multiple of 16 .*even_batches=True"
    ):
        check_even_batches(uneven, range(17))
    uneven.dataloader_drop_last = True
    check_even_batches(uneven, range(17))


def test_activation_checkpointing_is_refused_with_a_joint_backward(args):
    network = timm.create_model("test_resnet")
    network.set_grad_checkpointing()
    check_checkpointing(network, args)
    args.subnet_backward = "joint"
    with pytest.raises(ValueError, match='subnet_backward="sequential"'):
        check_checkpointing(network, args)
    check_checkpointing(timm.create_model("test_resnet"), args)


class Mixing:
    """A collator whose user switches it on and off."""

    def __init__(self) -> None:
        self.factor = 2.0

    def __call__(self, features: list) -> dict:
        batch = default_data_collator(features)
        return {**batch, "pixel_values": self.factor * batch["pixel_values"]}


def test_attributes_of_the_collator_can_be_read_and_set():
    collate = LabelCheckingCollator(Mixing(), 3)
    collate.factor += 1
    for collator in (collate, pickle.loads(pickle.dumps(collate)), copy.deepcopy(collate)):
        assert collator.factor == 3
        assert collator([{"pixel_values": torch.ones(1, 1, 1), "labels": 0}])["pixel_values"].item() == 3
        assert not hasattr(collator, "missing")


def test_an_empty_training_set_is_refused(args):
    args.num_subnets = 1
    with pytest.raises(ValueError, match="train_dataset has no images; it must have at least one"):
        GradAugTrainer(timm.create_model("test_resnet"), args, train_dataset=[])


def test_labels_are_checked_where_batches_are_made():
    collate = LabelCheckingCollator(default_data_collator, 3)
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "labels": label} for label in (0, 2)]
    assert collate(rows)["labels"].tolist() == [0, 2]
    assert "labels" not in collate([{"pixel_values": torch.zeros(3, 2, 2)}])
    rows[1]["labels"] = 3
    with pytest.raises(ValueError, match=r"label 3 is out of range; the model has classes 0\.\.2"):
        collate(rows)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint16])
def test_class_indices_of_any_integers_become_those_that_every_loss_takes(dtype):
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "labels": torch.tensor(label, dtype=dtype)} for label in (0, 2)]
    labels = LabelCheckingCollator(default_data_collator, 3)(rows)["labels"]
    assert (labels.tolist(), labels.dtype) == ([0, 2], torch.int64)
    rows[1]["labels"] = torch.tensor(3, dtype=dtype)
    with pytest.raises(ValueError, match="label 3 is out of range"):
        LabelCheckingCollator(default_data_collator, 3)(rows)


@pytest.mark.parametrize("num_classes", [3, None])
def test_soft_labels_that_are_no_probabilities_are_refused_as_multi_label(num_classes):
    collate = LabelCheckingCollator(default_data_collator, num_classes)
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "labels": torch.tensor([0.5, 0.5, 0.0])} for _ in range(2)]
    assert collate(rows)["labels"].dtype == torch.float32
    rows[1]["labels"] = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"soft label 1 of a batch sums to 2 .*\(multi-label\).*problem_type"):
        collate(rows)


def test_the_attributes_of_a_collator_are_not_hidden():
    class Collator:
        def __init__(self) -> None:
            self.mix_off = False

        def __call__(self, features):
            return default_data_collator(features)

    collate = LabelCheckingCollator(Collator(), 3)
    assert collate.mix_off is False
    assert copy.deepcopy(collate).mix_off is False
    assert pickle.loads(pickle.dumps(LabelCheckingCollator(default_data_collator, 3))).num_classes == 3
    with pytest.raises(AttributeError, match="nothing"):
        _ = collate.nothing


def test_checkpointing_that_the_network_cannot_switch_on_is_refused(args):
    setattr(args, ACTIVATION_CHECKPOINTING, True)
    with pytest.raises(
        ValueError, match=rf"{ACTIVATION_CHECKPOINTING} is True, which ResNet .*set_grad_checkpointing\(\)"
    ):
        check_checkpointing(timm.create_model("test_resnet"), args)

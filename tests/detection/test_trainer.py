import copy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import SequentialSampler

from gradaug_hf import GradAugConfig, Subnet, SubnetSampler
from gradaug_hf.detection.coco import CocoImages, collate
from gradaug_hf.detection.detector import Detector
from gradaug_hf.detection.trainer import DetectionGradAug, DetectionTrainer
from gradaug_hf.objective.sampling import Part
from gradaug_hf.objective.transforms import RandomQuarterTurn
from tests.detection.conftest import HEIGHT, WIDTH
from tests.detection.test_detector import make_detector
from tests.detection.test_evaluation import by_hand

SUBNETS = [Subnet(0.85, 64), Subnet(0.7, 48), Subnet(0.5, 40)]
WEIGHT = 0.7
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}


def make_batch(data: CocoImages, indices: tuple[int, ...] = (0, 2, 1)) -> tuple[list[Tensor], list[dict]]:
    batch = collate([data[index] for index in indices])
    return batch["pixel_values"], batch["labels"]


def in_double(images: list[Tensor], targets: list[dict]) -> tuple[list[Tensor], list[dict]]:
    return [image.double() for image in images], [{**t, "boxes": t["boxes"].double()} for t in targets]


def sample_alike(detector: Detector) -> None:
    """Anchors and proposals are sampled from the same random numbers in each pass."""
    detector.rcnn.rpn.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)


@contextmanager
def zeroed(body: nn.Module, width: float):
    """Channels of the backbone that a width leaves out are zero behind every norm."""

    def mask(norm: nn.BatchNorm2d, args: tuple, out: Tensor) -> Tensor:
        kept = max(1, int(norm.num_features * width + 0.5))
        return out * (torch.arange(norm.num_features) < kept)[:, None, None].to(out)

    hooks = [norm.register_forward_hook(mask) for norm in body.modules() if isinstance(norm, nn.BatchNorm2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def resized(images: list[Tensor], targets: list[dict], side: int) -> tuple[list[Tensor], list[dict]]:
    """Images of 64 x 96 pixels and what is in them, with another shorter side."""
    size, ratio = (side, side * WIDTH // HEIGHT), side / HEIGHT
    new = []
    for target in targets:
        masks = functional.interpolate(target["masks"][:, None].float(), size, mode="nearest")[:, 0].byte()
        new.append({**target, "boxes": target["boxes"] * ratio, "masks": masks})
    return [functional.interpolate(i[None], size, mode="bilinear", align_corners=False)[0] for i in images], new


def gradients_by_hand(
    detector: Detector, images: list[Tensor], targets: list[dict]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of torchvision's detector, its backbone masked and its images resized beforehand."""
    detector = copy.deepcopy(detector)
    sample_alike(detector)
    detector.rcnn.transform._skip_resize = True
    total = sum(detector.rcnn(images, targets).values())
    for subnet in SUBNETS:
        with zeroed(detector.bottom_up.body, subnet.width):
            total = total + WEIGHT * sum(detector.rcnn(*resized(images, targets, subnet.resolution)).values())
    total.backward()
    return total.item(), {name: p.grad for name, p in detector.named_parameters()}


@pytest.fixture
def data(write_coco) -> CocoImages:
    return CocoImages(*write_coco(), masks=True)


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn"])
def test_gradients_and_loss_of_a_step_are_those_of_the_formula(data, kind):
    detector = make_detector(detector=kind, anchor_scale=4.0, backbone_args={"zero_init_last": False}).double().train()
    images, targets = in_double(*make_batch(data))
    expected_loss, expected = gradients_by_hand(detector, images, targets)
    sample_alike(detector)
    gradaug = DetectionGradAug(detector, kl_weight=WEIGHT)
    loss = 0.0
    for p in gradaug.passes(images, targets, SUBNETS):
        p.loss.backward()
        loss += p.loss.item()
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    for name, parameter in detector.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_subnetwork_sees_the_images_and_targets_of_its_part(data):
    whole, alone = make_detector().double().train(), make_detector().double().train()
    images, targets = in_double(*make_batch(data))
    sample_alike(whole)
    sample_alike(alone)
    subnet = Subnet(0.5, 48, part=Part(index=1, share=0.5, seed=0))
    seen = subnet.part.indices(len(images))
    assert len(seen) == 2 < len(images)
    with pytest.warns(UserWarning, match=f"sees 2 of the {len(images)} images"):
        _, found = DetectionGradAug(whole).passes(images, targets, [subnet])
    chosen = [images[i] for i in seen], [targets[i] for i in seen]
    _, expected = DetectionGradAug(alone).passes(*chosen, [replace(subnet, part=None)])
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)


def test_subnetworks_leave_every_buffer_as_the_full_pass_left_it(data):
    detector = make_detector().train()
    before = {name: buffer.clone() for name, buffer in detector.named_buffers()}
    passes = DetectionGradAug(detector).passes(*make_batch(data), SUBNETS)
    next(passes).loss.backward()
    after_full = {name: buffer.clone() for name, buffer in detector.named_buffers()}
    assert all(not torch.equal(before[name], buffer) for name, buffer in after_full.items())
    assert len(after_full) == 3 * sum(isinstance(m, nn.BatchNorm2d) for m in detector.modules()) > 0
    for p in passes:
        p.loss.backward()
    assert all(torch.equal(after_full[name], buffer) for name, buffer in detector.named_buffers())


class Learner(DetectionTrainer):
    """Plain SGD with a learning rate of one, the images in their order: the weights move by the gradient."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        return self.optimizer


def settings(folder: Path, **fields) -> GradAugConfig:
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "save_strategy": "no"}
    return GradAugConfig(
        str(folder),
        **QUIET,
        **(defaults | {"lr_scheduler_type": "constant", "logging_steps": 1, "min_width": 0.5} | fields),
    )


def assert_moved_by_gradient(trained: Detector, start: Detector) -> None:
    for (name, moved), parameter in zip(trained.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(moved, parameter - parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_a_step_of_the_trainer_is_that_of_the_objective(data, tmp_path, backward):
    trained, start = make_detector(), make_detector()
    sample_alike(trained)
    sample_alike(start)
    args = settings(tmp_path, resolutions=[64, 48], seed=3, kl_weight=WEIGHT, subnet_backward=backward)
    trainer = Learner(trained, args, train_dataset=data)
    trainer.train()
    gradaug = DetectionGradAug(start.train(), min_width=0.5, resolutions=[64, 48], seed=3, kl_weight=WEIGHT)
    loss = gradaug.backward(*make_batch(data, (0, 1, 2, 3)))
    assert_moved_by_gradient(trained, start)
    assert {subnet.resolution for subnet in gradaug.sampler.sample(0)} == {48, 64}
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert logged["loss_full"] + logged["loss_subnets"] == pytest.approx(loss.item(), rel=1e-3)
    assert 0.5 <= logged["subnet_width"] < 1


def test_without_subnetworks_training_is_that_of_torchvisions_losses(data, tmp_path):
    trained, start = make_detector(), make_detector()
    sample_alike(trained)
    sample_alike(start)
    Learner(trained, settings(tmp_path, num_subnets=0), train_dataset=data).train()
    sum(start.train().rcnn(*make_batch(data, (0, 1, 2, 3))).values()).backward()
    assert_moved_by_gradient(trained, start)


def test_the_objective_has_the_settings_of_the_trainer(data, tmp_path):
    args = settings(tmp_path, subnet_interval=2, width_levels=3, max_width=0.9, kl_weight=WEIGHT, seed=3)
    trainer = DetectionTrainer(make_detector(), args, train_dataset=data)
    gradaug = trainer._subnets.begin(trainer, trainer.model, make_batch(data)[0], full_loss=None)
    assert isinstance(gradaug, DetectionGradAug)
    sampler = gradaug.sampler
    assert (sampler.subnet_interval, sampler.width_levels, sampler.max_width, sampler.seed) == (2, 3, 0.9, 3)
    assert gradaug.kl_weight == WEIGHT


def test_images_without_objects_alone_are_a_batch(data):
    detector = make_detector().train()
    images, targets = make_batch(data, (2, 2))
    loss = DetectionGradAug(detector, min_width=0.5, resolutions=[64, 48]).backward(images, targets)
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in detector.parameters())  # as several processes need it


@pytest.mark.parametrize(
    "fields", [{"subnet_mode": "depth"}, {"label_smoothing_factor": 0.1}, {"mixup_alpha": 0.2}, {"eval_widths": [0.9]}]
)
def test_settings_about_classes_are_refused_by_name(data, tmp_path, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*; a detector can have"):
        DetectionTrainer(make_detector(), settings(tmp_path, **fields), train_dataset=data)


def test_a_sampler_that_drops_blocks_is_refused(data, tmp_path):
    sampler = SubnetSampler(subnet_mode="depth")
    with pytest.raises(ValueError, match="subnet_sampler has subnet_mode 'depth'"):
        DetectionTrainer(make_detector(), settings(tmp_path), train_dataset=data, subnet_sampler=sampler)


@pytest.mark.parametrize("given", [{"teacher": torch.nn.Linear(1, 1)}, {"compute_loss_func": lambda *args, **kw: 0}])
def test_a_loss_or_a_teacher_of_classifiers_is_refused(data, tmp_path, given):
    with pytest.raises(ValueError, match="a detector has its own losses alone"):
        DetectionTrainer(make_detector(), settings(tmp_path), train_dataset=data, **given)


def test_a_loop_of_ones_own_has_the_default_resolutions(data):
    detector = make_detector().train()
    gradaug = DetectionGradAug(detector, num_subnets=1)
    assert list(gradaug.sampler.resolutions) == [64, 55, 46, 37]
    assert gradaug.backward(*make_batch(data)) > 0
    assert detector.rcnn.rpn.head.cls_logits.weight.grad is not None


def test_a_transform_of_images_alone_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="subnet_transform"):
        DetectionTrainer(make_detector(), settings(tmp_path), train_dataset=data, subnet_transform=RandomQuarterTurn())


def test_the_default_resolutions_are_shares_of_the_detectors_side(data, tmp_path):
    trainer = DetectionTrainer(make_detector(), settings(tmp_path), train_dataset=data)
    assert trainer.subnet_sampler.resolutions == [64, 55, 46, 37]


def test_evaluation_is_that_of_pycocotools_on_its_detections(write_coco, tmp_path):
    file, folder = write_coco()
    data = CocoImages(file, folder, masks=True)
    detector = make_detector(anchor_scale=4.0)
    nn.init.normal_(detector.rcnn.roi_heads.box_predictor.cls_score.weight)  # so that something is found
    trainer = DetectionTrainer(detector, settings(tmp_path, per_device_eval_batch_size=3), eval_dataset=data)
    metrics = trainer.evaluate()
    assert len(trainer.detections) > 20
    expected = by_hand(file, trainer.detections, tmp_path)
    assert {name: metrics[f"eval_{name}"] for name in expected} == expected


def test_the_card_of_a_detector_says_what_it_is_and_an_edited_one_stays(data, tmp_path):
    args = settings(tmp_path, per_device_eval_batch_size=4)
    trainer = DetectionTrainer(make_detector(), args, train_dataset=data, eval_dataset=data)
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "Mask R-CNN of torchvision with a feature pyramid on `test_resnet`, for 2 categories" in card
    assert "| box " in card and "| mask " in card
    assert "classif" not in card
    assert f'Detector.load("{tmp_path.name}")' in card
    (tmp_path / "README.md").write_text("my own")
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "my own"


def test_images_of_other_categories_are_refused(write_coco, content, data, tmp_path):
    content["categories"] = [{"id": 3, "name": "green"}, {"id": 7, "name": "blue"}]
    other = CocoImages(*write_coco(content))
    with pytest.raises(ValueError, match="categories"):
        DetectionTrainer(make_detector(), settings(tmp_path), eval_dataset=other).evaluate()


def test_a_resumed_training_ends_with_the_weights_of_one_that_was_not_interrupted(data, tmp_path):
    def trainer(detector: Detector) -> DetectionTrainer:
        fields = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
        args = settings(tmp_path, optim="sgd", learning_rate=0.01, num_subnets=2, **fields)
        return DetectionTrainer(detector, args, train_dataset=data)

    whole = make_detector()
    trainer(whole).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert {"config.json", "model.safetensors"} <= {file.name for file in checkpoint.iterdir()}
    resumed = make_detector()
    trainer(resumed).train(resume_from_checkpoint=str(checkpoint))
    for (name, tensor), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    before = Detector.load(str(checkpoint))
    assert not torch.equal(before.rcnn.rpn.head.cls_logits.weight, whole.rcnn.rpn.head.cls_logits.weight)

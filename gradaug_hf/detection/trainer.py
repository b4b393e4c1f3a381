"""DetectionTrainer: the Trainer of transformers for detectors, with GradAug's sub-networks of the backbone."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import DataCollator, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from gradaug_hf.detection.card import write_detector_card
from gradaug_hf.detection.coco import CocoImages, collate
from gradaug_hf.detection.detector import Detector, padded
from gradaug_hf.detection.evaluation import as_coco_results, average_precision
from gradaug_hf.objective.objective import GradAug, Pass
from gradaug_hf.objective.resolutions import ResolutionTrial, default_resolutions
from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.reports.history import at_step
from gradaug_hf.slimming import slicing_report
from gradaug_hf.slimming.widths import is_slimmable
from gradaug_hf.trainer.callbacks import ReportCallback
from gradaug_hf.trainer.checks import check_checkpointing
from gradaug_hf.trainer.subnets import TrainingSubnets
from gradaug_hf.trainer.trainer import IMAGES, LABELS, GradAugTrainer

# Settings of GradAugConfig that are about classes, and the only value that they can have here.
ABOUT_CLASSES = {
    "subnet_mode": "width",
    "problem_type": None,
    "label_smoothing_factor": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "eval_widths": [],
}


class DetectionGradAug(GradAug):
    """GradAug inside the training of a detector (arXiv 2006.07989).

    The objective is the sum of the detector's losses, plus, for each sub-network, the sum of the same losses of the
    detector with a narrower backbone on images and targets of another size. Feature pyramid and heads are whole. The
    sub-networks learn from the objects themselves, since proposals differ from pass to pass and leave nothing to
    compare predictions on. Only the full network's pass updates batch-norm statistics.

    Args:
        model: a `Detector` in training mode, wrapped or not; its backbone is made slimmable if it is not yet.
        settings: of GradAug; `resolutions` are by default 1, 6/7, 5/7 and 4/7 of the detector's side. Those about
            classes, `transform`, `label_smoothing` and `subnet_target`, have no effect.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        detector = model.module if isinstance(model, DistributedDataParallel) else model
        if not is_slimmable(detector):
            detector.make_slimmable()
        resolutions = settings.pop("resolutions", None) or default_resolutions(detector.settings.min_size)
        super().__init__(model, resolutions=resolutions, **settings)

    def _full_pass(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]], inputs: dict[str, Any]) -> Pass:
        return Pass(sum(self.model(images, targets, **inputs).values()))

    def _subnet_pass(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Any]],
        target: None,
        subnet: Subnet,
        inputs: dict[str, Any],
    ) -> Pass:
        return Pass(sum(self.model(images, targets, resolution=subnet.resolution, **inputs).values()))


class DetectionSubnets(TrainingSubnets):
    """Prepare the backbone of a detector for its sub-networks."""

    objective_class = DetectionGradAug

    def prepare(self, model: Detector, dataset: Any, collate: DataCollator) -> None:
        """Make the backbone slimmable, and settle the shorter sides of the images."""
        check_checkpointing(model, self.args)
        model.make_slimmable(self.args.width_divisor)
        if slicing_report(model).sliced_macs == 0:
            warnings.warn(
                f"0 % of the backbone {model.settings.backbone} is sliced, so that its sub-networks differ from it "
                "by their images only",
                stacklevel=3,
            )
        self._side = model.settings.min_size
        self.resolutions = self.args.resolutions or default_resolutions(self._side)
        self.trial = ResolutionTrial(model.bottom_up)
        self.trial.check(sorted({padded(side) for side in self.resolutions}))

    def side(self, images: Sequence[Tensor]) -> int:
        """Return the detector's side in pixels."""
        return self._side

    def seen(self, images: Sequence[Tensor], subnets: Sequence[Subnet], num_blocks: int) -> None:
        """Keep no batch for the plots, which show images of one size."""


class DetectionReport(ReportCallback):
    """Write the card of a detector in place of an image classifier's."""

    def write_card(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Write the model card into a folder, with the statements of its author."""
        trainer = self._trainer
        write_detector_card(
            folder,
            trainer._detector.settings,
            at_step(self.evaluations(), trainer.state.global_step),
            name=metadata.get("model_name") or Path(trainer.args.output_dir).absolute().name,
            source=trainer.hub_model_id or folder.absolute().name,
            num_subnets=trainer.args.num_subnets,
            license=metadata.get("license"),
            tags=metadata.get("tags") or (),
        )


class DetectionTrainer(GradAugTrainer):
    """`GradAugTrainer` for detectors, evaluated with COCO's average precision.

    Batches are `pixel_values`, a list of images (3, H, W) in 0..1, and `labels`, a list of targets as `CocoImages`
    gives them. `resolutions` are shorter sides in pixels, by default 1, 6/7, 5/7 and 4/7 of the detector's. Images and
    targets of a sub-network are resized from the originals by the detector's own transform, as those of the full pass
    are; corners are not aligned, as boxes need it. `subnet_target` has no effect.

    After an evaluation `detections` has what was found, as entries of COCO's result files.

    Args:
        model: a `Detector`.
        args: the settings; `num_subnets=0` is plain training.
        data_collator: makes the batches; by default of what `CocoImages` gives.
        trainer_args: further positional arguments of GradAugTrainer.
        kwargs: further keyword arguments of GradAugTrainer.

    Raises:
        ValueError: a setting is about classes rather than objects, or they do not fit each other.
    """

    _subnets_class, _report_class = DetectionSubnets, DetectionReport

    def __init__(
        self,
        model: Detector,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        *trainer_args: Any,
        **kwargs: Any,
    ) -> None:
        for name, only in ABOUT_CLASSES.items():
            if getattr(args, name, only) != only:
                raise ValueError(f"{name} is {getattr(args, name)!r}; a detector can have {only!r} alone")
        if (mode := getattr(kwargs.get("subnet_sampler"), "subnet_mode", "width")) != "width":
            raise ValueError(f"subnet_sampler has subnet_mode {mode!r}; a detector can have 'width' alone")
        if kwargs.get("subnet_transform") is not None:
            raise ValueError("subnet_transform is given, but it would move the images and not their boxes")
        self.detections: list[dict[str, Any]] | None = None
        super().__init__(model, args, data_collator or collate, *trainer_args, **kwargs)
        if self._plain.has_own_full_loss or self.compute_loss_func is not None or self.teacher is not None:
            raise ValueError("full_loss, compute_loss_func or teacher is given; a detector has its own losses alone")

    # ---- the detector and its sub-networks ----

    @property
    def _detector(self) -> Detector:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _plain_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> Tensor | tuple[Tensor, Any]:
        losses = model(inputs[IMAGES], inputs[LABELS])
        loss = sum(losses.values())
        return (loss, losses) if return_outputs else loss

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer.evaluation_loop`; predictions are entries of COCO's result files, from all processes.

        The metrics are those of `average_precision`, on the images of a `CocoImages`.
        """
        data: CocoImages = dataloader.dataset
        detector = self._detector
        if detector.settings.categories != data.categories:
            raise ValueError("the categories of the images to evaluate on are others than those of the detector")
        found = gather_object(list(self._detect(dataloader, detector).items()))
        by_image = dict(found)  # the last batch repeats images where the processes would have unequal numbers of them
        results = [result for image_id in sorted(by_image) for result in by_image[image_id]]
        figures = average_precision(data.coco, results, detector.settings.has_masks)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.detections = results
        return EvalLoopOutput(predictions=results, label_ids=None, metrics=metrics, num_samples=len(data))

    @torch.no_grad()
    def _detect(self, dataloader: DataLoader, detector: Detector) -> dict[int, list[dict[str, Any]]]:
        """Return the detections in this process's images, by image."""
        detector.to(self.args.device).eval()
        self.callback_handler.eval_dataloader = dataloader
        found = {}
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                detections = detector(batch[IMAGES])
            for target, each in zip(batch[LABELS], detections, strict=True):
                found[target["image_id"]] = as_coco_results(target["image_id"], each, detector.settings.categories)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return found

    # ---- checkpoint ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._detector.save_config(self.args.output_dir if output_dir is None else output_dir)

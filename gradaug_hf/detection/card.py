"""Model card of a detector."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from gradaug_hf.detection.detector import DetectorConfig
from gradaug_hf.detection.evaluation import precision_table
from gradaug_hf.reports.history import Evaluation
from gradaug_hf.reports.model_card import CARD, GENERATED, may_be_written

NAMES = {"mask_rcnn": "Mask R-CNN", "faster_rcnn": "Faster R-CNN"}
TEMPLATE = """---
{metadata}
---

<!-- {generated} by gradaug_hf from what the run did. Complete it and remove this
comment: a card without it is never written over. -->

# {name}

{detector} of torchvision with a feature pyramid on `{backbone}`, for {categories} categories, {how}.
{results}
## Use

```python
import torch

from gradaug_hf.detection import Detector

detector = Detector.load("{source}").eval()
with torch.inference_mode():
    detections = detector([torch.rand(3, 480, 640)])  # a list of images in 0..1
```
"""


def write_detector_card(
    folder: Path,
    settings: DetectorConfig,
    measured: Sequence[Evaluation],
    *,
    name: str,
    source: str,
    num_subnets: int,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write `README.md` into the folder of a detector; one whose comment was removed is left."""
    if not may_be_written(folder / CARD):
        return
    method = ["gradaug"] if num_subnets else []
    task = "image-segmentation" if settings.has_masks else "object-detection"
    metadata = ModelCardData(license=license, pipeline_tag=task, tags=["object-detection", *method, *tags])
    how = "trained with [GradAug](https://arxiv.org/abs/2006.07989)" if num_subnets else "trained without sub-networks"
    figures = {name: value for each in measured for name, value in each.metrics.items() if "_AP" in name}
    content = TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        generated=GENERATED,
        name=name,
        detector=NAMES[settings.detector],
        backbone=settings.backbone,
        categories=len(settings.categories),
        how=how,
        results=f"\n## Average precision\n\n{precision_table(figures)}\n" if figures else "",
        source=source,
    )
    ModelCard(content).save(folder / CARD)

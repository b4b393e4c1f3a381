"""GradAug inside the training of torchvision's Faster and Mask R-CNN, with any backbone of timm."""

try:
    import pycocotools  # noqa: F401
except ImportError as error:
    raise ImportError("detection needs pycocotools: pip install 'gradaug_hf[detection]'") from error

from gradaug_hf.detection.coco import CocoImages
from gradaug_hf.detection.detector import Detector, DetectorConfig, create_detector
from gradaug_hf.detection.trainer import DetectionGradAug, DetectionTrainer

__all__ = ["CocoImages", "DetectionGradAug", "DetectionTrainer", "Detector", "DetectorConfig", "create_detector"]

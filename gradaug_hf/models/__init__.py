"""Networks of the paper that timm lacks, registered in timm when this package is imported."""

from gradaug_hf.models.wide_resnet import WideResNet

__all__ = ["WideResNet"]

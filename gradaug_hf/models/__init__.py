"""Models of the paper that timm lacks, registered in timm when this package is imported."""

from gradaug_hf.models.cifar_resnet import CifarResNet
from gradaug_hf.models.pyramidnet import PyramidNet
from gradaug_hf.models.wide_resnet import WideResNet

__all__ = ["CifarResNet", "PyramidNet", "WideResNet"]

"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch, sampled with a seed of its own."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from gradaug_hf.utils.randomness import seeded


class BatchMixer:
    """Mix each image of a batch with its neighbour, on the images' device.

        mixed, soft_labels = BatchMixer(num_classes=10, mixup_alpha=0.2, cutmix_alpha=0.0)(images, labels, seed=0)

    Args:
        num_classes: of the labels.
        mixup_alpha: parameter of Mixup's beta distribution, at least 0; 0 turns Mixup off.
        cutmix_alpha: parameter of CutMix's beta distribution, at least 0; 0 turns CutMix off. With both on, each is as
            likely as the other.
        mix_prob: probability with which a batch is mixed, in [0, 1].
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, mix_prob: float = 1.0) -> None:
        self.num_classes = num_classes
        self.mix_prob = mix_prob
        self._mixes = [v2.MixUp(alpha=mixup_alpha)] if mixup_alpha > 0 else []
        self._mixes += [v2.CutMix(alpha=cutmix_alpha)] if cutmix_alpha > 0 else []

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (N, C, H, W).
            labels: class indices (N,), or probabilities (N, classes).
            seed: of everything that is sampled; the global random numbers stay as they are.

        Returns:
            Images, and labels as probabilities (N, classes).
        """
        if labels.ndim == 1:
            labels = one_hot(labels.long(), self.num_classes).to(images.dtype)
        with seeded(seed, images.device):
            if not self._mixes or torch.rand(()) >= self.mix_prob:
                return images, labels
            return self._mixes[torch.randint(len(self._mixes), ())](images, labels)

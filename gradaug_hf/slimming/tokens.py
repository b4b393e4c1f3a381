"""Sub-networks of vision transformers that see a random part of the patches of each image."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

# Parameters of transformers' embeddings whose tokens precede the patches.
PREFIXES = ("cls_token", "distillation_token", "register_tokens")


@dataclass(frozen=True)
class TokenPlace:
    """The place in a model where tokens have their positions and no block has run yet.

    Args:
        module: its output is the tokens (N, prefix + patches, C).
        num_prefix: tokens before the patches, which are always kept.
    """

    module: nn.Module
    num_prefix: int


def find_tokens(model: nn.Module) -> TokenPlace:
    """Return where patches can be left out of a model.

    Args:
        model: a timm `VisionTransformer`, or a transformers classifier with learned position embeddings such as ViT,
            DeiT and DINOv2, wrapped or not.

    Raises:
        ValueError: there is no such place in it.
    """
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            return TokenPlace(module.patch_drop, module.num_prefix_tokens)
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Parameter) and positions.ndim == 3:
            own = [getattr(module, name, None) for name in PREFIXES]
            return TokenPlace(module, sum(token.shape[1] for token in own if isinstance(token, Tensor)))
    raise ValueError(
        f"subnet_mode is 'tokens', but {type(model).__name__} has no place where patches can be left out; it must be "
        "a VisionTransformer of timm, or a transformers classifier with learned position embeddings, such as ViT, "
        "DeiT and DINOv2"
    )


@contextmanager
def tokens_kept(model: nn.Module, share: float, seed: int) -> Iterator[None]:
    """Have a model see a random part of the patches of each image.

        with tokens_kept(vit, share=0.5, seed=0):
            logits = vit(images)

    Args:
        model: one that `find_tokens` knows.
        share: of the patches that are kept, in (0, 1]; at least one is.
        seed: of their positions; the global random numbers stay as they are.

    Raises:
        ValueError: there is no place in the model where patches can be left out.
    """
    if share >= 1:
        yield
        return
    place = find_tokens(model)

    def leave_out(module: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return keep_patches(tokens, place.num_prefix, share, seed)

    with place.module.register_forward_hook(leave_out):
        yield


def keep_patches(tokens: Tensor, num_prefix: int, share: float, seed: int) -> Tensor:
    """Return the first tokens of (N, num_prefix + patches, C), and of each image random patches, in their order."""
    images, patches = len(tokens), tokens.shape[1] - num_prefix
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, patches, generator=generator).argsort(dim=1)
    kept = order[:, : max(1, int(patches * share + 0.5))].sort(dim=1).values + num_prefix
    first = torch.arange(num_prefix).expand(images, -1)
    indices = torch.cat([first, kept], dim=1).to(tokens.device)
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))

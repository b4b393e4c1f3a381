"""The logits that a model returns, and the number of classes that it states."""

from typing import Any

from torch import Tensor, nn

from gradaug_hf.objective.losses import check_logits


def num_classes_of(model: nn.Module) -> int | None:
    """Return the number of classes that a model states; None if it states none.

    Args:
        model: with `config.num_labels` as models of transformers, with `num_classes` as those of timm, or any other.

    Raises:
        ValueError: it is 0, so that the model returns features.
    """
    found = getattr(getattr(model, "config", None), "num_labels", None)
    name = "config.num_labels"
    if found is None:
        found, name = getattr(model, "num_classes", None), "num_classes"
    if not isinstance(found, int):
        return None
    if found < 1:
        raise ValueError(
            f"{name} of this {type(model).__name__} is {found}, so that it returns features; build it with the number "
            "of the classes"
        )
    return found


def logits_of(output: Any, batch_size: int, num_classes: int | None = None) -> Tensor:
    """Return the logits in the output of a model: the tensor itself, `.logits`, or the only ones in a tuple.

    Args:
        output: of a timm model or a transformers classifier.
        batch_size: number of images.
        num_classes: that the model states; None if it states none.

    Raises:
        ValueError: there are no logits of shape (batch_size, num_classes), or those of several heads.
    """
    logits = output if isinstance(output, tuple) else getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):
        logits = _only_logits(logits, num_classes)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returned a {type(output).__name__} without logits; expected a tensor of them")
    check_logits(logits, batch_size)
    if num_classes not in (None, logits.shape[1]):
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)}, but it states {num_classes} classes "
            "(config.num_labels or num_classes): set that to the classes that its classifier has, or give it one for "
            f"that many, for example by timm's model.reset_classifier({num_classes})"
        )
    return logits


def _only_logits(outputs: tuple[Any, ...] | list[Any], num_classes: int | None) -> Tensor:
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    logits = [each for each in tensors if each.ndim == 2 and num_classes in (None, each.shape[1])]
    if len(logits) != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"the model returned {len(outputs)} outputs, with tensors of shape {shapes or 'none'}; expected the "
            f"logits (N, {num_classes or 'classes'}) of one head. A second head would not be trained: turn it off, "
            "for example by timm's model.set_distilled_training(False) or aux_logits=False"
        )
    return logits[0]

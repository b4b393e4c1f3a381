"""A sub-network in a folder of its own, which loads where gradaug_hf is not installed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.hub.configs import plain_state, stated_names, timm_network, wrapper_cfg
from gradaug_hf.hub.folders import check_new, new_folder
from gradaug_hf.hub.preprocessing import processor_data_config
from gradaug_hf.hub.weights import CONFIG
from gradaug_hf.slimming import extract_subnet
from gradaug_hf.slimming.meta import example_sizes

WEIGHTS, PROGRAM, README = "model.safetensors", "model.pt2", "README.md"
CARD = """---
library_name: pytorch
tags: [image-classification, gradaug]
---

The sub-network of width {width:g} of {name}, which was trained with [GradAug](https://arxiv.org/abs/2006.07989). It is
a program that torch.export wrote, for any number of images of ({shape}) (channels, height, width). A program is code:
load it only from someone you trust. `model.safetensors` has its weights alone.

```python
import torch

model = torch.export.load("FOLDER/model.pt2").module()
logits = model(torch.randn(1, {shape}))
```
"""


def save_subnet(
    model: nn.Module,
    width: float,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    processor: BaseImageProcessor | None = None,
    input_size: int | Sequence[int] | None = None,
) -> None:
    """Write the sub-network of a width multiplier into a folder, as a program that runs wherever PyTorch does.

    The folder has `model.pt2`, which `torch.export.load` reads, `model.safetensors` with the weights alone,
    `config.json` and a `README.md` that says how to load it. Batch norm has the statistics that `extract_subnet`
    gives: call it inside `recalibrate_batchnorm` for own ones.

    Args:
        model: a model that `make_slimmable` was called on.
        width: width multiplier in (0, 1].
        folder: to write; must not exist, or be empty.
        label_names: of the classes, in the order of the labels; None keeps those that the model came with.
        processor: what prepares the images; None keeps what the model came with.
        input_size: side in pixels, (height, width) or (channels, height, width) of the images; None takes those of the
            processor, else those of the model.

    Raises:
        ValueError: the width is out of range, the model is not slimmable, torch.export cannot write it, or the folder
            is taken or cannot be written.

    Examples:
        >>> with recalibrate_batchnorm(make_slimmable(model), 0.75, [images]):
        ...     save_subnet(model, 0.75, "narrow", input_size=64)
        >>> logits = torch.export.load("narrow/model.pt2").module()(images)
    """
    check_new(Path(folder))
    subnet = extract_subnet(model, width).cpu().eval().requires_grad_(False)
    if input_size is None and processor is not None:
        input_size = processor_data_config(processor).get("input_size", (None,))[1:] or None
    size = next(example_sizes(model, input_size))
    config = _program_config(model, width, label_names or stated_names(model), processor, size)
    card = CARD.format(width=width, name=config["subnet"]["of"], shape=", ".join(map(str, size)))
    with new_folder(Path(folder)) as scratch:
        torch.export.save(export_program(subnet, size), scratch / PROGRAM)
        save_file(plain_state(subnet.state_dict()), scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (scratch / README).write_text(card, encoding="utf-8")


def export_program(subnet: nn.Module, size: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Return the program that maps images (N, *size) of any N to logits.

    Raises:
        ValueError: torch.export cannot write it, or it computes something else.
    """
    model = _Logits(subnet)
    dtype = next(p.dtype for p in subnet.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)  # so that a training goes on as if nothing had been written
    images = torch.randn(2, *size, dtype=dtype, generator=generator)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch.export and the model raise errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"torch.export cannot write a sub-network of {type(subnet).__name__}: {reason}") from error
    images = torch.randn(3, *size, dtype=dtype, generator=generator)
    with torch.no_grad():
        if not torch.allclose(program.module()(images), model(images), rtol=1e-4, atol=1e-5):
            raise ValueError(f"torch.export writes a program that differs from {type(subnet).__name__}")
    return program


class _Logits(nn.Module):
    """Calls a model and returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        logits = getattr(output, "logits", output)
        return logits[0] if isinstance(logits, (tuple, list)) else logits


def _program_config(
    model: nn.Module,
    width: float,
    names: Sequence[str] | None,
    processor: BaseImageProcessor | None,
    size: tuple[int, int, int],
) -> dict[str, Any]:
    """Return the configuration of a program, which no library takes for that of a model it could build."""
    name, data_config = type(model).__name__, {}
    if (timm_model := timm_network(model)) is not None:
        name = timm_model.pretrained_cfg["architecture"]
        data_config = timm.data.resolve_data_config({}, {**timm_model.pretrained_cfg, **wrapper_cfg(model)})
    if processor is not None:
        data_config |= processor_data_config(processor)
    return {
        "subnet": {"width": float(width), "of": name},
        "program": PROGRAM,
        "input_size": size,
        **({"label_names": list(names)} if names else {}),
        **({"data_config": data_config} if data_config else {}),
    }

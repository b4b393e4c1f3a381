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

from gradaug_hf.hub.configs import CONFIG, label_names, plain_state, save_configs, timm_network, wrapper_cfg
from gradaug_hf.hub.folders import check_new, new_folder
from gradaug_hf.hub.preprocessing import processor_data_config
from gradaug_hf.hub.timm_arguments import narrow_arguments
from gradaug_hf.slimming import extract_subnet
from gradaug_hf.slimming.meta import example_sizes
from gradaug_hf.slimming.patching import width_state
from gradaug_hf.slimming.patterns import Width

WEIGHTS, PROGRAM, README = "model.safetensors", "model.pt2", "README.md"
TIMM, EXPORT = "timm", "torch.export"
CARD = """---
library_name: {library}
tags: [image-classification, gradaug]
---

The sub-network of width {width:g} of {network}, which was trained with
[GradAug](https://arxiv.org/abs/2006.07989).{note}

```python
{code}
```
"""
LOAD_WITH_TIMM = """import timm
from transformers import AutoModelForImageClassification

model = timm.create_model("local-dir:FOLDER", pretrained=True)
model = AutoModelForImageClassification.from_pretrained("FOLDER")"""
LOAD_PROGRAM = """import torch

model = torch.export.load("FOLDER/model.pt2").module()
logits = model(torch.randn(1, {size}))"""
PROGRAM_NOTE = """ timm has no arguments for its
widths, so it is a program that torch.export wrote, for any number of images of {size} (channels, height, width). A
program is code: load it only from someone you trust. `model.safetensors` has its weights alone."""


def save_subnet(
    model: nn.Module,
    width: float,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    processor: BaseImageProcessor | None = None,
    input_size: int | Sequence[int] | None = None,
) -> str:
    """Write the sub-network of a width multiplier into a folder, as a network of timm or else as a program.

    Where timm can build it, the folder is that of any network of timm. Else it has `model.safetensors` and next to it
    `model.pt2`, which `torch.export.load` reads. `subnet` in `config.json` says which, and `README.md` how to load it.
    Batch norm has the statistics that `extract_subnet` gives: call it inside `recalibrate_batchnorm` for own ones.

    Args:
        model: a network that `make_slimmable` was called on.
        width: width multiplier in (0, 1].
        folder: to write; must not exist, or be empty.
        label_names: of the classes, in the order of the labels; None keeps those that the model came with.
        processor: what prepares the images; None keeps what the model came with.
        input_size: side in pixels, (height, width) or (channels, height, width) of the images of a program; None takes
            those of the processor, else those of the model.

    Returns:
        `"timm"` or `"torch.export"`.

    Raises:
        ValueError: the width is out of range, the model is not slimmable, torch.export cannot write it, or the folder
            is taken or cannot be written.
    """
    check_new(Path(folder))
    subnet = extract_subnet(model, width).cpu().eval().requires_grad_(False)
    names = label_names or _own_names(model)
    size = _image_size(model, processor, input_size)
    network = as_timm_network(model, subnet, Width(float(width), width_state(model).width.divisor), size)
    with new_folder(Path(folder)) as scratch:
        if network is not None:
            save_file(plain_state(network.state_dict()), scratch / WEIGHTS, metadata={"format": "pt"})
            save_configs(network, scratch, names, processor)
            config = json.loads((scratch / CONFIG).read_text(encoding="utf-8"))
        else:
            save_file(plain_state(subnet.state_dict()), scratch / WEIGHTS, metadata={"format": "pt"})
            torch.export.save(export_program(subnet, size), scratch / PROGRAM)
            config = _program_config(model, names, processor, size)
        loads_with = EXPORT if network is None else TIMM
        config["subnet"] = {"width": float(width), "of": _name_of(model), "loads_with": loads_with}
        (scratch / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (scratch / README).write_text(_card(model, width, loads_with, size), encoding="utf-8")
    return loads_with


def as_timm_network(model: nn.Module, subnet: nn.Module, width: Width, size: tuple[int, int, int]) -> nn.Module | None:
    """A sub-network as `timm.create_model` builds it, with its weights and its logits; None where timm cannot.

    Args:
        model: the slimmable network.
        subnet: its sub-network, in evaluation mode on the CPU.
        width: that of the sub-network.
        size: channels, height and width of the images that the logits are compared for.
    """
    full, narrow = timm_network(model), timm_network(subnet)
    arguments = None if full is None else narrow_arguments(full, narrow, width)
    if arguments is None:
        return None
    network = timm.create_model(full.pretrained_cfg["architecture"], **arguments).eval().to(_dtype(narrow))
    network.load_state_dict(narrow.state_dict())
    network.pretrained_cfg = {**full.pretrained_cfg, **wrapper_cfg(model)}
    images = torch.randn(2, *size, dtype=_dtype(narrow))
    with torch.no_grad():
        return network if torch.equal(network(images), narrow(images)) else None


def export_program(subnet: nn.Module, size: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The program that maps images (N, *size) of any N to logits.

    Raises:
        ValueError: torch.export cannot write it, or it computes something else.
    """
    network = _Logits(subnet)
    images = torch.randn(2, *size, dtype=_dtype(subnet))
    try:
        with torch.no_grad():
            program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch.export and the network raise errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"torch.export cannot write a sub-network of {type(subnet).__name__}: {reason}") from error
    images = torch.randn(3, *size, dtype=_dtype(subnet))
    with torch.no_grad():
        if not torch.allclose(program.module()(images), network(images), rtol=1e-4, atol=1e-5):
            raise ValueError(f"torch.export writes a program that differs from {type(subnet).__name__}")
    return program


class _Logits(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        logits = getattr(output, "logits", output)
        return logits[0] if isinstance(logits, (tuple, list)) else logits


def _image_size(
    model: nn.Module, processor: BaseImageProcessor | None, input_size: int | Sequence[int] | None
) -> tuple[int, int, int]:
    if input_size is None and processor is not None:
        input_size = processor_data_config(processor).get("input_size", (None,))[1:] or None
    return next(example_sizes(model, input_size))


def _own_names(model: nn.Module) -> list[str] | None:
    return label_names(model) or getattr(timm_network(model), "pretrained_cfg", {}).get("label_names")


def _program_config(
    model: nn.Module, names: Sequence[str] | None, processor: BaseImageProcessor | None, size: tuple[int, int, int]
) -> dict[str, Any]:
    """Nothing that a library takes for a network that it could build."""
    network = timm_network(model)
    data_config = {}
    if network is not None:
        data_config = timm.data.resolve_data_config({}, {**network.pretrained_cfg, **wrapper_cfg(model)})
    if processor is not None:
        data_config |= processor_data_config(processor)
    return {
        "program": PROGRAM,
        "input_size": size,
        **({"label_names": list(names)} if names else {}),
        **({"data_config": data_config} if data_config else {}),
    }


def _card(model: nn.Module, width: float, loads_with: str, size: tuple[int, int, int]) -> str:
    shape = ", ".join(map(str, size))
    if loads_with == TIMM:
        library, note, code = "timm", "", LOAD_WITH_TIMM
    else:
        library, note, code = "pytorch", PROGRAM_NOTE.format(size=f"({shape})"), LOAD_PROGRAM.format(size=shape)
    return CARD.format(library=library, width=width, network=_name_of(model), note=note, code=code)


def _name_of(model: nn.Module) -> str:
    network = timm_network(model)
    return type(model).__name__ if network is None else network.pretrained_cfg["architecture"]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())

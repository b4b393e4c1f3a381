"""Every public name has an example, which gives what it says."""

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from torch import nn
from transformers import EvalPrediction

import gradaug_hf
from gradaug_hf.data import collator
from gradaug_hf.slimming.analysis.tracing import LAYER_HANDLERS
from tests.helpers.pictures import picture

NAMES = [name for name in gradaug_hf.__all__ if name != "__version__"]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch) -> Path:
    """Make a folder `photos` in the working directory."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                picture(100 * number + index).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def known(working_folder, monkeypatch) -> Iterator[dict[str, Any]]:
    """What an example may take for granted: the public names, a model, a batch, photos, and a layer of its own."""
    monkeypatch.setattr("gradaug_hf.slimming.analysis.tracing.LAYER_HANDLERS", dict(LAYER_HANDLERS))
    torch.manual_seed(0)
    model, images, labels = (
        timm.create_model("test_resnet", num_classes=2),
        torch.rand(4, 3, 64, 64),
        torch.arange(4) % 2,
    )
    names = {name: getattr(gradaug_hf, name) for name in gradaug_hf.__all__}
    names |= {"model": model, "images": images, "labels": labels, "loader": [(images, labels)], "Scale": Scale}
    names |= {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "EvalPrediction": EvalPrediction}
    names["photos"] = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    return names | {"np": np, "PIL": PIL, "timm": timm, "torch": torch}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example_that_runs(name, known):
    text = inspect.getdoc(getattr(gradaug_hf, name))
    assert "\n\nExamples:\n" in text
    found = doctest.DocTestParser().get_doctest(text, known, name, None, None)
    done = doctest.DocTestRunner().run(found)
    assert (done.failed, done.attempted > 0) == (0, True)


def test_the_example_of_the_collator_gives_what_it_says(known):
    found = doctest.DocTestParser().get_doctest(
        collator.collate_images.__doc__, {**known, **vars(collator)}, "", None, None
    )
    done = doctest.DocTestRunner().run(found)
    assert (done.failed, done.attempted > 0) == (0, True)

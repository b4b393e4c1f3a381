"""A method that stands in for one of the Trainer's has to be called by the Trainer, whatever transformers renames."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import Trainer

from gradaug_hf import GradAugTrainer
from tests.trainer.test_trainer import config, rows

# Those that a user calls, or that tests of pushing look at.
CALLED_BY_USERS = ("train", "create_model_card", "init_hf_repo", "push_to_hub")
METHODS = sorted(
    name
    for name, value in vars(GradAugTrainer).items()
    if isinstance(value, FunctionType)
    and not name.startswith("__")
    and name not in CALLED_BY_USERS
    and (name.startswith("_") or hasattr(Trainer, name))
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture(scope="module")
def callers(tmp_path_factory) -> dict[str, set[str]]:
    """The packages that called each method in a short training with mixed batches, checkpoints and evaluations."""
    found: dict[str, set[str]] = {name: set() for name in METHODS}

    def watched(name: str, method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name].add(sys._getframe(1).f_globals["__name__"].partition(".")[0])
            return method(*args, **kwargs)

        return call

    folder: Path = tmp_path_factory.mktemp("run")
    settings = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "epoch",
        "logging_steps": 1,
    }
    args = config(folder, resolutions=[32], mixup_alpha=0.2, eval_widths=[0.5], **settings)
    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(GradAugTrainer, name, watched(name, getattr(GradAugTrainer, name)))
        trainer = GradAugTrainer(args=args, model_init=model, train_dataset=rows(8), eval_dataset=rows(4))
        trainer.train()
    return found


def test_the_list_of_methods_is_that_of_the_class():
    assert {"_save", "_save_checkpoint", "_get_output_dir", "_init_training_state", "compute_loss"} <= {*METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_called_and_those_of_the_trainer_by_the_trainer(name, callers):
    assert ("transformers" if hasattr(Trainer, name) else "gradaug_hf") in callers[name]


def test_private_hooks_are_few_and_say_which_promise_needs_them():
    lines, start = inspect.getsourcelines(GradAugTrainer)
    hooks = {name for name in METHODS if name.startswith("_") and hasattr(Trainer, name)}
    assert len(hooks) == 4
    for name in hooks:
        (line,) = [number for number, line in enumerate(lines) if line.startswith(f"    def {name}(")]
        assert lines[line - 1].startswith("    # "), name


# ---- the constructor ----


def test_the_constructor_spells_the_arguments_of_the_trainer_and_its_own():
    ours, theirs = (inspect.signature(cls).parameters for cls in (GradAugTrainer, Trainer))
    assert [*ours] == [*theirs, "subnet_sampler", "subnet_transform", "teacher", "card_metadata"]
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in [*ours][len(theirs) :])


def test_each_argument_reaches_the_one_of_its_name(tmp_path, monkeypatch):
    signature, bound = inspect.signature(Trainer.__init__), {}

    class Reached(Exception):
        pass

    def remember(self: Trainer, *args: Any, **kwargs: Any) -> None:
        bound.update(signature.bind(self, *args, **kwargs).arguments)
        raise Reached

    monkeypatch.setattr(Trainer, "__init__", remember)
    values = {name: object() for name in signature.parameters if name != "self"}
    values |= {"model": model(), "args": config(tmp_path)}
    with pytest.raises(Reached):
        GradAugTrainer(**values)
    assert {name: value for name, value in bound.items() if name != "self"} == values


def test_a_name_that_no_model_card_knows_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="card_metadata holds 'licence'; accepted are model_name, dataset, .*license"):
        GradAugTrainer(model(), config(tmp_path), train_dataset=rows(4), card_metadata={"licence": "mit"})

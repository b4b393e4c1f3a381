import json
from math import inf, nan

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.trainer.loss_watch import LossWatch, NonFiniteLossError
from tests.helpers.small_training import checkpoints, make_trainer


def losses(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_loss_that_is_not_finite_is_named_with_step_parts_widths_and_resolutions(value):
    watch = LossWatch()
    subnets = [Subnet(0.95, 192), Subnet(0.9, survival=0.8)]
    watch.add(11, losses(1.5, 0.25, 0.5), subnets)
    message = (
        rf"the loss of step 12 is not finite: 1.25 of the full network, 0.5 of width 0.95 at 192 pixels, "
        rf"{value} of width 0.9 with survival 0.8"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        watch.add(12, losses(1.25, 0.5, value), subnets)


class LateEvent:
    """As of a device that runs behind the host."""

    def __init__(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.is_over = True


def test_losses_of_a_device_are_looked_at_once_it_has_come_that_far():
    watch = LossWatch()
    watch._watch(1, losses(nan)[0][None], (), event := LateEvent())
    watch._watch(2, losses(2.0)[0][None], (), LateEvent())  # nothing is waited for
    event.is_over = True
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is not finite: nan of the full network"):
        watch._watch(3, losses(2.0)[0][None], (), LateEvent())


def test_losses_that_are_under_way_are_waited_for_at_the_end():
    watch = LossWatch()
    watch._watch(5, losses(nan)[0][None], (), LateEvent())
    with pytest.raises(NonFiniteLossError, match="step 5"):
        watch.finish()
    watch.finish()


class Spoil(TrainerCallback):
    """Makes a weight not a number after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model[0].weight[0, 0, 0, 0] = nan


@pytest.mark.parametrize("num_subnets", [0, 2])
def test_training_stops_at_a_loss_that_is_not_finite_and_the_checkpoint_before_it_stays(tmp_path, num_subnets):
    trainer = make_trainer(tmp_path, [Spoil(4)], num_subnets=num_subnets, save_steps=3)
    message = r"the loss of step 5 is not finite: nan of the full network.*the last checkpoint is .*checkpoint-3"
    with pytest.raises(NonFiniteLossError, match=message) as raised:
        trainer.train()
    assert str(raised.value).count("of width") == num_subnets
    assert checkpoints(tmp_path) == [3]
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_losses_on_an_accelerator_are_found():
    watch = LossWatch()
    watch.add(1, [torch.tensor(nan, device=torch.accelerator.current_accelerator())])
    with pytest.raises(NonFiniteLossError, match="step 1"):
        watch.finish()

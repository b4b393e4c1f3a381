"""Without sub-networks GradAugTrainer is transformers.Trainer: scenarios of its tests, with the class swapped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
)

from gradaug_hf import GradAugConfig, GradAugTrainer

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "epoch"}


class Regression(nn.Module):
    """y = a x + b, with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))
        self.b = nn.Parameter(torch.tensor(-1.0))

    def forward(self, input_x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        y = input_x * self.a + self.b
        return (y,) if labels is None else (nn.functional.mse_loss(y, labels), y)


class RegressionOutput(nn.Module):
    """y = a x + b, without a loss; its only argument besides the data is not a label."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, input_x: Tensor) -> dict[str, Tensor]:
        return {"y": input_x * self.a}


class LossOfItsOwn(RegressionOutput):
    """Learns from its input alone."""

    def forward(self, input_x: Tensor) -> dict[str, Tensor]:
        y = input_x * self.a
        return {"loss": (y - input_x).square().mean(), "y": y}


class Labeller(PreTrainedModel):
    """Three classes of a number."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(1, 3)
        self.post_init()

    def forward(self, input_x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear(input_x[:, None])
        return {"logits": logits} if labels is None else {"loss": self.loss_function(logits, labels), "logits": logits}

    def loss_function(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)


def numbers(count: int = 16, integers: bool = False) -> list[dict[str, Any]]:
    x = np.random.default_rng(0).normal(size=count).astype(np.float32)
    labels = np.arange(count) % 3 if integers else 2 * x + 3
    return [{"input_x": torch.tensor(x[i]), "labels": torch.tensor(labels[i])} for i in range(count)]


def images(labels: Callable[[int], Tensor], count: int = 8) -> list[dict[str, Tensor]]:
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": each, "labels": labels(i)} for i, each in enumerate(pixels)]


def resnet(problem_type: str | None, num_labels: int) -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=num_labels)
    config.problem_type = problem_type
    return ResNetForImageClassification(config)


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=11, num_labels=2, **sizes))


def sentences(count: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": torch.tensor([1, 2 + i, 3]), "labels": i % 2} for i in range(count)]


def mean_of_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    y = outputs["y"] if isinstance(outputs, dict) else outputs[0]
    return (y - labels).abs().sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def multi_hot(index: int) -> Tensor:
    return torch.tensor([1.0, float(index % 2), 0.0, float(index % 3 == 0)])


SCENARIOS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "regression": (Regression, numbers(), {}, {}),
    "accumulation": (Regression, numbers(), {"gradient_accumulation_steps": 2}, {}),
    "custom loss": (Regression, numbers(), {}, {"compute_loss_func": mean_of_items}),
    "custom loss, accumulation": (
        Regression,
        numbers(),
        {"gradient_accumulation_steps": 2},
        {"compute_loss_func": mean_of_items},
    ),
    "custom loss of a model without one": (
        RegressionOutput,
        numbers(),
        {"label_names": ["labels"]},
        {"compute_loss_func": mean_of_items},
    ),
    "loss without labels": (LossOfItsOwn, [{"input_x": row["input_x"]} for row in numbers()], {}, {}),
    "label smoothing": (
        lambda: Labeller(PretrainedConfig(num_labels=3)),
        numbers(integers=True),
        {"label_smoothing_factor": 0.2},
        {},
    ),
    "text": (bert, sentences(), {}, {}),
    "several labels": (lambda: resnet("multi_label_classification", 4), images(multi_hot), {}, {}),
    "several labels, not stated": (lambda: resnet(None, 4), images(multi_hot), {}, {}),
    "image regression": (lambda: resnet("regression", 1), images(lambda i: torch.tensor(i / 8)), {}, {}),
    "images, accumulation": (
        lambda: resnet(None, 4),
        images(lambda i: torch.tensor(i % 4)),
        {"gradient_accumulation_steps": 3},
        {},
    ),
    "NaN that is filtered": (
        Regression,
        [{**row, "labels": row["labels"] * (float("nan") if i == 5 else 1)} for i, row in enumerate(numbers())],
        {"logging_nan_inf_filter": True},
        {},
    ),
}


class Losses(TrainerCallback):
    """Keeps what is logged, of times the names alone."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        timed = ("runtime", "per_second", "total_flos")
        self.logged.append({k: None if k.endswith(timed) else v for k, v in logs.items()})


def run(kind: type[Trainer], folder: Path, scenario: str) -> tuple[Any, ...]:
    make, data, settings, arguments = SCENARIOS[scenario]
    torch.manual_seed(0)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1, **settings}
    args = GradAugConfig(str(folder), num_subnets=0, logging_steps=1, **QUIET, **settings)
    losses, model = Losses(), make()
    options = {"train_dataset": data, "eval_dataset": data[:4], "callbacks": [losses], **arguments}
    trainer = kind(model, args, **options)
    trainer.train()
    predictions = trainer.predict(data[:4])
    return model.state_dict(), losses.logged, predictions.predictions, predictions.label_ids


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_sub_networks_the_class_is_the_trainer(tmp_path, scenario):
    weights, logged, predictions, labels = run(GradAugTrainer, tmp_path / "ours", scenario)
    expected, expected_log, expected_predictions, expected_labels = run(Trainer, tmp_path / "theirs", scenario)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor) or tensor.isnan().any(), name
    assert len(logged) == len(expected_log)
    for found, wanted in zip(logged, expected_log, strict=True):
        assert found.keys() == wanted.keys()
        np.testing.assert_equal(found, wanted)
    np.testing.assert_equal(predictions, expected_predictions)
    np.testing.assert_equal(labels, expected_labels)


class Batches:
    """A data loader of the user's, which has nothing but batches."""

    def __init__(self, loader: Any) -> None:
        self.batches = list(loader)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class OwnLoader:
    def get_train_dataloader(self) -> Batches:
        return Batches(super().get_train_dataloader())


def test_a_data_loader_without_a_dataset_is_taken(tmp_path):
    found = run(type("Ours", (OwnLoader, GradAugTrainer), {}), tmp_path / "ours", "regression")
    expected = run(type("Theirs", (OwnLoader, Trainer), {}), tmp_path / "theirs", "regression")
    assert torch.equal(found[0]["a"], expected[0]["a"])
    assert found[1] == expected[1]


def test_a_data_loader_that_accelerate_has_not_wrapped_is_taken(tmp_path, monkeypatch):
    args = GradAugConfig(str(tmp_path), num_subnets=0, dataloader_num_workers=1, **QUIET)
    trainer = GradAugTrainer(Regression(), args, train_dataset=numbers(), eval_dataset=numbers())
    monkeypatch.setattr(trainer.accelerator, "prepare", lambda loader: loader)
    assert len(trainer.get_eval_dataloader()) == len(trainer.get_train_dataloader()) == 2


class Order(Regression):
    """Writes down which numbers it saw, in a buffer that grows, and takes one of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        self.seen = torch.empty_like(state_dict["seen"])
        return super().load_state_dict(state_dict, strict)

    def forward(self, input_x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.training:
            self.seen = torch.cat([self.seen, input_x])
        return super().forward(input_x, labels)


def order_of(kind: type[Trainer], folder: Path, checkpoint: str | None = None) -> Tensor:
    torch.manual_seed(0)
    settings = QUIET | {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    args = GradAugConfig(str(folder), num_subnets=0, per_device_train_batch_size=2, num_train_epochs=2, **settings)
    trainer = kind(Order(), args, train_dataset=numbers())
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.model.seen


def test_a_model_that_takes_buffers_of_another_shape_is_resumed_as_by_the_trainer(tmp_path):
    whole = order_of(GradAugTrainer, tmp_path / "ours")
    for kind in (GradAugTrainer, Trainer):
        assert torch.equal(order_of(kind, tmp_path / "again", str(tmp_path / "ours" / "checkpoint-3")), whole)


class Weighted:
    """Overrides the loss, as users of a Trainer do."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = ((outputs["y"] - labels) ** 4).mean()
        return (loss, outputs) if return_outputs else loss


def test_an_overridden_loss_without_sub_networks_is_the_trainer_s(tmp_path, monkeypatch):
    monkeypatch.setitem(SCENARIOS, "overridden", (RegressionOutput, numbers(), {"label_names": ["labels"]}, {}))
    found = run(type("Ours", (Weighted, GradAugTrainer), {}), tmp_path / "ours", "overridden")
    expected = run(type("Theirs", (Weighted, Trainer), {}), tmp_path / "theirs", "overridden")
    assert torch.equal(found[0]["a"], expected[0]["a"])
    assert found[1] == expected[1]


def test_an_overridden_loss_may_call_that_of_the_class(tmp_path):
    class Noted(GradAugTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.noted = True
            return super().compute_loss(*args, **kwargs)

    weights = []
    for kind in (Noted, GradAugTrainer):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=4)
        args = GradAugConfig(str(tmp_path), num_subnets=0, max_steps=1, **{**QUIET, "eval_strategy": "no"})
        trainer = kind(model, args, train_dataset=images(lambda i: torch.tensor(i % 4)))
        trainer.train()
        weights.append(model.fc.weight.detach())
    assert torch.equal(*weights)


def test_label_smoothing_of_a_module_without_configuration_is_not_left_out(tmp_path):
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 3)

        def forward(self, input_x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.linear(input_x[:, None])}

    torch.manual_seed(0)
    model, data = Module(), numbers(4, integers=True)
    args = GradAugConfig(str(tmp_path), num_subnets=0, label_smoothing_factor=0.3, **QUIET)
    trainer = GradAugTrainer(model, args, train_dataset=data, eval_dataset=data)
    logits = model(torch.stack([row["input_x"] for row in data]))["logits"]
    labels = torch.stack([row["labels"] for row in data])
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)

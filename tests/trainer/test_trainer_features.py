"""What the Trainer of transformers offers beside training, with sub-networks."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from timm.data import Mixup
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, ViTConfig, ViTForImageClassification
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from gradaug_hf.objective.sampling import SubnetSampler
from gradaug_hf.slimming import slicing_report
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.utils.compat import ACTIVATION_CHECKPOINTING
from tests.helpers.residual_network import gradients_by_hand, make_network
from tests.trainer.test_trainer import NETWORKS, assert_equal, config, rows, weights

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}


class KeepGradients(TrainerCallback):
    """Keeps the gradients that each step of the optimiser is made with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


class Scores:
    """Metrics that are what a test says, whatever the network predicts."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def __call__(self, prediction) -> dict[str, float]:
        return {"score": self.scores.pop(0)}


class KeepEvaluated(TrainerCallback):
    """Keeps the weights that each evaluation saw."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_evaluate(self, args, state, control, model, **kwargs) -> None:
        self.weights.append(weights(model))


# ---- the step ----


def test_the_gradient_of_a_whole_accumulated_step_is_clipped(tmp_path):
    network, data = make_network(), rows(6, 16, torch.float64)
    start, seen = weights(network), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    settings = {**SGD, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    args = config(tmp_path, max_steps=1, logging_steps=1, resolutions=[16, 12, 9], **settings)
    trainer = GradAugTrainer(network, args, train_dataset=data)
    trainer.train()

    sampled = [(s.width, s.resolution) for s in SubnetSampler(3, 0.5, 1.0, [16, 12, 9], seed=args.seed).sample(0)]
    parts = []
    for images in (seen[0], seen[4]):
        order = [next(i for i, row in enumerate(data) if torch.equal(row["pixel_values"], x)) for x in images]
        parts.append(gradients_by_hand(make_network(), images, torch.tensor(order) % 5, sampled)[1])
    gradients = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))
    assert norm > 0.1
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    for name, parameter in network.named_parameters():
        expected = gradients[name] * 0.05 / (norm + 1e-6)
        torch.testing.assert_close((start[name] - parameter) / 0.1, expected, rtol=0, atol=1e-10)


def test_checkpointed_layers_of_transformers_are_computed_anew_at_their_width(tmp_path):
    def train(checkpointing: bool) -> tuple[nn.Module, int]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        network = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes))
        calls = []
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda *_: calls.append(1))
        args = config(tmp_path, max_steps=2, resolutions=[32], **{ACTIVATION_CHECKPOINTING: checkpointing}, **SGD)
        GradAugTrainer(network, args, train_dataset=rows(8)).train()
        assert slicing_report(network).sliced_macs > 0.5
        return network, len(calls)

    (plain, passes), (checkpointed, with_anew) = train(False), train(True)
    assert with_anew > 1.5 * passes
    for (name, parameter), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_gradients_are_near_those_of_float32_and_losses_are_float32(tmp_path, monkeypatch):
    inputs_of_losses = []
    for name in ("cross_entropy", "kl_div"):
        function = getattr(nn.functional, name)

        def watched(logits: Tensor, *args, function=function, **kwargs) -> Tensor:
            inputs_of_losses.append((logits.dtype, torch.is_autocast_enabled("cpu")))
            return function(logits, *args, **kwargs)

        monkeypatch.setattr(nn.functional, name, watched)

    def first_gradients(bf16: bool) -> tuple[Tensor, set[torch.dtype]]:
        network, keeper, dtypes = make_network(dtype=torch.float32), KeepGradients(), set()
        network.block3.conv2.register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
        args = config(tmp_path, max_steps=1, bf16=bf16, resolutions=[16, 12], **SGD)
        GradAugTrainer(network, args, train_dataset=rows(4, 16), callbacks=[keeper]).train()
        return torch.cat([gradient.flatten() for gradient in keeper.steps[0].values()]), dtypes

    expected, plain_dtypes = first_gradients(bf16=False)
    found, dtypes = first_gradients(bf16=True)
    assert (plain_dtypes, dtypes) == ({torch.float32}, {torch.bfloat16})
    assert inputs_of_losses == [(torch.float32, False)] * 8
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_the_scaler_of_float16_scales_the_backward_of_every_pass(tmp_path, backward):
    def train(scaler: torch.amp.GradScaler | None) -> nn.Module:
        network = make_network()
        args = config(tmp_path, max_steps=3, subnet_backward=backward, resolutions=[16, 12], **SGD)
        trainer = GradAugTrainer(network, args, train_dataset=rows(12, 16, torch.float64))
        trainer.accelerator.scaler = scaler  # accelerate makes one for an accelerator only
        trainer.train()
        return network

    plain, scaled = train(None), train(torch.amp.GradScaler("cpu", init_scale=1024.0))
    for (name, parameter), expected in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_whose_scaled_gradients_overflow_is_left_out(tmp_path):
    network = make_network(dtype=torch.float32)
    start = weights(network)
    trainer = GradAugTrainer(
        network, config(tmp_path, max_steps=1, resolutions=[16, 12], **SGD), train_dataset=rows(4, 16)
    )
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    assert scaler.get_scale() == 2.0**126
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, start[name]), name


# ---- the best network ----

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_best_network_is_loaded_at_the_end_at_full_width(tmp_path, name):
    network, keeper = NETWORKS[name](), KeepEvaluated()
    fresh = copy.deepcopy(network)
    trainer = GradAugTrainer(
        network,
        config(tmp_path, max_steps=3, resolutions=[32], **{**SGD, **BEST}),
        train_dataset=rows(8),
        eval_dataset=rows(4),
        compute_metrics=Scores(0.2, 0.9, 0.5),
        callbacks=[keeper],
    )
    trainer.train()
    first, best, last = keeper.weights
    assert any(not torch.equal(best[key], last[key]) for key in best)
    assert_equal(weights(trainer.model), best)
    fresh.load_state_dict(best)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (getattr(out, "logits", out) for out in (trainer.model.eval()(images), fresh.eval()(images)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_training_stops_early_once_the_metric_gets_no_better(tmp_path):
    trainer = GradAugTrainer(
        NETWORKS["timm"](),
        config(tmp_path, max_steps=9, **{**SGD, **BEST}),
        train_dataset=rows(8),
        eval_dataset=rows(4),
        compute_metrics=Scores(0.2, 0.9, 0.5, 0.6),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


# ---- hyper-parameter search ----


class Search:
    """Tries the given settings one after the other, as optuna tries those that it samples."""

    trials: list[dict] = []

    def ensure_available(self) -> None:
        pass

    def run(self, trainer, n_trials: int, direction: str) -> BestRun:
        found = []
        for number, params in enumerate(self.trials[:n_trials]):
            trainer.train(trial=SimpleNamespace(number=number, params=params))
            found.append(BestRun(str(number), trainer.compute_objective(trainer.evaluate()), params))
        return min(found, key=lambda run: run.objective)


def test_hyper_parameters_of_gradaug_are_searched_each_time_from_a_new_network(tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trials = [
        {"min_width": 0.75, "num_subnets": 1, "learning_rate": 0.1},
        {"min_width": 0.5, "num_subnets": 1, "learning_rate": 0.1},
        {"min_width": 0.5, "num_subnets": 2, "learning_rate": 0.0},
    ]
    monkeypatch.setattr(Search, "trials", trials)
    made, losses, evaluated = [], [], []

    def model_init() -> nn.Module:
        made.append(NETWORKS["timm"]())
        return made[-1]

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs) -> None:
            if "loss" in logs:
                losses.append(dict(logs))
            if "eval_loss" in logs:
                evaluated.append(logs["eval_loss"])

    trainer = GradAugTrainer(
        args=config(tmp_path, max_steps=2, logging_steps=2, resolutions=[32], **SGD),
        train_dataset=rows(8),
        eval_dataset=rows(4),
        model_init=model_init,
        callbacks=[Watch()],
    )
    best = trainer.hyperparameter_search(lambda trial: trial.params, n_trials=3, backend="optuna")
    assert [log["subnet_width"] for log in losses[:2]] == [0.75, 0.5]
    assert 0.5 < losses[2]["subnet_width"] < 1
    assert len(made) == 4  # the constructor's, and one for each trial
    untrained, kept = weights(NETWORKS["timm"]()), dict(made[3].named_parameters())
    assert all(torch.equal(kept[name], untrained[name]) for name in kept)  # its learning rate was zero
    assert any(not torch.equal(p, untrained[name]) for name, p in made[2].named_parameters())
    assert len(set(evaluated)) == 3
    assert best.objective == min(evaluated)


# ---- settings of the Trainer that are about images ----


def test_metrics_see_the_images_of_a_timm_model(tmp_path):
    seen = []

    def images_seen(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.inputs)
        return {}

    def evaluate(**model: object) -> None:
        args = config(tmp_path, include_for_metrics=["inputs"])
        GradAugTrainer(args=args, eval_dataset=rows(6), compute_metrics=images_seen, **model).evaluate()

    evaluate(model=NETWORKS["timm"]())
    evaluate(model_init=NETWORKS["timm"])
    expected = torch.stack([row["pixel_values"] for row in rows(6)]).numpy()
    assert [(images == expected).all() for images in seen] == [True, True]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("resnet", "bf16_full_eval"),
        ("timm wrapper", "bf16_full_eval"),
        ("timm", "bf16_full_eval"),
        ("timm", "fp16_full_eval"),
    ],
)
def test_images_have_the_precision_of_a_model_that_is_evaluated_in_it(tmp_path, name, precision):
    args = config(tmp_path, eval_widths=[0.5], resolutions=[32], **{precision: True})
    trainer = GradAugTrainer(NETWORKS[name](), args, train_dataset=rows(8), eval_dataset=rows(4))
    expected = GradAugTrainer(
        NETWORKS[name](), config(tmp_path), train_dataset=rows(8), eval_dataset=rows(4)
    ).evaluate()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], abs=0.03)
    assert math.isfinite(metrics["eval_width0.5_loss"])
    assert trainer.predict(rows(4, labels=False)).predictions.shape == (4, 5)


def test_the_images_are_used_columns_of_a_timm_model(tmp_path):
    data = [{**row, "name": "of a file"} for row in rows(8)]
    trainer = GradAugTrainer(
        NETWORKS["timm"](), config(tmp_path, max_steps=1, remove_unused_columns=True), train_dataset=data
    )
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_columns_that_a_transform_makes_images_of_are_not_removed(tmp_path, name):
    data = Dataset.from_list([{"image": [0.0], "labels": 0}]).with_transform(lambda batch: batch)
    args = config(tmp_path, remove_unused_columns=True)
    message = rf"would remove the columns \['image', 'labels'\] of {name} .* set remove_unused_columns=False"
    with pytest.raises(ValueError, match=message):
        GradAugTrainer(NETWORKS["timm"](), args, **{"train_dataset": rows(4), name: data})


# ---- the first and the last batch ----


class Positions(nn.Module):
    """Batch norm of as many positions as the image has patches of 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 16, 16), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).mean(dim=(2, 3)))


def test_a_last_batch_of_one_image_trains_at_a_resolution_that_leaves_one_position(tmp_path):
    seen, model = set(), Positions()
    model.conv.register_forward_pre_hook(lambda module, inputs: seen.add((len(inputs[0]), inputs[0].shape[2])))
    args = config(tmp_path, num_train_epochs=4, seed=1, num_subnets=4, resolutions=[32, 24])
    GradAugTrainer(model, args, train_dataset=rows(5)).train()
    assert {(1, 24), (1, 32), (4, 24)} <= seen


def test_a_collator_that_needs_an_even_batch_is_taken(tmp_path):
    mixup = Mixup(mixup_alpha=0.5, num_classes=5)

    def mixed(examples: list[dict]) -> dict[str, Tensor]:
        images, labels = mixup(
            torch.stack([example["pixel_values"] for example in examples]),
            torch.tensor([example["labels"] for example in examples]),
        )
        return {"pixel_values": images, "labels": labels}

    trainer = GradAugTrainer(
        NETWORKS["timm"](), config(tmp_path, max_steps=1), data_collator=mixed, train_dataset=rows(8)
    )
    trainer.train()
    assert trainer.state.global_step == 1


# ---- a model by its name in timm ----


class Named(list):
    classes = ["ant", "bee", "cat", "dog", "elk"]


def test_a_timm_model_is_made_by_its_name_for_the_classes_of_the_data(tmp_path):
    trainer = GradAugTrainer("test_resnet", config(tmp_path), train_dataset=Named(rows(4)))
    assert trainer.model.num_classes == 5
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == Named.classes
    with pytest.raises(
        ValueError, match=r"model is 'test_resnet', but no dataset names its classes .*num_classes=\.\.\."
    ):
        GradAugTrainer("test_resnet", config(tmp_path), train_dataset=rows(4))

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.objective.transforms import RandomQuarterTurn
from gradaug_hf.slimming import extract_subnet, make_slimmable, slicing_report
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.trainer.trainer import GradAugTrainer
from tests.helpers.residual_network import gradients_by_hand, make_network

CPU = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config)


def convnext() -> ConvNextForImageClassification:
    torch.manual_seed(0)
    return ConvNextForImageClassification(ConvNextConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_labels=5))


def wrapper() -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=5))


def plain_timm() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


NETWORKS = {"resnet": resnet, "convnext": convnext, "timm wrapper": wrapper, "timm": plain_timm}


def rows(count: int, side: int = 32, dtype: torch.dtype = torch.float32, labels: bool = True) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 3, side, side, generator=generator, dtype=dtype)
    return [{"pixel_values": image, **({"labels": i % 5} if labels else {})} for i, image in enumerate(images)]


def config(tmp_path, **settings) -> GradAugConfig:
    settings = {"resolutions": [32, 24], "min_width": 0.5, "per_device_train_batch_size": 4, **CPU, **settings}
    return GradAugConfig(str(tmp_path), **settings)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# ---- training ----


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_a_training_step_follows_the_gradients_of_the_formula(tmp_path, backward):
    network = make_network()
    start = weights(network)
    args = config(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=6,
        resolutions=[16, 12, 9],
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        kl_weight=0.7,
        subnet_backward=backward,
    )
    data = rows(6, 16, torch.float64)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer = GradAugTrainer(network, args, train_dataset=data)
    trainer.train()
    order = [next(i for i, row in enumerate(data) if torch.equal(row["pixel_values"], image)) for image in seen[0]]
    assert sorted(order) == list(range(6))
    images, labels = seen[0], torch.tensor(order) % 5
    subnets = SubnetSampler(3, 0.5, 1.0, [16, 12, 9], seed=args.seed).sample(0)
    sampled = [(subnet.width, subnet.resolution) for subnet in subnets]
    reference = make_network()
    loss, gradients = gradients_by_hand(reference, images, labels, sampled, kl_weight=0.7)
    full, _ = gradients_by_hand(reference, images, labels, [])
    for name, parameter in network.named_parameters():
        torch.testing.assert_close((start[name] - parameter) / 0.1, gradients[name], rtol=0, atol=1e-10)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=1e-6)  # the Trainer adds losses up in float32
    assert log["loss_full"] == pytest.approx(full, abs=1e-10)
    assert log["loss_full"] + log["loss_subnets"] == pytest.approx(loss, abs=1e-10)
    assert log["subnet_width"] == pytest.approx(sum(width for width, _ in sampled) / 3, abs=1e-12)
    assert log["subnet_resolution"] == pytest.approx(sum(side for _, side in sampled) / 3, abs=1e-12)


def test_an_accumulated_step_on_parts_follows_the_gradients_of_the_formula(tmp_path):
    network = make_network()
    start = weights(network)
    args = config(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        resolutions=[16, 12, 9],
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        subnet_images="split",
    )
    data = rows(10, 16, torch.float64)
    batches = []

    def keep(batch: list[dict]) -> dict:
        batches.append(default_data_collator(batch))
        return batches[-1]

    trainer = GradAugTrainer(network, args, train_dataset=data, data_collator=keep)
    batches.clear()  # the first image was looked at
    trainer.train()
    subnets = SubnetSampler(3, 0.5, 1.0, [16, 12, 9], seed=args.seed, subnet_images="split").sample(0)
    sampled, parts = [(s.width, s.resolution) for s in subnets], [s.part.indices(5) for s in subnets]
    reference = make_network()
    found = [gradients_by_hand(reference, b["pixel_values"], b["labels"], sampled, parts=parts)[1] for b in batches]
    for name, parameter in network.named_parameters():
        expected = (found[0][name] + found[1][name]) / 2
        torch.testing.assert_close((start[name] - parameter) / 0.1, expected, rtol=0, atol=1e-10)


def test_the_weight_of_the_subnetworks_rises_over_the_steps_of_the_training(tmp_path):
    def losses(**settings) -> list[float]:
        args = config(tmp_path, max_steps=4, logging_steps=1, learning_rate=0.0, resolutions=[16], **settings)
        trainer = GradAugTrainer(make_network(), args, train_dataset=rows(16, 16, torch.float64))
        trainer.train()
        return [entry["loss_subnets"] for entry in trainer.state.log_history if "loss_subnets" in entry]

    constant, rising = losses(), losses(kl_warmup=0.75)
    assert rising == pytest.approx([share * loss for share, loss in zip((0, 1 / 3, 2 / 3, 1), constant, strict=True)])


def test_a_step_of_random_depth_follows_the_gradients_of_the_formula(tmp_path):
    network = make_network()
    start = weights(network)
    args = config(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=6,
        resolutions=[16, 12],
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        subnet_mode="depth",
        min_survival=0.3,
    )
    data = rows(6, 16, torch.float64)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer = GradAugTrainer(network, args, train_dataset=data)
    trainer.train()
    labels = torch.tensor(
        [next(i for i, row in enumerate(data) if torch.equal(row["pixel_values"], image)) % 5 for image in seen[0]]
    )
    subnets = SubnetSampler(3, resolutions=[16, 12], seed=args.seed, subnet_mode="depth", min_survival=0.3).sample(0)
    dropped = [[f"block{index + 1}" for index in subnet.dropped_blocks(3)] for subnet in subnets]
    count = sum(map(len, dropped))
    assert count > 1
    sampled = [(1.0, subnet.resolution, *names) for subnet, names in zip(subnets, dropped, strict=True)]
    _, gradients = gradients_by_hand(make_network(), seen[0], labels, sampled)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close((start[name] - parameter) / 0.1, gradients[name], rtol=0, atol=1e-10)
    log = trainer.state.log_history[0]
    assert log["subnet_depth"] == pytest.approx(1 - count / 9, abs=1e-12)
    assert log["subnet_width"] == 1.0


@pytest.mark.parametrize("mode", ["depth", "width+depth"])
@pytest.mark.parametrize("name", ["convnext", "timm wrapper"])
def test_networks_of_transformers_lose_blocks_too(tmp_path, name, mode):
    network = NETWORKS[name]()
    start = weights(network)
    depth = {"subnet_mode": mode, "min_survival": 0.2, "resolutions": [32, 40]}
    args = config(tmp_path, max_steps=3, bf16=True, logging_steps=3, **depth)
    trainer = GradAugTrainer(network, args, train_dataset=rows(12))
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["subnet_depth"] < 1
    assert (log["subnet_width"] < 1) == (mode == "width+depth")
    for parameter, tensor in network.named_parameters():
        assert not torch.equal(tensor, start[parameter]), parameter
        assert torch.isfinite(tensor).all(), parameter


def test_random_depth_goes_on_after_an_evaluation_at_a_width(tmp_path):
    args = {"max_steps": 4, "subnet_mode": "depth", "min_survival": 0.2, "logging_steps": 2}
    plain, evaluated = plain_timm(), plain_timm()
    for network, settings in ((plain, {}), (evaluated, {"eval_strategy": "steps", "eval_steps": 2})):
        trainer = GradAugTrainer(
            network,
            config(tmp_path, eval_widths=[0.5], **args, **settings),
            train_dataset=rows(16),
            eval_dataset=rows(4),
        )
        trainer.train()
        assert all(log["subnet_depth"] < 1 for log in trainer.state.log_history if "loss" in log)
    assert any("eval_width0.5_loss" in log for log in trainer.state.log_history)
    assert_equal(weights(evaluated), weights(plain))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_parameter_changes_and_stays_finite(tmp_path, make):
    network = make()
    start = weights(network)
    args = config(tmp_path, max_steps=3, learning_rate=1e-2, bf16=True, resolutions=[32, 40])
    trainer = GradAugTrainer(network, args, train_dataset=rows(12))
    trainer.train()
    assert slicing_report(network).sliced_macs > 0
    for name, parameter in network.named_parameters():
        assert not torch.equal(parameter, start[name]), name
        assert torch.isfinite(parameter).all(), name
    assert network.training
    counters = [name for name in start if name.endswith("num_batches_tracked")]
    assert all(network.state_dict()[name] == 3 for name in counters)


@pytest.mark.parametrize("name", ["resnet", "timm wrapper"])
def test_without_subnetworks_weights_are_bit_identical_to_the_plain_trainer(tmp_path, name):
    data = rows(24)
    plain, ours = NETWORKS[name](), NETWORKS[name]()
    shared = {"max_steps": 20, "learning_rate": 0.05, "per_device_train_batch_size": 4, **CPU}
    reference = Trainer(plain, TrainingArguments(str(tmp_path / "plain"), **shared), train_dataset=data)
    reference.train()
    trainer = GradAugTrainer(ours, config(tmp_path / "ours", num_subnets=0, **shared), train_dataset=data)
    trainer.train()
    assert_equal(weights(ours), weights(plain))
    assert type(ours) is type(plain)
    assert {type(module) for module in ours.modules()} == {type(module) for module in plain.modules()}
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (trainer, reference)]
    assert losses[0] == losses[1]


def test_a_plain_timm_network_is_trained_without_subnetworks_as_its_wrapper_is(tmp_path):
    data = rows(24)
    bare, wrapped = plain_timm(), wrapper()
    bare.load_state_dict(wrapped.timm_model.state_dict())
    args = {"num_subnets": 0, "max_steps": 5, "label_smoothing_factor": 0.1, "optim": "sgd", "learning_rate": 0.1}
    GradAugTrainer(bare, config(tmp_path, **args), train_dataset=data).train()
    GradAugTrainer(wrapped, config(tmp_path, **args), train_dataset=data).train()
    expected = weights(wrapped.timm_model)
    for name, tensor in weights(bare).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_a_batch_of_8_equals_4_accumulated_batches_of_2(tmp_path, backward):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    ).double()  # fmt: skip
    accumulated = copy.deepcopy(network)
    data = rows(24, 16, torch.float64)
    shared = {
        "max_steps": 6,
        "optim": "sgd",
        "learning_rate": 0.2,
        "resolutions": [16, 12],
        "subnet_backward": backward,
        "logging_steps": 1,
    }
    one = GradAugTrainer(network, config(tmp_path, per_device_train_batch_size=8, **shared), train_dataset=data)
    one.train()
    args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **shared)
    other = GradAugTrainer(accumulated, args, train_dataset=data)
    other.train()
    assert slicing_report(network).sliced_macs > 0.9
    for (name, parameter), other_parameter in zip(network.named_parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(parameter, other_parameter, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for log, other_log in zip(one.state.log_history, other.state.log_history, strict=True):
        for key in ("loss", "loss_full", "loss_subnets", "subnet_width", "subnet_resolution"):
            assert log.get(key) == pytest.approx(other_log.get(key), abs=1e-6)


@pytest.mark.parametrize(
    "own, transform",
    [
        ({}, None),
        ({"subnet_mode": "width+depth", "min_survival": 0.5, "cutmix_alpha": 1.0}, RandomQuarterTurn()),
    ],
    ids=["width", "depth, cutmix and turns"],
)
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, own, transform):
    data = rows(16)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.01, **own}
    network = plain_timm()
    GradAugTrainer(network, config(tmp_path, **settings), train_dataset=data, subnet_transform=transform).train()
    resumed = plain_timm()
    trainer = GradAugTrainer(resumed, config(tmp_path, **settings), train_dataset=data, subnet_transform=transform)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal(weights(resumed), weights(network))


def test_checkpointed_layers_are_computed_anew_at_their_width(tmp_path):
    plain, checkpointed = plain_timm(), plain_timm()
    checkpointed.set_grad_checkpointing()
    args = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    for network in (plain, checkpointed):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # a layer that is computed anew writes its statistics again
        GradAugTrainer(network, config(tmp_path, **args), train_dataset=rows(8)).train()
    found = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_with_cutmix_follows_the_gradients_of_the_formula(tmp_path, smoothing):
    network = make_network()
    network.num_classes = 5
    start = weights(network)
    args = config(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=6,
        resolutions=[16, 12, 9],
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        cutmix_alpha=1.0,
        label_smoothing_factor=smoothing,
    )
    data = rows(6, 16, torch.float64)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    GradAugTrainer(network, args, train_dataset=data).train()
    mixed = seen[0]
    labels = torch.zeros(6, 5, dtype=torch.float64)
    for i, image in enumerate(mixed):
        for row in data:
            share = (image == row["pixel_values"]).all(dim=0).double().mean()
            labels[i, row["labels"]] += share
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert ((labels > 0) & (labels < 1)).any()
    subnets = SubnetSampler(3, 0.5, 1.0, [16, 12, 9], seed=args.seed).sample(0)
    sampled = [(subnet.width, subnet.resolution) for subnet in subnets]
    target = (1 - smoothing) * labels + smoothing / 5
    _, gradients = gradients_by_hand(make_network(), mixed, target, sampled)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close((start[name] - parameter) / 0.1, gradients[name], rtol=0, atol=1e-10)


def test_every_batch_is_mixed_in_its_own_way_and_again_the_same(tmp_path):
    def seen_pixels(**settings) -> Tensor:
        network, seen = plain_timm(), []
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0, 0, 0].double()))
        args = config(
            tmp_path,
            max_steps=2,
            num_subnets=0,
            mixup_alpha=1.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **settings,
        )
        data = [{"pixel_values": torch.full((3, 32, 32), float(i)), "labels": i % 5} for i in range(8)]
        GradAugTrainer(network, args, train_dataset=data).train()
        return torch.stack(seen)

    first, unmixed = seen_pixels(), seen_pixels(mix_prob=0.0)
    assert torch.equal(seen_pixels(), first)
    assert sorted(unmixed.flatten().tolist()) == list(range(8))
    shares = (first[:, 0] - unmixed[:, 1]) / (unmixed[:, 0] - unmixed[:, 1])
    assert ((shares > 0) & (shares < 1)).all()
    assert len({round(share, 4) for share in shares.tolist()}) == 4


@pytest.mark.parametrize("name", ["timm", "resnet"])
def test_evaluation_mixes_nothing(tmp_path, name):
    plain = GradAugTrainer(NETWORKS[name](), config(tmp_path), eval_dataset=rows(8))
    mixed = GradAugTrainer(NETWORKS[name](), config(tmp_path, cutmix_alpha=1.0), eval_dataset=rows(8))
    assert mixed.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_soft_labels_are_learned_by_transformers_and_timm_networks(tmp_path):
    data = rows(8)
    for row in data:
        row["labels"] = torch.softmax(torch.randn(5), dim=0)
    for make in (resnet, plain_timm):
        for num_subnets in (0, 1):
            args = config(tmp_path, max_steps=2, num_subnets=num_subnets, logging_steps=1)
            network = make()
            if make is resnet:  # else its own loss, the Trainer's without sub-networks, takes them for several classes
                network.config.problem_type = "single_label_classification"
            trainer = GradAugTrainer(network, args, train_dataset=data)
            trainer.train()
            # Close to a uniform prediction, where a loss of five separate binary choices would be 0.69.
            assert 1.0 < trainer.state.log_history[0]["loss"] < 3.0


def test_the_sampler_and_the_transform_of_the_caller_are_used(tmp_path):
    class TwoOfThem:
        def sample(self, step: int) -> list[Subnet]:
            return [Subnet(0.75, 16), Subnet(0.5)]

    sizes, seen = [], []
    network = plain_timm()
    network.conv1.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))

    def transform(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return images.flip(3)

    trainer = GradAugTrainer(
        network,
        config(tmp_path, max_steps=2, logging_steps=2),
        train_dataset=rows(8),
        subnet_sampler=TwoOfThem(),
        subnet_transform=transform,
    )
    trainer.train()
    assert seen == [(4, 3, 32, 32)] * 4
    assert sizes == [(32, 32), (16, 16), (32, 32)] * 2
    assert trainer.state.log_history[0]["subnet_width"] == 0.625
    assert trainer.state.log_history[0]["subnet_resolution"] == 24


def test_subnetworks_follow_the_optimiser_step_whatever_is_accumulated(tmp_path):
    class Recording(SubnetSampler):
        steps: list[int] = []

        def sample(self, step: int) -> list[Subnet]:
            self.steps.append(step)
            return super().sample(step)

    args = config(tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    sampler = Recording(1, 0.5, 1.0, [32])
    GradAugTrainer(plain_timm(), args, train_dataset=rows(12), subnet_sampler=sampler).train()
    assert sampler.steps == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_with_an_interval_the_log_has_the_means_of_the_steps_with_subnetworks(tmp_path, backward):
    network = plain_timm()
    passes = []
    network.register_forward_pre_hook(lambda module, inputs: passes.append(trainer.state.global_step))
    args = config(tmp_path, max_steps=5, logging_steps=1, subnet_interval=3, subnet_backward=backward)
    trainer = GradAugTrainer(network, args, train_dataset=rows(20))
    trainer.train()
    assert passes == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 4]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs if "loss_subnets" in log] == [1, 4]
    assert [log["step"] for log in logs if "subnet_width" in log] == [1, 4]
    assert all(log["loss"] == pytest.approx(log["loss_full"], abs=1e-5) for log in logs if "loss_subnets" not in log)

    together = plain_timm()
    args = config(tmp_path, max_steps=5, logging_steps=5, subnet_interval=3, subnet_backward=backward)
    trainer = GradAugTrainer(together, args, train_dataset=rows(20))
    trainer.train()
    assert_equal(weights(together), weights(network))
    mean = trainer.state.log_history[0]
    assert mean["loss_full"] == pytest.approx(sum(log["loss_full"] for log in logs) / 5, abs=1e-6)
    for name in ("loss_subnets", "subnet_width", "subnet_resolution"):
        assert mean[name] == pytest.approx((logs[0][name] + logs[3][name]) / 2, abs=1e-6)


def test_a_network_from_model_init_is_trained_with_subnetworks(tmp_path):
    trainer = GradAugTrainer(
        args=config(tmp_path, max_steps=2, logging_steps=1, label_smoothing_factor=0.1),
        train_dataset=rows(8),
        model_init=plain_timm,
    )
    trainer.train()
    assert slicing_report(trainer.model).sliced_macs > 0
    assert trainer.state.log_history[0]["loss_subnets"] > 0


def test_default_resolutions_follow_the_training_images_not_the_networks_own(tmp_path):
    network = timm.create_model("test_resnet", num_classes=5)  # made for 160 pixels
    trainer = GradAugTrainer(network, config(tmp_path, max_steps=2, resolutions=None), train_dataset=rows(8, 56))
    sizes = set()
    network.conv1.register_forward_pre_hook(lambda module, inputs: sizes.add(inputs[0].shape[-1]))
    trainer.train()
    assert 56 in sizes
    assert sizes <= {56, 48, 40, 32}


def test_default_resolutions_of_a_stream_follow_its_first_batch(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows(12, 56))

    network = plain_timm()
    trainer = GradAugTrainer(network, config(tmp_path, max_steps=3, resolutions=None), train_dataset=Stream())
    sizes = set()
    network.conv1.register_forward_pre_hook(lambda module, inputs: sizes.add(inputs[0].shape[-1]))
    trainer.train()
    assert 56 in sizes
    assert {56} < sizes <= {56, 48, 40, 32}


def test_looking_at_the_first_image_leaves_random_numbers_as_they_are(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict:
            return {"pixel_values": torch.randn(3, 32, 32), "labels": 0}

    plain_state = None
    for resolutions in ([32, 24], None):
        GradAugTrainer(plain_timm(), config(tmp_path, resolutions=resolutions), train_dataset=Noisy())
        if plain_state is None:
            plain_state = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), plain_state)


# ---- evaluation and checkpoints ----


@pytest.mark.parametrize("name", ["resnet", "convnext", "timm wrapper"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluate_and_predict_give_what_the_plain_trainer_gives(tmp_path, name, smoothing):
    network = NETWORKS[name]()
    untouched = copy.deepcopy(network)
    args = config(tmp_path, label_smoothing_factor=smoothing, per_device_eval_batch_size=4, resolutions=[32])
    ours = GradAugTrainer(network, args, train_dataset=rows(8), eval_dataset=rows(10), compute_metrics=topk_accuracy)
    plain_args = TrainingArguments(
        str(tmp_path), label_smoothing_factor=smoothing, per_device_eval_batch_size=4, **CPU
    )
    plain = Trainer(untouched, plain_args, eval_dataset=rows(10), compute_metrics=topk_accuracy)
    found, expected = ours.evaluate(), plain.evaluate()
    for key in ("eval_loss", "eval_top1"):
        assert found[key] == pytest.approx(expected[key], abs=1e-6)
    for labels in (True, False):
        predictions = [t.predict(rows(10, labels=labels)) for t in (ours, plain)]
        assert (predictions[0].predictions == predictions[1].predictions).all()
        assert (predictions[0].label_ids is None) == (not labels)


def test_a_plain_timm_network_is_evaluated_with_and_without_labels(tmp_path):
    network = plain_timm()
    args = config(tmp_path, per_device_eval_batch_size=4)
    trainer = GradAugTrainer(
        network, args, train_dataset=rows(8), eval_dataset=rows(10), compute_metrics=topk_accuracy
    )
    metrics = trainer.evaluate()
    images = torch.stack([row["pixel_values"] for row in rows(10)])
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(images)
    labels = torch.arange(10) % 5
    assert metrics["eval_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert "eval_top5" not in metrics  # of five classes
    assert metrics["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    for has_labels in (True, False):
        predicted = trainer.predict(rows(10, labels=has_labels))
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits, rtol=0, atol=1e-5)
        assert (predicted.label_ids is not None) == has_labels


@pytest.mark.parametrize("num_subnets", [0, 2])
def test_widths_are_evaluated_with_batch_norm_recalibrated_on_training_images(tmp_path, num_subnets):
    network = plain_timm()
    train, evaluation = rows(12), [{**row, "pixel_values": row["pixel_values"] * 2 + 1} for row in rows(10)]
    args = config(tmp_path, eval_widths=[0.5], num_subnets=num_subnets, per_device_train_batch_size=12)
    trainer = GradAugTrainer(
        network, args, train_dataset=train, eval_dataset=evaluation, compute_metrics=topk_accuracy
    )
    before = weights(network)
    torch.manual_seed(0)
    Trainer.evaluate(trainer)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    metrics = trainer.evaluate()
    assert_equal(weights(network), before)
    assert torch.equal(torch.get_rng_state(), state)

    subnet = extract_subnet(make_slimmable(copy.deepcopy(network)), 0.5).train()
    for module in subnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0
    with torch.no_grad():
        subnet(torch.stack([row["pixel_values"] for row in train]))
        logits = subnet.eval()(torch.stack([row["pixel_values"] for row in evaluation]))
    labels = torch.arange(10) % 5
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert metrics["eval_width0.5_loss"] == pytest.approx(expected, abs=1e-4)
    assert metrics["eval_width0.5_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["eval_loss"] != pytest.approx(expected, abs=1e-3)
    assert trainer.state.log_history[-1]["eval_width0.5_loss"] == metrics["eval_width0.5_loss"]


def test_widths_of_several_evaluation_sets_are_evaluated_once_each(tmp_path):
    args = config(tmp_path, eval_widths=[0.5, 0.75])
    trainer = GradAugTrainer(plain_timm(), args, train_dataset=rows(8), eval_dataset={"a": rows(4), "b": rows(8)})
    metrics = trainer.evaluate()
    losses = sorted(key for key in metrics if key.endswith("_loss"))
    assert losses == sorted(f"eval_{name}{width}_loss" for name in "ab" for width in ("", "_width0.5", "_width0.75"))


def test_widths_cannot_be_evaluated_without_training_images(tmp_path):
    trainer = GradAugTrainer(plain_timm(), config(tmp_path, eval_widths=[0.5]), eval_dataset=rows(4))
    with refused("eval_widths needs a train_dataset"):
        trainer.evaluate()


def test_evaluation_amid_training_does_not_touch_the_training_log(tmp_path):
    args = config(tmp_path, max_steps=4, logging_steps=4, eval_strategy="steps", eval_steps=2)
    trainer = GradAugTrainer(plain_timm(), args, train_dataset=rows(8), eval_dataset=rows(8))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == 1
    assert len(evaluations) == 2
    assert not any("loss_full" in log for log in evaluations)
    assert logs[0]["loss_full"] + logs[0]["loss_subnets"] == pytest.approx(logs[0]["loss"], abs=1e-5)


def test_timm_loads_what_the_trainer_saves(tmp_path):
    network = plain_timm().to(memory_format=torch.channels_last)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = GradAugTrainer(network, config(tmp_path, **settings), train_dataset=rows(8))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    images = torch.randn(2, 3, 32, 32)
    expected = network.eval()(images)
    for folder in ("checkpoint-2", "final"):
        loaded = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True).eval()
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-6)
        assert_equal(weights(loaded), weights(network))


# ---- what is refused, and warned of ----


def refused(message: str):
    return pytest.raises(ValueError, match=message)


class OwnScale(nn.Module):
    """A network of which nothing can be sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) @ self.weight


def test_a_network_that_is_not_sliced_is_warned_of_loudly(tmp_path):
    with pytest.warns(UserWarning, match="0% of OwnScale is sliced, .* by their images only"):
        GradAugTrainer(OwnScale(), config(tmp_path), train_dataset=rows(4))


class MostlyUnknown(OwnScale):
    """A model of which a layer of few operations can be sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown, self.known = nn.Linear(3, 60), nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.fft.rfft(self.unknown(x.mean(dim=(2, 3)))).real
        return self.known(x.mean(dim=(2, 3))) + features[:, :5]


def test_a_network_of_which_less_than_half_is_sliced_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="3[0-9]% of MostlyUnknown is sliced, .* by their images mostly"):
        GradAugTrainer(MostlyUnknown(), config(tmp_path), train_dataset=rows(4))


@pytest.mark.filterwarnings("ignore:0% of OwnScale")
def test_settings_with_which_gradaug_would_do_nothing_are_refused(tmp_path):
    with refused(r"GradAug would do nothing: .* resolutions is \[32\]"):
        GradAugTrainer(OwnScale(), config(tmp_path, resolutions=[32]), train_dataset=rows(4))
    with refused("GradAug would do nothing"):
        GradAugTrainer(plain_timm(), config(tmp_path, resolutions=[32], min_width=1.0), train_dataset=rows(4))
    GradAugTrainer(plain_timm(), config(tmp_path, resolutions=[24], min_width=1.0), train_dataset=rows(4))
    depth = {"resolutions": [32], "subnet_mode": "depth"}
    with refused("GradAug would do nothing"):
        GradAugTrainer(plain_timm(), config(tmp_path, **depth, min_survival=1.0), train_dataset=rows(4))
    GradAugTrainer(plain_timm(), config(tmp_path, **depth, min_survival=0.9), train_dataset=rows(4))
    GradAugTrainer(OwnScale(), config(tmp_path, resolutions=[32], num_subnets=0), train_dataset=rows(4))
    GradAugTrainer(
        OwnScale(), config(tmp_path, resolutions=[32]), train_dataset=rows(4), subnet_transform=lambda x: x.flip(3)
    )


@pytest.mark.filterwarnings("ignore:0% of VisionTransformer")
def test_a_resolution_that_the_network_cannot_take_is_refused(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1)
    with refused(r"resolutions holds 192, which VisionTransformer cannot take .* sides that it can take: 224"):
        GradAugTrainer(network, config(tmp_path, resolutions=[224, 192]), train_dataset=rows(4, 224))


def test_a_resolution_at_which_one_side_of_the_images_does_not_fit_is_refused(tmp_path):
    model = timm.create_model("test_vit", num_classes=5, dynamic_img_size=True, depth=1)
    images = [{**row, "pixel_values": torch.zeros(3, 32, 80)} for row in rows(4)]  # patches of 16
    GradAugTrainer(model, config(tmp_path, resolutions=[32, 64]), train_dataset=images)
    with refused(r"resolutions holds 48, .* for images of 48 x 120 pixels"):
        GradAugTrainer(model, config(tmp_path, resolutions=[32, 48]), train_dataset=images)
    sampler = SubnetSampler(resolutions=[48])
    with refused(r"resolutions holds 48, .* for images of 48 x 120 pixels"):
        GradAugTrainer(model, config(tmp_path), train_dataset=images, subnet_sampler=sampler)


@pytest.mark.filterwarnings("ignore:0% of VisionTransformer")
def test_a_network_of_fixed_size_is_trained_at_it_with_a_warning(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1, img_size=32)
    args = config(tmp_path, resolutions=None, max_steps=1)
    with pytest.warns(UserWarning, match=r"VisionTransformer takes images of 32 pixels alone.*dynamic_img_size=True"):
        trainer = GradAugTrainer(network, args, train_dataset=rows(4), subnet_transform=lambda images: images.flip(3))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("output_dir is .* cannot be written"):
        GradAugTrainer(plain_timm(), config(tmp_path / "file"), train_dataset=rows(4))


def test_labels_out_of_range_are_refused(tmp_path):
    data = rows(4)
    data[2]["labels"] = 5
    for make in (resnet, plain_timm):
        trainer = GradAugTrainer(make(), config(tmp_path, max_steps=1), train_dataset=data, eval_dataset=data)
        with refused(r"label 5 is out of range; the model has classes 0\.\.4"):
            trainer.train()
        with refused("label 5 is out of range"):
            trainer.evaluate()


def test_a_batch_without_images_or_labels_is_refused(tmp_path):
    with refused(r"a batch holds \['pixel_values'\]; expected 'pixel_values' and 'labels'"):
        GradAugTrainer(plain_timm(), config(tmp_path), train_dataset=rows(4, labels=False))
    data = [{"image": row["pixel_values"], "labels": row["labels"]} for row in rows(4)]
    with refused(r"a batch holds \['image', 'labels'\]|a batch holds \['labels', 'image'\]"):
        GradAugTrainer(plain_timm(), config(tmp_path), train_dataset=data)


def test_a_later_batch_without_labels_is_refused(tmp_path):
    data = [*rows(4), *rows(4, labels=False)]
    args = config(tmp_path, max_steps=2, train_sampling_strategy="sequential")
    trainer = GradAugTrainer(plain_timm(), args, train_dataset=data)
    with refused(r"a batch holds \['pixel_values'\]; expected 'pixel_values' and 'labels'"):
        trainer.train()


def test_logits_of_a_wrong_shape_are_refused(tmp_path):
    with refused("num_classes of this ResNet is 0, so that it returns features"):
        GradAugTrainer(timm.create_model("test_resnet", num_classes=0), config(tmp_path), train_dataset=rows(4))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    with refused(r"the model returned logits of shape \(4, 5, 28, 28\); expected \(4, classes\)"):
        GradAugTrainer(network, config(tmp_path, max_steps=1), train_dataset=rows(4)).train()


def test_a_problem_that_is_not_gradaugs_is_refused(tmp_path):
    network = resnet()
    network.config.problem_type = "regression"
    with refused("problem_type is 'regression'"):
        GradAugTrainer(network, config(tmp_path), train_dataset=rows(4))


# ---- another loss of the full network ----

WEIGHTS = torch.tensor([5.0, 1.0, 1.0, 2.0, 0.5], dtype=torch.float64)


class Weighted(GradAugTrainer):
    def full_loss(self, model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
        logits = model(inputs["pixel_values"])
        return nn.functional.cross_entropy(logits, inputs["labels"], weight=WEIGHTS.to(logits.dtype)), logits


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_sub_networks_learn_from_a_full_network_with_another_loss(tmp_path, backward):
    network, data = make_network(), rows(6, 16, torch.float64)
    start, seen = weights(network), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    batch = {"max_steps": 1, "per_device_train_batch_size": 6, "resolutions": [16, 12]}
    args = config(tmp_path, **sgd, **batch, logging_steps=1, subnet_backward=backward)
    trainer = Weighted(network, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    images = seen[0]
    labels = torch.tensor(
        [next(i for i, r in enumerate(data) if torch.equal(r["pixel_values"], x)) % 5 for x in images]
    )
    subnets = SubnetSampler(3, 0.5, 1.0, [16, 12], seed=args.seed).sample(0)
    sampled = [(subnet.width, subnet.resolution) for subnet in subnets]
    reference = make_network()
    _, whole = gradients_by_hand(reference, images, labels, sampled)
    _, plain = gradients_by_hand(make_network(), images, labels, [])
    weighted = make_network()
    loss = nn.functional.cross_entropy(weighted(images), labels, weight=WEIGHTS)
    loss.backward()
    for name, parameter in network.named_parameters():
        expected = whole[name] - plain[name] + weighted.get_parameter(name).grad
        torch.testing.assert_close((start[name] - parameter) / 0.1, expected, rtol=0, atol=1e-10)
    assert trainer.state.log_history[0]["loss_full"] == pytest.approx(loss.item(), abs=1e-10)
    with torch.no_grad():
        logits = network.eval()(torch.stack([row["pixel_values"] for row in data]))
    expected = nn.functional.cross_entropy(logits, torch.arange(6) % 5, weight=WEIGHTS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_another_loss_holds_without_sub_networks_too(tmp_path, name):
    class Nothing(GradAugTrainer):
        def full_loss(self, model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
            output = model(inputs["pixel_values"])
            logits = getattr(output, "logits", output)
            return logits.sum() * 0, output

    network = NETWORKS[name]()
    start = dict(weights(network))
    args = config(tmp_path, num_subnets=0, max_steps=2, weight_decay=0.0, logging_steps=1)
    trainer = Nothing(network, args, train_dataset=rows(8), eval_dataset=rows(4))
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == [0, 0]
    assert all(torch.equal(parameter, start[key]) for key, parameter in network.named_parameters())
    assert trainer.evaluate()["eval_loss"] == 0


def test_a_loss_without_the_prediction_is_refused(tmp_path):
    class Bare(GradAugTrainer):
        def full_loss(self, model: nn.Module, inputs: dict) -> Tensor:
            return model(inputs["pixel_values"]).sum()

    with refused("Bare.full_loss returned a Tensor; expected a tuple of the loss and the output"):
        Bare(plain_timm(), config(tmp_path, max_steps=1), train_dataset=rows(4)).train()


def test_a_compute_loss_that_leaves_out_the_sub_networks_is_warned_of_once(tmp_path):
    class Own(GradAugTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["pixel_values"])
            loss = nn.functional.cross_entropy(logits, inputs["labels"])
            return (loss, {"logits": logits}) if return_outputs else loss

    class Calls(GradAugTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.warns(UserWarning, match=r"Own.compute_loss does not call that of GradAugTrainer.*full_loss") as found:
        Own(plain_timm(), config(tmp_path, max_steps=2), train_dataset=rows(8)).train()
    assert sum("compute_loss" in str(warning.message) for warning in found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Own(plain_timm(), config(tmp_path, max_steps=1, num_subnets=0), train_dataset=rows(4)).train()
        Calls(plain_timm(), config(tmp_path, max_steps=1), train_dataset=rows(4)).train()


def test_random_depth_of_a_network_without_residual_blocks_is_refused(tmp_path):
    with refused("ResNetForImageClassification has no residual block with a drop_path"):
        GradAugTrainer(resnet(), config(tmp_path, subnet_mode="depth"), train_dataset=rows(4))


def test_random_depth_alone_slices_nothing(tmp_path):
    network = plain_timm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradAugTrainer(network, config(tmp_path, subnet_mode="depth"), train_dataset=rows(4))
    with refused("ResNet is not slimmable"):
        slicing_report(network)


def test_mixing_needs_the_number_of_classes(tmp_path):
    with refused("mixup_alpha or cutmix_alpha is on, but OwnScale has neither num_classes nor config.num_labels"):
        GradAugTrainer(OwnScale(), config(tmp_path, mixup_alpha=0.2), train_dataset=rows(4))


def test_a_static_graph_and_dataparallel_are_refused(tmp_path):
    args = config(tmp_path)
    args.ddp_static_graph = True
    with refused("ddp_static_graph is True"):
        GradAugTrainer(resnet(), args, train_dataset=rows(4))
    args = config(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with refused("accelerate launch --num_processes 2"):
        GradAugTrainer(resnet(), args, train_dataset=rows(4))


def test_plain_training_arguments_train_with_the_defaults(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, **CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = GradAugTrainer(resnet(), args, train_dataset=rows(8))
    trainer.train()
    assert trainer.args.num_subnets == 3
    assert 0.9 <= trainer.state.log_history[0]["subnet_width"] <= 1.0


def test_tensorboard_shows_the_parts_of_the_loss_the_sub_networks_and_the_widths(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"logging_steps": 1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_widths": [0.5]}
    arguments = config(tmp_path, report_to="tensorboard", resolutions=[32, 24], **settings)
    trainer = GradAugTrainer(plain_timm(), arguments, train_dataset=rows(8), eval_dataset=rows(4))
    trainer.train()
    (run,) = (tmp_path / "runs").iterdir()
    shown = EventAccumulator(str(run)).Reload()
    parts = ("loss", "loss_full", "loss_subnets", "subnet_width", "subnet_resolution")
    for name, tag in [*((part, f"train/{part}") for part in parts), ("eval_width0.5_loss", "eval/width0.5_loss")]:
        logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert {event.step: event.value for event in shown.Scalars(tag)} == pytest.approx(logged)
        assert logged

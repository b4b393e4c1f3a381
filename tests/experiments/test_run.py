import math
import signal

import PIL.Image
import pytest
import torch
from datasets import DatasetDict
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from gradaug_hf import GradAugConfig
from gradaug_hf.experiments.arguments import ExperimentArguments, TrainingDataArguments, parse
from gradaug_hf.experiments.recipe_trainer import RecipeTrainer
from gradaug_hf.experiments.recipes import CIFAR_WIDERESNET, RECIPES, start_as_in_the_paper
from gradaug_hf.experiments.run import SETTINGS, check_batch, complete, make_trainer, run, wanted_images
from gradaug_hf.hub.networks import create_network
from tests.data.test_bad_images import with_bad_images
from tests.helpers.checkpoints import save_images
from tests.helpers.small_training import Sends, images, seeded_images


def trainer_of(tmp_path, lr_drops: list[float] = (), **settings) -> RecipeTrainer:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    config = GradAugConfig(str(tmp_path), num_subnets=0, do_train=True, use_cpu=True, report_to="none", **settings)
    return RecipeTrainer(network, config, lr_drops=lr_drops)


def test_sgd_is_nesterovs_and_decays_all_parameters(tmp_path):
    trainer = trainer_of(tmp_path, optim="sgd", learning_rate=0.2, weight_decay=1e-4)
    trainer.create_optimizer()
    (group,) = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is torch.optim.SGD
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.model.parameters()}
    assert len(group["params"]) == 6
    expected = {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "dampening": 0}
    assert {name: group[name] for name in expected} == expected


def test_settings_that_a_checkpoint_keeps_name_no_folder_of_the_machine(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.experiment = {"dataset_name": "/data/private/cats", "batch_size": 8}
    settings = trainer.settings()
    assert (settings["dataset_name"], settings["batch_size"]) == ("cats", 8)
    assert not any("/" in str(value) for value in settings.values())


def test_another_optimiser_is_transformers_own(tmp_path):
    trainer = trainer_of(tmp_path, optim="adamw_torch")
    trainer.create_optimizer()
    assert type(trainer.optimizer) is torch.optim.AdamW


def rates(trainer: RecipeTrainer, steps: int) -> list[float]:
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_rate_drops_to_a_tenth_at_half_and_three_quarters(tmp_path):
    # 300 epochs of 2 steps: x0.1 at epochs 150 and 225
    found = rates(trainer_of(tmp_path, lr_drops=[150 / 300, 225 / 300], optim="sgd", learning_rate=0.25), 600)
    assert found == pytest.approx([0.25] * 300 + [0.025] * 150 + [0.0025] * 150)


def test_rate_follows_a_cosine_from_step_to_step(tmp_path):
    found = rates(trainer_of(tmp_path, optim="sgd", learning_rate=0.2, lr_scheduler_type="cosine"), 40)
    assert found == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 40)) for step in range(40)])


@pytest.mark.parametrize("lr_drops", [[], [0.5]])
def test_rate_rises_linearly_in_the_warm_up(tmp_path, lr_drops):
    trainer = trainer_of(
        tmp_path, lr_drops, optim="sgd", learning_rate=0.4, lr_scheduler_type="cosine", num_train_epochs=200
    )
    complete(ExperimentArguments(batch_size=8, warmup_epochs=5), trainer.args)
    found = rates(trainer, 1000)  # 5 steps an epoch
    assert found[:26] == pytest.approx([0.4 * step / 25 for step in range(26)])


@pytest.mark.parametrize(("processes", "accumulation", "expected"), [(1, 1, 512), (8, 1, 64), (8, 4, 16)])
def test_batch_of_each_process_keeps_that_of_the_step(tmp_path, monkeypatch, processes, accumulation, expected):
    config = GradAugConfig(str(tmp_path), gradient_accumulation_steps=accumulation, do_train=True, use_cpu=True)
    monkeypatch.setattr(GradAugConfig, "world_size", processes)
    complete(ExperimentArguments(batch_size=512), config)
    assert config.per_device_train_batch_size == expected


def test_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    config = GradAugConfig(str(tmp_path), gradient_accumulation_steps=2, do_train=True, use_cpu=True)
    monkeypatch.setattr(GradAugConfig, "world_size", 4)
    with pytest.raises(ValueError, match="batch_size is 508, which 4 processes .*_steps 2 cannot.*multiple of 8"):
        complete(ExperimentArguments(batch_size=508), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs is 0; it must be above 0"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1, or -1"),
        ({"max_steps": -3}, "max_steps is -3; it must be at least 1, or -1"),
    ],
)
def test_a_training_of_no_step_is_refused(tmp_path, settings, message):
    config = GradAugConfig(str(tmp_path), do_train=True, use_cpu=True, **settings)
    with pytest.raises(ValueError, match=message):
        complete(ExperimentArguments(batch_size=8), config)


def test_a_run_that_is_only_evaluated_needs_no_epochs(tmp_path):
    complete(
        ExperimentArguments(batch_size=8), GradAugConfig(str(tmp_path), do_eval=True, num_train_epochs=0, use_cpu=True)
    )


def test_results_in_the_folder_are_refused_unless_they_are_to_be_written_over(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    config = GradAugConfig(str(tmp_path), do_train=True, use_cpu=True)
    with pytest.raises(ValueError, match="holds results.json of another run"):
        complete(ExperimentArguments(batch_size=8), config)
    complete(ExperimentArguments(batch_size=8, overwrite_output_dir=True), config)


def test_a_batch_that_is_larger_than_the_training_set_is_refused():
    check_batch(244, 244)
    check_batch(512, None)  # a stream that does not say how many images it has
    with pytest.raises(ValueError, match="batch_size is 512, but there are 244 images to train on"):
        check_batch(512, 244)


def test_a_recipe_that_is_interrupted_says_how_its_command_goes_on(tmp_path, capfd):
    trainer = trainer_of(tmp_path, max_steps=2, disable_tqdm=True)
    trainer.train_dataset = seeded_images(0, False)
    trainer.add_callback(Sends(signal.SIGINT, 1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    said = capfd.readouterr().err.rstrip()
    assert said.endswith("To go on: the same command with --resume_from_checkpoint last")


def test_processes_leave_their_group_once_all_is_pushed(tmp_path, monkeypatch):
    done = []
    for name in ("make_trainer", "train", "push", "leave_group"):
        monkeypatch.setattr(f"gradaug_hf.experiments.run.{name}", lambda *_, name=name: done.append(name))
    run(CIFAR_WIDERESNET, ["--use_cpu", "--output_dir", str(tmp_path / "out")])
    assert done == ["make_trainer", "train", "push", "leave_group"]


@pytest.mark.parametrize(("recipe", "side"), [("imagenet_resnet50", 224), ("cifar_wideresnet", 32)])
def test_a_recipe_knows_the_side_of_its_images(recipe, side):
    assert RECIPES[recipe].image_side() == side


def test_resnet50_starts_as_in_the_paper():
    torch.manual_seed(0)
    network = create_network("resnet50", [str(i) for i in range(1000)], {"zero_init_last": False})
    start_as_in_the_paper(network)
    assert sum(p.numel() for p in network.parameters()) == 25_557_032
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (network.fc.bias == 0).all()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_evaluation_sees_the_pixels_that_the_folder_s_processor_prepares(tmp_path, library):
    photos = save_images(tmp_path / "photos", of_each_class=2, side=50)
    model = "test_resnet"
    if library == "transformers":
        model = str(tmp_path / "network")
        ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1], num_labels=3)).save_pretrained(model)
    flags = f"--model {model} --dataset_name {photos} --eval_split test --output_dir {tmp_path / 'out'}"
    flags += " --use_cpu --batch_size 2"
    args, config = parse({**SETTINGS, **CIFAR_WIDERESNET.settings}, CIFAR_WIDERESNET.methods, None, flags.split())
    complete(args, config)
    trainer = make_trainer(CIFAR_WIDERESNET, args, config)
    with PIL.Image.open(tmp_path / "photos/test/class0/0.png") as photo:
        expected = trainer.processing_class(photo, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(trainer.eval_dataset[0]["pixel_values"], expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("skip", [False, True])
def test_as_many_images_as_wanted_are_sampled_by_the_seed_and_bad_ones_are_not_evaluated_on(skip: bool):
    args = TrainingDataArguments(max_train_samples=5, max_eval_samples=4, skip_bad_images=skip)
    splits = DatasetDict(train=images(12, 1), eval=with_bad_images(list(range(0, 12, 2))))
    found, again, other = (wanted_images(DatasetDict(splits), args, seed) for seed in (0, 0, 1))
    assert len(found["train"]) == 5
    assert found["train"]["row"] == again["train"]["row"] != other["train"]["row"]
    evaluated = wanted_images(DatasetDict(splits), TrainingDataArguments(max_eval_samples=4), 0)["eval"]["row"]
    assert len(evaluated) == 4
    assert found["eval"]["row"] == [row for row in evaluated if row % 2 or not skip]

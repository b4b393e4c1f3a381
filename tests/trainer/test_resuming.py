import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_utils import get_last_checkpoint

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.trainer.checkpoints import ResumeError
from tests.helpers.small_training import (
    END,
    Jittered,
    KillAtStep,
    checkpoints,
    digest,
    end_of,
    make_trainer,
    network,
    seeded_images,
    start,
    status_of,
    train,
)

CASES = [(0, 1), (0, 2), (2, 1), (2, 2)]


def settings_of(workers: int, accumulation: int) -> dict[str, int]:
    return {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation}


def end(folder: Path) -> dict:
    return json.loads((folder / END).read_text())


@pytest.mark.parametrize(("workers", "accumulation"), CASES)
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path, workers, accumulation):
    settings = settings_of(workers, accumulation)
    assert status_of(start(lambda: train(tmp_path / "whole", **settings))) == 0
    folder = tmp_path / "killed"
    assert status_of(start(lambda: train(folder, [KillAtStep(5)], **settings))) == -signal.SIGKILL
    assert checkpoints(folder) == [2, 4]
    assert status_of(start(lambda: train(folder, **settings))) == 0
    assert end(folder) == end(tmp_path / "whole")
    log = end(folder)["log"]
    assert [entry["step"] for entry in log if "loss_subnets" in entry] == [3, 6, 9]
    assert "train_loss" in log[-1]


def kill_amid_a_checkpoint(step: int) -> None:
    def save_scaler(trainer: Trainer, output_dir: str) -> None:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save_scaler = save_scaler  # weights and optimiser are written, random numbers and state are not


def test_a_half_written_checkpoint_is_never_taken_for_a_whole_one(tmp_path):
    def train_and_be_killed() -> None:
        kill_amid_a_checkpoint(4)
        train(tmp_path)

    assert status_of(start(train_and_be_killed)) == -signal.SIGKILL
    assert list(tmp_path.glob("_tmp-*/checkpoint-4/optimizer.pt"))
    assert checkpoints(tmp_path) == [2]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert status_of(start(lambda: train(tmp_path))) == 0
    assert status_of(start(lambda: train(tmp_path / "whole"))) == 0
    assert end(tmp_path) == end(tmp_path / "whole")
    assert not list(tmp_path.glob("_tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "accumulation"), CASES)
def test_a_training_that_is_killed_ten_times_ends_as_if_it_had_not_been(tmp_path, workers, accumulation):
    settings = settings_of(workers, accumulation) | {"save_steps": 1, "max_steps": 40}
    begin = time.monotonic()
    assert status_of(start(lambda: train(tmp_path / "whole", **settings))) == 0
    duration = time.monotonic() - begin
    generator = random.Random(f"{workers} {accumulation}")
    folder, kills = tmp_path / "killed", 0
    while not (folder / END).exists():
        pid = start(lambda: train(folder, **settings))
        if kills < 10:
            time.sleep(generator.uniform(0, duration / 4))
            os.kill(pid, signal.SIGKILL)
            kills += 1
        status_of(pid)
    assert kills == 10
    assert end(folder) == end(tmp_path / "whole")


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_training_resumed_after_an_epoch_has_its_evaluation(tmp_path, strategy):
    settings = {"save_strategy": strategy, "save_steps": 5, "logging_strategy": strategy, "max_steps": 10}  # 5 a epoch
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert end_of(resumed) == end_of(whole)
    assert [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry] == [5, 10]


@pytest.mark.parametrize(
    ("saving", "workers", "steps"),
    [("steps", 0, (3, 5, 7, 10)), ("steps", 2, (7,)), ("epoch", 0, (5, 10))],
    ids=["amid and at the end of epochs", "workers", "after epochs"],
)
def test_a_stream_is_resumed_where_it_was(tmp_path, saving, workers, steps):
    settings = {"stream": True, "max_steps": 12, "save_strategy": saving, "save_steps": 1}  # 5 an epoch
    settings["dataloader_num_workers"] = workers
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    for step in steps:
        resumed = make_trainer(tmp_path / "resumed", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert end_of(resumed) == end_of(whole), step


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_of_any_dataset_is_resumed_where_it_was(tmp_path, workers):
    def jittered(folder: Path) -> GradAugTrainer:
        return make_trainer(folder, train_dataset=Jittered(), max_steps=7, dataloader_num_workers=workers)

    whole = jittered(tmp_path)
    whole.train()
    for step in (4, 6):  # amid the first epoch and amid the second
        resumed = jittered(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert end_of(resumed) == end_of(whole), step


class WithLoss(nn.Module):
    """Returns its loss, as the models of transformers do."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("seeded", [True, False])
def test_without_subnets_and_seeding_random_augmentation_is_that_of_the_plain_trainer(tmp_path, seeded):
    def weights(cls: type[Trainer], args: TrainingArguments) -> str:
        model = network()
        if cls is Trainer:
            model = WithLoss(model)
        trainer = cls(model, args, train_dataset=Jittered())
        trainer.train()
        return digest([*model.state_dict().values()])

    settings = {"max_steps": 3, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    plain = weights(Trainer, TrainingArguments(str(tmp_path), **settings))
    ours = weights(GradAugTrainer, GradAugConfig(str(tmp_path), num_subnets=0, seed_train_data=seeded, **settings))
    assert (ours == plain) == (not seeded)


def test_datasets_that_are_seeded_already_and_streams_are_left_as_they_are(tmp_path):
    for stream in (False, True):
        trainer = make_trainer(tmp_path, stream=stream)
        assert trainer.get_train_dataloader().dataset is trainer.train_dataset
    trainer = make_trainer(tmp_path, train_dataset=(data := Jittered()))
    assert trainer.get_train_dataloader().dataset.dataset is trainer.train_dataset is data


def test_a_resumed_training_counts_the_time_and_the_loss_of_all_its_steps(tmp_path):
    whole = make_trainer(tmp_path)
    output = whole.train()
    resumed = make_trainer(tmp_path)
    state = json.loads((tmp_path / "checkpoint-8" / "gradaug_state.json").read_text())
    assert 0 < state["progress"]["seconds"] < whole.training_seconds()
    found = resumed.train(resume_from_checkpoint=True)
    assert found.training_loss == output.training_loss
    losses = [entry["loss"] * 3 for entry in whole.state.log_history if "loss" in entry]
    assert output.training_loss == pytest.approx(sum(losses) / 9, abs=1e-6)
    assert resumed.training_seconds() > state["progress"]["seconds"]


def test_the_best_checkpoint_is_known_by_its_place(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, **settings, max_steps=6)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert best.is_dir()
    saved = json.loads((best / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for learning_rate in (0.1, 0.2):
        trainer = make_trainer(tmp_path, max_steps=2, learning_rate=learning_rate)
        trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "gradaug_state.json").read_text())
    assert state["settings"]["learning_rate"] == 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


@pytest.mark.parametrize("kind", ["timm wrapper", "resnet", "vit"])
def test_networks_of_transformers_are_resumed(tmp_path, kind):
    if kind == "timm wrapper":
        network = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3))
    elif kind == "vit":  # whose weights are saved under other names than its own
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        network = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3))
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
        network = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))
    start_weights = copy.deepcopy(network.state_dict())
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(12)]
    settings = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 4}
    sides = [32] if kind == "vit" else [32, 24]
    args = GradAugConfig(
        str(tmp_path), **settings, resolutions=sides, use_cpu=True, report_to="none", disable_tqdm=True
    )
    GradAugTrainer(network, args, train_dataset=rows).train()
    resumed = copy.deepcopy(network)
    resumed.load_state_dict(start_weights)
    GradAugTrainer(resumed, args, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def change(checkpoint: Path, edit: Callable[[dict], None]) -> None:
    """Edit the settings and the progress that a checkpoint holds."""
    file = checkpoint / "gradaug_state.json"
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))


def test_the_loss_of_all_steps_is_known_after_a_change_of_the_number_of_processes(tmp_path):
    settings = {"max_steps": 5, "logging_steps": 3, "eval_strategy": "no"}
    whole = make_trainer(tmp_path, **settings)
    whole.train()

    def split_in_two(state: dict) -> None:
        (alone,) = state["progress"]["processes"]
        assert alone["loss"] > 0
        assert alone["total_loss"] > 0
        two = [copy.deepcopy(alone), copy.deepcopy(alone)]
        for process, share in zip(two, (0.25, 1.75), strict=True):  # their mean is what one process had
            process["loss"] *= share
            process["means"]["loss_subnets"][0] *= share
        state["progress"]["processes"] = two

    change(tmp_path / "checkpoint-4", split_in_two)
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    last, expected = (trainer.state.log_history[-1]["train_loss"] for trainer in (resumed, whole))
    assert last == pytest.approx(expected, abs=1e-6)


def test_without_the_sums_of_a_checkpoint_the_loss_is_that_of_the_steps_since(tmp_path):
    settings = {"max_steps": 6, "logging_steps": 1, "eval_strategy": "no"}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    (tmp_path / "checkpoint-4" / "gradaug_state.json").unlink()  # as in a checkpoint of the plain Trainer
    resumed = make_trainer(tmp_path / "resumed", **settings)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert output.training_loss == pytest.approx(sum(losses[4:]) / 2, abs=1e-6)


@pytest.mark.parametrize("settings", [{"lr_scheduler_type": "constant"}, {"ignore_config_change": True}])
def test_a_training_goes_on_for_more_steps_where_the_schedule_allows_it_or_is_given_up(tmp_path, settings):
    settings = {"eval_strategy": "no", **settings}  # an evaluation at the end of the first takes a random number
    make_trainer(tmp_path, max_steps=4, **settings).train()
    longer = make_trainer(tmp_path, max_steps=6, **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6
    if "lr_scheduler_type" in settings:
        whole = make_trainer(tmp_path / "whole", max_steps=6, **settings)
        whole.train()
        assert end_of(longer)["weights"] == end_of(whole)["weights"]


# ---- what is refused ----


def test_more_steps_with_another_learning_rate_are_refused_with_the_way_to_have_them(tmp_path, trained):
    message = (
        r"max_steps was 2 and is 4\. In a longer training the learning rate falls later, from here on\. "
        r"Set them as they were, or set ignore_config_change"
    )
    with pytest.raises(ResumeError, match=message):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(trained))
    rising = {"lr_scheduler_type": "constant", "kl_warmup": 0.5}
    make_trainer(tmp_path / "rising", max_steps=2, save_steps=2, **rising).train()
    with pytest.raises(ResumeError, match=r"max_steps was 2 and is 4\. .* the weight of the sub-networks rises later"):
        make_trainer(tmp_path / "rising", max_steps=4, **rising).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match=r"max_steps was 2 and is 1\. Set them"):
        make_trainer(tmp_path, max_steps=1, lr_scheduler_type="constant").train(resume_from_checkpoint=str(trained))


@pytest.mark.parametrize("other", ["fewer images", "other labels"])
def test_another_training_set_is_refused(tmp_path, trained, other):
    images = seeded_images(42, stream=False)
    images = Subset(images, range(8)) if other == "fewer images" else [{**image, "labels": 0} for image in images]
    message = r"train_dataset was '20 examples with labels \w{8}' and is '(8|20) examples with labels \w{8}'"
    with pytest.raises(ResumeError, match=message):
        make_trainer(tmp_path, train_dataset=images, max_steps=2).train(resume_from_checkpoint=str(trained))


def test_classes_of_other_names_are_refused_with_the_first(tmp_path):
    images = Jittered()
    images.classes = ["cat", "cow", "dog"]
    settings = {"train_dataset": images, "max_steps": 1, "save_steps": 1, "eval_strategy": "no"}
    make_trainer(tmp_path, **settings).train()
    for classes, message in (
        (["cat", "dog", "cow"], "class 1 was 'cow' and is 'dog'"),
        (["cat", "cow"], "class 2 was 'dog' and is None"),
    ):
        images.classes = classes
        with pytest.raises(ResumeError, match=f"other settings: {message}. Set"):
            make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, max_steps=2).train()
    return folder / "checkpoint-2"


def test_changed_settings_are_refused_with_the_list_of_differences(tmp_path, trained):
    changed = {"max_steps": 2, "min_width": 0.6, "resolutions": [16], "seed": 1}
    message = (
        r"checkpoint-2 was trained with other settings: min_width was 0.5 and is 0.6; "
        r"resolutions was \[16, 12\] and is \[16\]; seed was 42 and is 1. .* ignore_config_change"
    )
    with pytest.raises(ResumeError, match=message):
        make_trainer(tmp_path, **changed).train(resume_from_checkpoint=str(trained))
    trainer = make_trainer(tmp_path, **changed, ignore_config_change=True)
    trainer.train(resume_from_checkpoint=str(trained))
    assert trainer.state.global_step == 2


def test_settings_that_change_no_weight_may_change(tmp_path, trained):
    trainer = make_trainer(
        tmp_path, max_steps=2, eval_strategy="no", save_steps=1, logging_steps=1, dataloader_num_workers=2
    )
    trainer.train(resume_from_checkpoint=str(trained))
    assert trainer.state.global_step == 2


@pytest.fixture
def damaged(tmp_path, trained) -> Path:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_file_that_is_cut_off_is_named(tmp_path, damaged, name):
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    trainer = make_trainer(tmp_path, max_steps=2)
    with pytest.raises(ResumeError, match=rf"checkpoint-2/{name} (is damaged or cut off|cannot be read)"):
        trainer.train(resume_from_checkpoint=True)


def test_what_is_no_checkpoint_is_refused(tmp_path, damaged):
    (damaged / "optimizer.pt").unlink()
    trainer = make_trainer(tmp_path, max_steps=2)
    with pytest.raises(ResumeError, match="checkpoint-2 has no optimizer.pt"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match="resume_from_checkpoint is '.*nowhere', which is no folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(ResumeError, match="resume_from_checkpoint is True, but .* holds no checkpoint"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_network_is_refused_with_the_first_mismatches(tmp_path, trained):
    trainer = make_trainer(tmp_path, max_steps=2)
    with torch.no_grad():
        trainer.model[3] = torch.nn.Conv2d(4, 6, 5)
        trainer.model.add_module("extra", torch.nn.Linear(3, 3))
    message = (
        r"checkpoint-2 is of another network than Sequential: extra.weight is missing; extra.bias is missing; "
        r"3.weight is \(6, 4, 3, 3\) and not \(6, 4, 5, 5\)"
    )
    with pytest.raises(ResumeError, match=message):
        trainer.train(resume_from_checkpoint=str(trained))

import copy
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TrainerCallback,
    TrainingArguments,
)
from transformers import TimmWrapperForImageClassification as TimmWrapper

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.hub.pushing import PushError, make_branch
from gradaug_hf.trainer.checkpoints import written_whole
from tests.helpers.hub_server import HubServer

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
TOKEN = "hf_mine"
# Loads a repository by timm and by transformers, in a process that cannot import gradaug_hf.
LOAD = """
import sys
sys.modules["gradaug_hf"] = None
import timm, torch
from transformers import AutoModelForImageClassification, pipeline
images = torch.load(sys.argv[1] + "/images.pt")
with torch.no_grad():
    for repo in sys.argv[2:]:
        name, _, revision = repo.partition("@")
        model = AutoModelForImageClassification.from_pretrained(name, revision=revision or "main")
        found = [model.eval()(images).logits]
        if name.endswith("timm"):
            found.append(timm.create_model(f"hf-hub:{repo}", pretrained=True).eval()(images))
        if name.endswith("/by_timm"):
            found.append(pipeline("image-classification", model=name, device="cpu")(sys.argv[1] + "/image.png")[0])
        torch.save(found, f"{sys.argv[1]}/{name.split('/')[1]}.pt")
"""


def wrapped() -> TimmWrapper:
    model = TimmWrapper(TimmWrapperConfig(architecture="test_resnet", id2label=dict(enumerate(NAMES))))
    with torch.no_grad():
        model.timm_model.fc.weight *= 1e4  # else the classes of an image are so near each other that rounding decides
    return model


def of_transformers() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(depths=[1, 1], hidden_sizes=[8, 8], embedding_size=8, num_labels=7)
    )


def trainer_of(model: nn.Module | str, folder: Path, **settings) -> GradAugTrainer:
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for label in range(7)]
    settings = {"max_steps": 2, "save_steps": 1, "num_subnets": 1, "resolutions": [32, 24], **settings}
    config = GradAugConfig(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **settings)
    return GradAugTrainer(model, config, train_dataset=rows)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model.eval()(images)
    return getattr(output, "logits", output)


def environment_of(hub: HubServer, folder: Path) -> dict[str, str]:
    """Environment in which another process uses a Hub, with a cache of its own."""
    hub_settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return {**os.environ, **hub_settings, "HF_HOME": str(folder / "home")}


def contents(folder: Path) -> dict[str, bytes]:
    """What is pushed of a folder."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(("checkpoint-", "_"))}


# ---- push and pull ----


def test_what_is_pushed_gives_the_same_logits_here_in_timm_and_in_transformers(hub, tmp_path):
    hub.part_size = 500_000  # the weights of timm's network go up in parts, the others in one
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    expected = {}
    plain = timm.create_model("test_resnet", num_classes=7)
    for name, model in (("by_timm", wrapped()), ("plain_by_timm", plain), ("by_transformers", of_transformers())):
        trainer_of(model, tmp_path / name).push_to_hub()
        expected[name] = logits_of(model, images)
        pulled = trainer_of(f"me/{name}", tmp_path / "other").model
        assert torch.equal(logits_of(pulled, images), expected[name])
        if name == "by_timm":
            transform = create_transform(**resolve_model_data_config(pulled))
            scores = logits_of(pulled, transform(Image.open(tmp_path / "image.png"))[None])[0].softmax(0)
    assert {request[-2:] for request in hub.requests if re.search("PUT /lfs/.*/", request)} == {"/1", "/2", "/3", "/4"}
    command = [sys.executable, "-c", LOAD, str(tmp_path), *(f"me/{name}" for name in expected)]
    subprocess.run(command, check=True, env=environment_of(hub, tmp_path), timeout=600)
    for name, logits in expected.items():
        found = torch.load(tmp_path / f"{name}.pt")
        if name == "by_timm":
            best = found.pop()
            assert NAMES.index(best["label"]) == scores.argmax()
            assert best["score"] == pytest.approx(scores.max().item(), abs=1e-6)
        assert len(found) == (2 if name.endswith("timm") else 1)
        assert [torch.equal(tensor, logits) for tensor in found] == [True] * len(found), name


def test_a_pulled_network_trains_on_and_keeps_its_image_processor(hub, tmp_path):
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / "first")
    first = trainer_of(of_transformers(), tmp_path / "first")
    first.push_to_hub()
    second = trainer_of("me/first", tmp_path / "second", max_steps=1, push_to_hub=True, hub_strategy="end")
    assert second.processing_class.size["shortest_edge"] == 32
    assert second.model.config.name_or_path == "me/first"
    second.train()
    second.push_to_hub()
    processor = AutoImageProcessor.from_pretrained("me/second")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained("me/first").to_dict()
    third = trainer_of("me/second", tmp_path / "third").model
    assert all(torch.equal(t, third.state_dict()[name]) for name, t in second.model.state_dict().items())


def test_a_private_repository_is_seen_by_its_owner_alone(hub, tmp_path, monkeypatch):
    trainer_of(wrapped(), tmp_path, hub_model_id="me/secret", hub_private_repo=True).push_to_hub()
    trainer_of(wrapped(), tmp_path / "also", hub_model_id="me/also").push_to_hub(private=True)
    assert hub.repositories["me/secret"].private and hub.repositories["me/also"].private
    assert trainer_of("me/secret", tmp_path / "other").model.num_classes == 7
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for token, message in (("hf_other", "on the Hub"), ("hf_wrong", "the Hub answers 401"), ("", "on the Hub")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match=f"'me/secret'.*{message}.* run `hf auth login`"):
            trainer_of("me/secret", tmp_path / "other")


def test_a_revision_is_a_branch_that_is_made_and_pulled_by_its_name(hub, tmp_path):
    trainer = trainer_of(wrapped(), tmp_path / "out", hub_model_id="me/net", hub_revision="trial")
    trainer.push_to_hub()
    repository = hub.repositories["me/net"]
    assert set(repository.files("main")) == {".gitattributes"}
    trial = repository.files("trial")["model.safetensors"]
    trainer.model.timm_model.fc.bias.data += 1
    trainer.push_to_hub(revision="later")
    assert repository.files("trial")["model.safetensors"] == trial
    images = torch.randn(2, 3, 32, 32)
    later, earlier = (trainer_of(f"me/net@{name}", tmp_path / "other").model for name in ("later", "trial"))
    assert torch.equal(logits_of(later, images), logits_of(trainer.model, images))
    assert not torch.equal(logits_of(earlier, images), logits_of(trainer.model, images))
    head = repository.branches["later"][-1].oid
    by_commit = trainer_of(f"me/net@{head}", tmp_path / "other").model
    assert torch.equal(logits_of(by_commit, images), logits_of(later, images))
    with pytest.raises(ValueError, match="'me/net@never', but me/net has no revision 'never'"):
        trainer_of("me/net@never", tmp_path / "other")


def test_a_branch_is_made_by_the_first_of_several_processes(hub, tmp_path, monkeypatch):
    trainer = trainer_of(wrapped(), tmp_path / "out", hub_model_id="me/net")
    trainer.init_hf_repo()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_world_process_zero", lambda: False)
        make_branch(trainer, "trial")
    assert "trial" not in hub.repositories["me/net"].branches
    make_branch(trainer, "trial")
    assert "trial" in hub.repositories["me/net"].branches


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_checkpoints_are_pushed_as_the_strategy_says(hub, tmp_path, strategy: str):
    trainer = trainer_of(wrapped(), tmp_path / "net", push_to_hub=True, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    repository = hub.repositories["me/net"]
    steps = ["Training in progress, step 1", "Training in progress, step 2"]
    assert repository.titles()[1:] == (steps if strategy == "every_save" else [])
    images = torch.randn(2, 3, 32, 32)
    if strategy == "every_save":
        assert "preprocessor_config.json" in repository.files()
        assert torch.equal(
            logits_of(trainer_of("me/net", tmp_path / "other").model, images), logits_of(trainer.model, images)
        )
    with written_whole(tmp_path / "net") as begun:  # as while the next checkpoint is written
        begun.mkdir()
        (begun / "model.safetensors").write_bytes(b"half")
        trainer.push_to_hub()
    assert repository.titles()[-1] == "End of training"
    assert not any(begun.name in file for file in repository.files())
    assert torch.equal(
        logits_of(trainer_of("me/net", tmp_path / "last").model, images), logits_of(trainer.model, images)
    )


# ---- failures ----


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "preupload", 401, "the Hub answers 401; it does not know who asks; run `hf auth login`"),
        ("POST", "commit", 403, "the Hub answers 403; the token may not write there; run `hf auth login`"),
        ("POST", "commit", 404, "the Hub answers 404; there is no such repository, or the token does not see it"),
        ("POST", "commit", 409, "the Hub answers 409; something else was writing to it at that moment; try again"),
        ("POST", "commit", 500, "the Hub answers 500; try again later"),
        ("POST", "lfs/objects/batch", 500, "the Hub answers 500; try again later"),
        ("PUT", "lfs", None, "the connection to the Hub broke"),
    ],
)
def test_a_push_that_fails_leaves_a_whole_folder_and_a_second_one_completes(
    hub, tmp_path, method: str, path: str, status: int | None, message: str
):
    trainer = trainer_of(wrapped(), tmp_path / "net")
    hub.fail(method, path, status)
    with pytest.raises(PushError) as error:
        trainer.push_to_hub()
    command = f"hf upload me/net {tmp_path / 'net'} . --exclude 'checkpoint-*' --exclude '_*'"
    assert str(error.value).startswith(f"me/net was not pushed to: {message}")
    assert str(error.value).endswith(f". All of it is in {tmp_path / 'net'}; push that with: {command}")
    local = contents(tmp_path / "net")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits_of(by_timm, images), logits_of(trainer.model, images))
    repository = hub.repositories["me/net"]
    assert repository.titles() == ["initial commit"]

    hub.failures.clear()
    trainer.push_to_hub()
    pushed = repository.files()
    assert {name: pushed[name] for name in local if name != "README.md"} == {
        name: content for name, content in local.items() if name != "README.md"
    }


def test_the_command_of_the_message_completes_the_push(hub, tmp_path):
    trainer = trainer_of(wrapped(), tmp_path / "my net", hub_model_id="me/net", hub_revision="trial", max_steps=1)
    trainer.train()  # its checkpoint is not pushed
    hub.fail("PUT", "lfs", None)
    with pytest.raises(PushError) as error:
        trainer.push_to_hub()
    hub.failures.clear()
    command = shlex.split(str(error.value).partition("push that with: ")[2])
    program = Path(sys.executable).with_name(command[0])
    subprocess.run([program, *command[1:]], check=True, env=environment_of(hub, tmp_path), timeout=600)
    pushed = hub.repositories["me/net"].files("trial")
    local = contents(tmp_path / "my net")
    assert set(pushed) == {*local, ".gitattributes"}
    assert all(pushed[name] == content for name, content in local.items())


def test_a_connection_that_breaks_once_is_taken_up_again(hub, tmp_path):
    hub.fail("PUT", "lfs", None, times=1)
    trainer_of(wrapped(), tmp_path / "net").push_to_hub()
    assert "model.safetensors" in hub.repositories["me/net"].files()


@pytest.mark.parametrize(
    ("failure", "settings", "message"),
    [
        (None, {"hub_token": "hf_wrong"}, "net cannot be pushed to: the Hub answers 401; .*`hf auth login`"),
        (None, {"hub_model_id": "other/net"}, "other/net cannot be pushed to: the Hub answers 403.*set hub_model_id"),
        (None, {"hub_model_id": "a/b/c"}, "a/b/c cannot be pushed to: hub_model_id is no name of a repository"),
        (500, {}, "net cannot be pushed to: the Hub answers 500; try again later.$"),
    ],
)
def test_a_hub_that_refuses_is_heard_of_before_training(hub, tmp_path, failure, settings, message):
    if failure:
        hub.fail("POST", "repos/create", failure)
    with pytest.raises(PushError, match=f"^{message}"):
        trainer_of(wrapped(), tmp_path / "net", push_to_hub=True, **settings)


def test_a_repository_that_is_there_already_is_pushed_to(hub, tmp_path):
    for _ in range(2):  # the second time the Hub answers 409 to the request for a new repository
        trainer_of(wrapped(), tmp_path / "net").push_to_hub()
    assert hub.repositories["me/net"].titles()[1] == "End of training"


def test_without_a_network_a_push_says_so(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="^net cannot be pushed to: HF_HUB_OFFLINE=1 is set.$"):
        trainer_of(wrapped(), tmp_path / "net").push_to_hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.__exit__()
    with pytest.raises(PushError, match=r"^net cannot be pushed to: the connection to the Hub broke \(ConnectError"):
        trainer_of(wrapped(), tmp_path / "net").push_to_hub()


def test_an_upload_by_xet_that_fails_is_a_push_error_too(hub, tmp_path, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(PushError, match="^me/net was not pushed to: .*xet-write-token.*push that with: hf upload"):
        trainer_of(wrapped(), tmp_path / "net").push_to_hub()


def test_an_error_that_is_not_the_hubs_stays_what_it_is(hub, tmp_path, monkeypatch):
    trainer = trainer_of(wrapped(), tmp_path / "net")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer, "save_model", full)
    with pytest.raises(OSError, match="^no space left on device$") as error:
        trainer.push_to_hub()
    assert not isinstance(error.value, PushError)


def test_a_checkpoint_that_was_not_pushed_is_warned_of_and_training_goes_on(hub, tmp_path):
    trainer = trainer_of(wrapped(), tmp_path / "net", push_to_hub=True, hub_always_push=True, max_steps=3)
    hub.fail("PUT", "lfs", None)
    with pytest.warns(UserWarning, match="a checkpoint was not pushed to me/net: the connection to the Hub broke"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert hub.repositories["me/net"].titles() == ["initial commit"]
    assert (tmp_path / "net" / "checkpoint-3" / "model.safetensors").is_file()
    hub.failures.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.repositories["me/net"].files()


class Accident(TrainerCallback):
    """Ends training with an error after its first step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise RuntimeError("an accident")


def test_an_error_in_training_hides_no_push_that_fails(hub, tmp_path):
    trainer = trainer_of(wrapped(), tmp_path / "net", push_to_hub=True)
    trainer.add_callback(Accident())
    hub.fail("POST", "commit", 500)
    with (
        pytest.warns(UserWarning, match="a checkpoint was not pushed to me/net: the Hub answers 500"),
        pytest.raises(RuntimeError, match="an accident"),
    ):
        trainer.train()


# ---- tokens ----


@pytest.mark.parametrize("kind", [GradAugConfig, TrainingArguments])
def test_no_file_and_no_log_holds_the_token(hub, tmp_path, monkeypatch, caplog, capfd, kind: type):
    monkeypatch.delenv("HF_TOKEN")
    hub.tokens["hf_onlyHere"] = "me"
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for label in range(7)]
    settings = {"max_steps": 2, "save_steps": 1, "report_to": "tensorboard", "use_cpu": True, "log_level": "debug"}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "net" / "runs"))
    settings |= {"push_to_hub": True, "hub_token": "hf_onlyHere"}
    settings |= {"hub_strategy": "all_checkpoints", "hub_always_push": True}
    trainer = GradAugTrainer(wrapped(), kind(str(tmp_path / "net"), **settings), train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    print(trainer.args)
    hub.fail("POST", "preupload", 401)
    trainer.model.timm_model.fc.bias.data += 1
    with pytest.raises(PushError) as error:
        trainer.push_to_hub()
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {"training_args.bin", "README.md", "trainer_state.json"} <= {file.name for file in written}
    assert any("tfevents" in file.name for file in written)
    pushed = {
        name: content
        for commits in hub.repositories["me/net"].branches.values()
        for commit in commits
        for name, content in commit.files.items()
    }
    assert "checkpoint-2/training_args.bin" in pushed
    assert [name for name, content in (written | pushed).items() if b"onlyHere" in content] == []
    assert "onlyHere" not in caplog.text + "".join(capfd.readouterr()) + str(error.value) + repr(error.value)
    assert trainer.args.hub_token == "hf_onlyHere"


def test_a_copy_of_the_settings_keeps_the_token_and_a_pickle_does_not(tmp_path):
    args = GradAugConfig(str(tmp_path), hub_token="hf_onlyHere", eval_widths=[0.5])
    assert copy.copy(args).hub_token == copy.deepcopy(args).hub_token == "hf_onlyHere"
    assert copy.deepcopy(args).eval_widths is not args.eval_widths
    stored = pickle.loads(pickle.dumps(args))
    assert stored.hub_token is None
    assert json.loads(stored.to_json_string()) == json.loads(args.to_json_string()) | {"output_dir": tmp_path.name}

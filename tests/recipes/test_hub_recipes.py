import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import ResNetConfig, ResNetForImageClassification

from gradaug_hf.experiments.results import RESULTS
from gradaug_hf.hub.networks import load_checkpoint
from recipes import cifar_wideresnet

TOKEN = "hf_onlyHere"


@pytest.fixture
def network(hub, tmp_path) -> str:
    """Hub id of a network for CIFAR-10, at a branch of its own."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "network")
    api = HfApi()
    api.create_repo("me/network")
    api.create_branch("me/network", branch="small")
    api.upload_folder(repo_id="me/network", folder_path=tmp_path / "network", revision="small")
    return "me/network@small"


def test_a_recipe_pulls_its_network_and_pushes_what_it_trained_with_its_results(hub, network, run_recipe, monkeypatch):
    hub.tokens[TOKEN] = "me"
    flags = f"--model {network} --push_to_hub --hub_model_id me/run --hub_private_repo true --save_strategy steps "
    flags += "--save_steps 1 --hub_always_push"
    finished = run_recipe(cifar_wideresnet.RECIPE, f"{flags} --hub_token {TOKEN}")
    repository = hub.repositories["me/run"]
    assert repository.private
    titles = ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert repository.titles()[1:] == titles
    assert json.loads(repository.files()[RESULTS]) == finished.results
    pulled, local = load_checkpoint("me/run").state_dict(), load_checkpoint(str(finished.folder)).state_dict()
    assert all(torch.equal(pulled[name], tensor) for name, tensor in local.items())
    assert "<HUB_TOKEN>" in sys.argv
    assert not any(TOKEN.encode() in file.read_bytes() for file in finished.folder.rglob("*") if file.is_file())
    assert TOKEN not in finished.printed + " ".join(sys.argv)
    assert finished.printed.endswith(f"pushed them to {hub.url}/me/run\n")

    tested = run_recipe(cifar_wideresnet.RECIPE, "--model me/run --do_train false --do_eval")
    accuracy = tested.printed.splitlines()[-1].split("|")[2]
    assert float(accuracy) == pytest.approx(100 * finished.result["top1"], abs=0.01)


def test_a_push_that_fails_ends_a_recipe_in_one_message_with_all_that_it_made(hub, network, run_recipe, tmp_path):
    hub.fail("POST", "me/run/commit", 500)
    folder = tmp_path / "run"
    flags = f"--model {network} --output_dir {folder} --push_to_hub --hub_model_id me/run --hub_strategy end"
    with pytest.raises(SystemExit, match="^error: me/run was not pushed to: the Hub answers 500.* hf upload me/run"):
        run_recipe(cifar_wideresnet.RECIPE, flags)
    assert json.loads((folder / RESULTS).read_text())["runs"][0]["steps"] == 2
    load_checkpoint(str(folder))
    assert hub.repositories["me/run"].titles() == ["initial commit"]


def test_a_network_of_timm_that_a_recipe_trained_is_pulled_by_its_hub_id(hub, run_recipe):
    flags = "--model resnet20_cifar --push_to_hub --hub_model_id me/run --hub_strategy end"
    finished = run_recipe(cifar_wideresnet.RECIPE, flags)
    pulled, local = load_checkpoint("me/run").state_dict(), load_checkpoint(str(finished.folder)).state_dict()
    assert all(torch.equal(pulled[name], tensor) for name, tensor in local.items())


def test_a_recipe_that_may_not_push_says_so_before_it_trains(hub, network, run_recipe, tmp_path):
    folder = tmp_path / "run"
    flags = f"--model {network} --output_dir {folder} --push_to_hub --hub_model_id other/run"
    with pytest.raises(SystemExit, match="^error: other/run cannot be pushed to: the Hub answers 403"):
        run_recipe(cifar_wideresnet.RECIPE, flags)
    assert list(Path(folder).iterdir()) == []


def test_a_recipe_says_why_it_cannot_pull(hub, run_recipe):
    with pytest.raises(SystemExit, match="^error: model is 'me/nothing', which is neither a folder nor on the Hub"):
        run_recipe(cifar_wideresnet.RECIPE, "--model me/nothing")

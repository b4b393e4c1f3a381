import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from gradaug_hf.hub.weights import WeightsError, check_weights, saved_names, take_saved_names, weight_shapes


def test_tensors_that_share_memory_are_needed_once(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    state = {name: tensor for name, tensor in network.state_dict().items() if name != "1.weight"}
    save_file(state, tmp_path / "model.safetensors")
    check_weights(tmp_path, network)
    network[1].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(WeightsError, match="is of another network than Sequential: 1.weight is missing$"):
        check_weights(tmp_path, network)


def test_the_first_mismatches_are_named_and_the_others_counted(tmp_path):
    save_file({f"layer{i}": torch.zeros(2) for i in range(9)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="weight is missing; bias is missing; layer0 is left over; .*; and 6 more"):
        check_weights(tmp_path, nn.Linear(2, 2))


def test_names_in_a_file_may_lack_the_prefix_of_a_wrapper(tmp_path):
    network = nn.Module()
    network.timm_model = nn.Linear(2, 2)
    save_file(network.timm_model.state_dict(), tmp_path / "model.safetensors")
    check_weights(tmp_path, network, "timm_model.")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/other.safetensors", "deeper/other.safetensors", "a.bin", 7]
)
def test_a_file_of_weights_outside_the_folder_is_refused(name, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, (folder / str(name)).resolve() if str(name)[0] != "/" else tmp_path / "x")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match=f"index.json names {name!r}, which is no safetensors file of its folder"):
        weight_shapes(folder)


@pytest.mark.parametrize("files", [["a.safetensors"], "a.safetensors", {}, None])
def test_an_index_without_files_by_tensor_is_refused(files, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(WeightsError, match="index.json has weight_map .*; expected the name of a file for each"):
        weight_shapes(tmp_path)


@pytest.mark.parametrize("of_a_part", [False, True])
def test_weights_are_found_by_the_names_that_transformers_saves_them_under(tmp_path, of_a_part):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    saved, model = (ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)) for _ in range(2))
    saved.save_pretrained(tmp_path)
    check_weights(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == saved_names(model).keys()
    take_saved_names(model)
    if of_a_part:
        outer = nn.ModuleDict({"inner": model})
        outer.load_state_dict({f"inner.{name}": tensor for name, tensor in weights.items()})
    else:
        model.load_state_dict(weights)
    expected = saved.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(expected)  # by its own names as well

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from gradaug_hf import make_slimmable, slicing_report
from gradaug_hf.experiments.fine_tuning_trainer import ADAPTERS, FineTuningTrainer
from gradaug_hf.experiments.lora import add_adapters, merge_adapters, merged
from gradaug_hf.hub.networks import head_parameters
from gradaug_hf.slimming import at_width
from gradaug_hf.trainer.checkpoints import ResumeError
from tests.experiments.test_fine_tuning_trainer import Images, trainer_of

RANK, SIDE = 3, 32
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "transformers_vit":
        return ViTForImageClassification(ViTConfig(**VIT, image_size=SIDE, patch_size=8, num_labels=3))
    sizes = {"img_size": SIDE} if "vit" in name or "beit" in name else {}
    return timm.create_model(name, num_classes=3, **sizes)


def adapted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with adapters that do something."""
    model = model_of(name)
    add_adapters(model, RANK, (3, SIDE, SIDE))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if ".lora_B" in key:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return getattr(output, "logits", output)


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_without_peft_it_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="^lora_rank is 3, which needs peft: pip install peft$"):
        add_adapters(model_of("test_vit"), RANK, (3, SIDE, SIDE))


@needs_peft
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "transformers_vit"])
def test_a_merged_model_and_its_sub_networks_give_what_they_gave_with_adapters(name: str):
    model = adapted(name, torch.float64).eval()
    plain = model_of(name).to(torch.float64).eval()
    x, widths = images(), (1.0, 0.5)
    make_slimmable(model, input_size=SIDE)
    assert slicing_report(model).sliced_macs > 0.5

    def outputs() -> list[torch.Tensor]:
        found = []
        for width in widths:
            with at_width(model, width), torch.no_grad():
                found.append(logits_of(model, x))
        return found

    expected, before = outputs(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with merged(model):
        assert model.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(logits_of(model, x), expected[0])
        plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(plain, x), expected[0])
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    merge_adapters(model)
    make_slimmable(model, input_size=SIDE)
    for found, wanted in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@needs_peft
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "beit_base_patch16_224.test"])
def test_gradients_of_adapters_follow_from_those_of_the_merged_weights(name: str):
    """With W + B A, the gradients are dB = dW Aᵀ and dA = Bᵀ dW, for each layer that is adapted."""
    if name.startswith("beit"):  # whose qkv is never called
        model = timm.models.beit.Beit(img_size=SIDE, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
        model.default_cfg = model.pretrained_cfg = {"architecture": "beit_base_patch16_224"}
        add_adapters(model, RANK, (3, SIDE, SIDE))
        assert not any("qkv.lora" in key for key, _ in model.named_parameters())
        model.double()
    else:
        model = adapted(name, torch.float64)
    layers = {key: module for key, module in model.named_modules() if hasattr(module, "lora_A")}
    assert layers
    x = images()
    logits_of(model.train(), x).square().sum().backward()
    pairs = {key: (m.lora_A["default"].weight, m.lora_B["default"].weight) for key, m in layers.items()}
    merge_adapters(model)
    for parameter in model.parameters():
        parameter.requires_grad = True
    model.zero_grad()
    logits_of(model, x).square().sum().backward()
    for key, (a, b) in pairs.items():
        gradient = model.get_submodule(key).weight.grad.flatten(1)
        torch.testing.assert_close(b.grad.flatten(1), gradient @ a.detach().flatten(1).T)
        torch.testing.assert_close(a.grad.flatten(1), b.detach().flatten(1).T @ gradient)


def trained(folder: Path, name: str, resume: str | None = None, **own) -> FineTuningTrainer:
    model = model_of(name)
    add_adapters(model, RANK, (3, SIDE, SIDE))
    settings = {"num_subnets": 1, "min_width": 0.5, "save_strategy": "steps", "save_steps": 2, "resolutions": [SIDE]}
    trainer = trainer_of(folder, model, settings, **own)
    trainer.train_dataset = trainer.eval_dataset = Large()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


class Large(Images):
    def __getitem__(self, index: int) -> dict:
        pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 3}


@needs_peft
@pytest.mark.filterwarnings("error:the folder of this")  # will have its weights alone
@pytest.mark.parametrize("name", ["test_resnet", "transformers_vit"])
def test_what_is_saved_is_an_ordinary_model_and_a_resumed_training_goes_on_exactly(tmp_path, name: str):
    trainer_of(tmp_path / "begun", model_of(name)).save_model()
    begun, heads = load_file(tmp_path / "begun" / "model.safetensors"), head_parameters(model_of(name))
    trainer = trained(tmp_path / "whole", name, ema_decay=0.5)
    folders = [tmp_path / "whole", tmp_path / "whole" / "checkpoint-2", tmp_path / "whole" / "checkpoint-4"]
    for folder in folders:
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == begun.keys()
        changed = {key for key, tensor in weights.items() if not torch.equal(tensor, begun[key])}
        assert changed > set(heads) and any(weights[key].ndim > 1 for key in changed - set(heads))
    loaded = AutoModelForImageClassification.from_pretrained(folders[0]).eval()
    found = trainer.predict(Large()).predictions
    with torch.no_grad():
        wanted = loaded(torch.stack([Large()[index]["pixel_values"] for index in range(10)])).logits
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    resumed = trained(tmp_path / "resumed", name, str(folders[1]), ema_decay=0.5)
    for key, tensor in load_file(folders[0] / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "resumed" / "model.safetensors")[key], tensor), key
    assert all(map(torch.equal, resumed.model.state_dict().values(), trainer.model.state_dict().values()))


@needs_peft
def test_a_checkpoint_without_adapters_cannot_be_gone_on_from(tmp_path):
    trained(tmp_path, "test_resnet")
    (tmp_path / "checkpoint-2" / ADAPTERS).unlink()
    with pytest.raises(ResumeError, match=f"checkpoint-2 has no {ADAPTERS}, which a training with lora_rank goes on"):
        trained(tmp_path, "test_resnet", str(tmp_path / "checkpoint-2"))

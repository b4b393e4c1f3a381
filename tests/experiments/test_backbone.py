import timm
import torch
from pytest import mark, raises
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from gradaug_hf.experiments.backbone import freeze_backbone, load_backbone, size_arguments
from tests.helpers.checkpoints import save_network


def small_resnet(num_labels: int = 3) -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=num_labels)
    )


@mark.parametrize("kind", ["timm", "transformers"])
def test_a_new_classifier_prefers_no_class_and_one_for_as_many_is_kept(tmp_path, kind: str):
    folder = str(tmp_path / "model")
    if kind == "timm":
        save_network(tmp_path / "model", 0, 5, "test_efficientnet")
    else:
        small_resnet(5).save_pretrained(folder)

    def classifier(model: nn.Module) -> nn.Linear:
        return model.get_classifier() if kind == "timm" else model.classifier[1]

    torch.manual_seed(0)
    new = classifier(load_backbone(folder, ["ant", "bee"]))
    assert new.out_features == 2 and 0.008 < new.weight.std().item() < 0.012 and not new.bias.any()
    kept = classifier(load_backbone(folder, list("abcde")))
    assert torch.equal(kept.weight, classifier(load_backbone(folder, list("abcde"))).weight)
    assert kept.weight.std() > 0.02


def test_position_embeddings_are_resized_and_the_rest_of_the_weights_kept(tmp_path):
    folder = save_network(tmp_path / "vit", 0, 5, "test_vit")
    own = timm.create_model(f"local-dir:{folder}", pretrained=True)
    model = load_backbone(folder, ["ant", "bee"], 48)
    assert model.pos_embed.shape[1] == 3 * 3 + 1
    assert torch.equal(model.blocks[0].attn.qkv.weight, own.blocks[0].attn.qkv.weight)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_a_convolutional_model_needs_no_size(tmp_path):
    assert size_arguments(save_network(tmp_path / "resnet", 0, 5, "test_resnet"), 48) == {}


def test_the_classifier_of_a_transformers_model_is_trained_alone():
    model = small_resnet()
    freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier.1.weight", "classifier.1.bias"}


def test_a_model_that_does_not_name_its_classifier_cannot_be_frozen():
    with raises(ValueError, match="Sequential does not say which of its parameters are the classifier's"):
        freeze_backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))

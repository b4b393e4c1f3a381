"""Tables of embeddings and torch's multi-head attention are sliced, and correctly: SigLIP, torchvision's ViT."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from transformers import SiglipConfig, SiglipForImageClassification

import gradaug_hf
from tests.helpers.oracle import kept_entries, randomised, relative_error, zeroed

SIDE, HEADS, CHANNELS = 16, 4, 24


class Logits(nn.Module):
    """A transformers classifier that gives its logits alone."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x).logits


class Columns(nn.Module):
    """An attention between the columns of two maps of features, of one or several sizes of channels."""

    def __init__(self, value_channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, CHANNELS, 1), nn.Conv2d(3, value_channels, 1)
        self.attention = nn.MultiheadAttention(CHANNELS, HEADS, vdim=value_channels)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (conv(x).mean(2).permute(2, 0, 1) for conv in (self.first, self.second))
        out, _ = self.attention(first, first, value=second)
        return self.head(out.mean(0))


def siglip() -> nn.Module:
    vision = {"hidden_size": CHANNELS, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 40}
    text = {**vision, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    config = SiglipConfig(vision_config={**vision, "image_size": SIDE, "patch_size": 8}, text_config=text)
    return Logits(SiglipForImageClassification(config))


MODELS = {
    "siglip": siglip,
    "vit of torchvision": lambda: VisionTransformer(SIDE, 8, 2, HEADS, CHANNELS, 40, num_classes=5),
    "columns": lambda: Columns(CHANNELS),
}


@pytest.mark.parametrize("width", [0.5, 0.75])
@pytest.mark.parametrize("name", MODELS)
def test_a_subnetwork_equals_the_full_model_with_left_out_channels_zeroed(name, width):
    torch.manual_seed(0)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    untouched = randomised(MODELS[name](), x)
    model = gradaug_hf.make_slimmable(copy.deepcopy(untouched), input_size=SIDE)
    assert gradaug_hf.slicing_report(model).sliced_macs == 1
    kept = kept_entries(model, width)
    with gradaug_hf.at_width(model.train(), width):
        model(x).square().sum().backward()
    model, x = model.double().eval(), x.double()
    for grad in (True, False):  # torch has an implementation of its own for the second
        with torch.set_grad_enabled(grad), gradaug_hf.at_width(model, width):
            output = model(x)
        assert relative_error(output.detach(), zeroed(untouched, kept)(x).detach()) < 1e-10
        assert relative_error(gradaug_hf.extract_subnet(model, width)(x).detach(), output.detach()) < 1e-10


def test_whole_heads_are_left_out():
    torch.manual_seed(0)
    model = gradaug_hf.make_slimmable(Columns(CHANNELS), input_size=SIDE)
    subnet = gradaug_hf.extract_subnet(model, 0.5).attention
    assert (subnet.num_heads, subnet.head_dim, subnet.embed_dim) == (HEADS // 2, CHANNELS // HEADS, CHANNELS // 2)
    assert subnet.in_proj_weight.shape == (3 * CHANNELS // 2, CHANNELS // 2)
    assert (subnet.out_proj.in_features, subnet.out_proj.out_features) == (CHANNELS // 2, CHANNELS // 2)


def test_multiply_adds_of_an_attention_are_counted():
    report = gradaug_hf.slicing_report(gradaug_hf.make_slimmable(Columns(CHANNELS), input_size=SIDE))
    convolutions = 2 * SIDE * SIDE * 3 * CHANNELS
    projections, products = 4 * SIDE * CHANNELS**2, 2 * SIDE * SIDE * CHANNELS
    assert report.macs() == convolutions + projections + products + CHANNELS * 5


def test_an_attention_with_values_of_another_size_stays_whole_with_the_reason():
    model = gradaug_hf.make_slimmable(Columns(16), input_size=SIDE)
    report = gradaug_hf.slicing_report(model)
    assert report.sliced_macs == 0
    assert report.refused["attention"] == "an attention with keys or values of another size"
    with gradaug_hf.at_width(model, 0.5):
        model(torch.randn(2, 3, SIDE, SIDE))


def test_rows_of_a_table_of_embeddings_stay_and_their_channels_are_sliced():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table, self.head = nn.Conv2d(3, 8, 1), nn.Embedding(SIDE, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.table(torch.arange(SIDE, device=x.device))
            return self.head((self.conv(x).mean(2).transpose(1, 2) + rows).mean(1))

    model = gradaug_hf.make_slimmable(Positions(), input_size=SIDE)
    assert gradaug_hf.slicing_report(model).sliced_macs == 1
    subnet = gradaug_hf.extract_subnet(model, 0.5)
    assert subnet.table.weight.shape == (SIDE, 4) and subnet.table.embedding_dim == 4

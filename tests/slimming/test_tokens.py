import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gradaug_hf import GradAug, GradAugConfig, GradAugTrainer, SubnetSampler
from gradaug_hf.slimming.tokens import find_tokens, keep_patches, tokens_kept

CLASSES, SIDE, PATCHES = 5, 32, 16
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 8,
    "num_labels": CLASSES,
}


def timm_vit(**arguments) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return timm.models.VisionTransformer(**size, **arguments).double().train()


def transformers_vit(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config, model = {
        "ViT": (ViTConfig, ViTForImageClassification),
        "DeiT": (DeiTConfig, DeiTForImageClassification),
        "DINOv2": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification),
    }[kind]
    own = {"mlp_ratio": 2, "num_register_tokens": 3} if kind == "DINOv2" else {}
    return model(config(**SMALL, **own)).double().train()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 4, 2, 1])


# ---- which patches ----


def numbered(images: int, tokens: int) -> Tensor:
    return torch.arange(tokens).repeat(images, 1)[:, :, None].double()


def test_the_first_tokens_stay_and_the_patches_keep_their_order():
    kept = keep_patches(numbered(50, 3 + 10), 3, 0.4, seed=2)[:, :, 0].tolist()
    for tokens in kept:
        assert tokens[:3] == [0, 1, 2]
        assert len(tokens) == len(set(tokens)) == 3 + 4
        assert tokens == sorted(tokens)
    assert len({tuple(tokens) for tokens in kept}) > 20


def test_every_patch_is_kept_equally_often():
    kept = keep_patches(numbered(4000, 1 + 5), 1, 0.4, seed=2)[:, 1:, 0].long().flatten().bincount(minlength=6)[1:]
    assert all(abs(count - 1600) < 155 for count in kept.tolist())  # the deviation is 31


@pytest.mark.parametrize("share, patches", [(0.01, 1), (0.25, 4), (0.5, 8), (0.97, 16)])
def test_a_share_is_rounded_to_patches_and_at_least_one(share, patches):
    assert keep_patches(numbered(2, 1 + 16), 1, share, seed=0).shape == (2, 1 + patches, 1)


def test_positions_depend_on_the_seed_alone_and_global_random_numbers_stay():
    state = torch.get_rng_state()
    first = keep_patches(numbered(3, 17), 1, 0.5, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(keep_patches(numbered(3, 17), 1, 0.5, seed=4), first)
    assert not torch.equal(keep_patches(numbered(3, 17), 1, 0.5, seed=5), first)


# ---- in models ----


def logits_by_hand(model: nn.Module, images: Tensor, share: float, seed: int) -> Tensor:
    """Logits of a small timm model whose blocks get chosen tokens."""
    tokens = model.patch_embed(images)
    tokens = torch.cat([model.cls_token.expand(len(images), -1, -1), tokens], dim=1) + model.pos_embed
    positions = keep_patches(numbered(len(images), PATCHES + 1), 1, share, seed)[:, :, 0].long()
    tokens = torch.stack([rows[own] for rows, own in zip(tokens, positions, strict=True)])
    for block in model.blocks:
        tokens = block(tokens)
    return model.head(model.norm(tokens)[:, 0])


def test_a_timm_model_computes_with_the_kept_patches(images):
    model = timm_vit()
    with tokens_kept(model, 0.5, seed=3):
        found = model(images)
    torch.testing.assert_close(found, logits_by_hand(model, images, 0.5, 3), rtol=0, atol=1e-12)
    assert not torch.allclose(found, model(images), atol=1e-3)


@pytest.mark.parametrize(
    "model, prefix",
    [
        (lambda: timm_vit(), 1),
        (lambda: timm_vit(reg_tokens=2), 3),
        (lambda: timm_vit(class_token=False, global_pool="avg"), 0),
        (lambda: timm_vit(patch_drop_rate=0.5), 1),
        (lambda: transformers_vit("ViT"), 1),
        (lambda: transformers_vit("DeiT"), 2),
        (lambda: transformers_vit("DINOv2"), 4),
    ],
)
def test_blocks_see_the_first_tokens_and_the_share_of_the_patches(images, model, prefix):
    model = model()
    name = next(name for name, _ in model.named_modules() if name.endswith(("blocks.0", "layer.0", "layers.0")))
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    with tokens_kept(model, 0.25, seed=3):
        model(images)
    full, part = seen
    assert find_tokens(model).num_prefix == prefix
    assert part.shape == (4, prefix + (full.shape[1] - prefix) // 4, 16)
    torch.testing.assert_close(part[:, :prefix], full[:, :prefix], rtol=0, atol=0)


def test_the_model_sees_all_patches_again_after_an_exception(images):
    model = timm_vit()
    expected = model(images)
    with pytest.raises(KeyboardInterrupt), tokens_kept(model, 0.5, seed=3):
        raise KeyboardInterrupt
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout"])
def test_a_model_without_such_a_place_is_refused_by_name(name):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no place where patches can be left out"):
        GradAug(model, subnet_mode="tokens")


# ---- the objective ----


def test_shares_of_patches_descend_to_the_smallest_and_widths_stay():
    sampler = SubnetSampler(4, subnet_mode="tokens", min_tokens=0.3)
    for step in range(50):
        subnets = sampler.sample(step)
        shares = [subnet.tokens for subnet in subnets]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0.3 < shares[-2] and shares[0] <= 1
        assert [subnet.width for subnet in subnets] == [1.0] * 4
    assert [subnet.tokens for subnet in SubnetSampler(3).sample(0)] == [1.0] * 3


def test_gradients_and_loss_of_a_step_are_those_of_the_formula(images, labels):
    model, reference = timm_vit(), timm_vit()
    gradaug = GradAug(model, subnet_mode="tokens", min_tokens=0.25, kl_weight=0.7, resolutions=[SIDE], seed=3)
    log_target = reference(images).log_softmax(1)
    expected = -log_target[range(4), labels].mean()
    for subnet in gradaug.sampler.sample(2):
        log_predicted = logits_by_hand(reference, images, subnet.tokens, subnet.seed).log_softmax(1)
        fixed = log_target.detach()
        expected = expected + 0.7 * (fixed.exp() * (fixed - log_predicted)).sum() / 4
    expected.backward()
    assert gradaug.backward(images, labels, step=2).item() == pytest.approx(expected.item(), abs=1e-10)
    for (name, found), parameter in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, parameter.grad, rtol=0, atol=1e-10, msg=name)


def test_a_training_may_leave_out_patches_alone(tmp_path):
    model = timm_vit().float()
    rows = [{"pixel_values": torch.randn(3, SIDE, SIDE), "labels": i % CLASSES} for i in range(8)]
    args = GradAugConfig(
        str(tmp_path),
        subnet_mode="tokens",
        resolutions=[SIDE],
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = GradAugTrainer(model, args, train_dataset=rows)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_subnets" in entry]
    assert [entry["subnet_width"] for entry in logged] == [1.0, 1.0]
    assert all(entry["loss_subnets"] > 0 for entry in logged)


def test_a_training_of_a_model_without_patches_is_refused_at_once(tmp_path):
    args = GradAugConfig(str(tmp_path), subnet_mode="tokens", report_to="none", use_cpu=True)
    rows = [{"pixel_values": torch.randn(3, SIDE, SIDE), "labels": 0}]
    with pytest.raises(ValueError, match="subnet_mode is 'tokens', but ResNet has no place"):
        GradAugTrainer(timm.create_model("test_resnet", num_classes=CLASSES), args, train_dataset=rows)

"""GradAug steps on families of every kind: all parameters get finite gradients."""

import pytest
import timm
import torch

import gradaug_hf

NETWORKS = [
    "convnext_atto",
    "efficientnet_b0",
    pytest.param("densenet121", marks=pytest.mark.slow),
    "vit_tiny_patch16_224",
    pytest.param("deit3_small_patch16_224", marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    pytest.param("maxvit_tiny_tf_224", marks=pytest.mark.slow),
    pytest.param("mixer_s32_224", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradaug_step_gives_every_parameter_a_finite_gradient(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    gradaug = gradaug_hf.GradAug(model, num_subnets=2, min_width=0.75, resolutions=[224])
    loss = gradaug.backward(torch.randn(2, 3, 224, 224), torch.tensor([1, 7]))
    assert loss.isfinite()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert gradaug_hf.slicing_report(model).sliced_macs > 0.9

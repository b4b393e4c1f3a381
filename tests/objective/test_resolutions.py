import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from gradaug_hf.objective.resolutions import ResolutionTrial, default_resolutions, dynamic_size_hint


class MultiplesOf8(nn.Module):
    """Takes images of 16 to 64 pixels whose side is a multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 8 or not 16 <= x.shape[-1] <= 64:
            raise RuntimeError(f"side {x.shape[-1]} does not fit\nsecond line")
        return self.conv(x).mean(dim=(2, 3))


def test_default_resolutions_are_those_of_the_paper():
    assert default_resolutions(224) == [224, 192, 160, 128]
    assert default_resolutions(32) == [32, 27, 23, 18]
    assert min(default_resolutions(1)) == 1


def test_a_resolution_that_does_not_work_is_named_with_the_nearest_that_do():
    with pytest.raises(
        ValueError, match=r"resolutions holds 44, which MultiplesOf8 cannot take \(side 44 .*\); .* 40, 48$"
    ):
        ResolutionTrial(MultiplesOf8()).check([64, 44])


def test_far_from_any_size_that_works_the_native_one_is_named():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1)
    with pytest.raises(
        ValueError,
        match="can take: 224; timm.create_model.'vit_tiny_patch16_224', dynamic_img_size=True. builds it for others",
    ):
        ResolutionTrial(model).check([144])


def test_only_sizes_that_work_are_accepted():
    assert ResolutionTrial(MultiplesOf8()).accepted([72, 64, 60, 16, 8]) == [64, 16]


def test_a_trial_leaves_the_network_and_the_random_numbers_as_they_are():
    model = timm.create_model("resnet18", num_classes=2, drop_rate=0.5)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    ResolutionTrial(model).check([64])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_default_resolutions_are_the_nearest_that_the_network_can_take(recwarn):
    assert ResolutionTrial(MultiplesOf8()).default(64) == [64, 56, 48, 40]
    assert ResolutionTrial(timm.create_model("test_vit", dynamic_img_size=True)).default(160) == [160, 144, 112, 96]
    assert not recwarn


def test_a_network_of_one_size_falls_back_to_width_with_a_warning_that_says_how_to_build_it():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, depths=(1, 1, 1, 1))
    with pytest.warns(UserWarning, match="SwinTransformer takes images of 224 pixels alone, .* no smaller ones; timm"):
        assert ResolutionTrial(model).default(224) == [224]
    with pytest.warns(UserWarning, match="LevitDistilled takes images of 224 pixels alone, .* see no smaller ones$"):
        assert ResolutionTrial(timm.create_model("levit_128s")).default(224) == [224]


@pytest.mark.parametrize(
    ("name", "sides", "hint"),
    [
        ("vit_tiny_patch16_224", [192, 160], "timm.create_model('vit_tiny_patch16_224', dynamic_img_size=True)"),
        ("vit_tiny_patch16_224", [190], "dynamic_img_size=True, dynamic_img_pad=True)"),
        ("swin_tiny_patch4_window7_224", [192], "dynamic_img_size=True)"),
        (
            "beit_base_patch16_224",
            [192],
            "('beit_base_patch16_224', img_size=192) builds it for that side alone",
        ),
    ],
)
def test_the_hint_names_a_call_that_builds_the_network_for_these_sides(name, sides, hint):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert hint in dynamic_size_hint(model, sides)


def test_a_wrapped_network_is_told_how_transformers_builds_it():
    config = TimmWrapperConfig(architecture="test_vit", num_labels=2)
    hint = dynamic_size_hint(TimmWrapperForImageClassification(config), [150])
    assert "from_pretrained(..., model_args={'dynamic_img_size': True, 'dynamic_img_pad': True})" in hint


def test_no_hint_is_given_where_timm_has_no_such_call():
    assert dynamic_size_hint(MultiplesOf8(), [192]) == ""


def test_a_network_of_grey_images_is_tried_with_such():
    network = timm.create_model("test_efficientnet", in_chans=1)
    assert ResolutionTrial(network).default(56) == [56, 48, 40, 32]


def test_images_that_are_not_square_are_tried_in_their_own_shape():
    model = timm.create_model("test_vit", dynamic_img_size=True)  # patches of 16
    trial = ResolutionTrial(model, shape=(160, 208))
    assert ResolutionTrial(model).accepted([160, 128, 96]) == [160, 128, 96]
    assert trial.accepted([160, 128, 96]) == [160]  # 128 x 166 and 96 x 125 are no multiples
    assert ResolutionTrial(model).for_shape((160, 320)).accepted([160, 128, 100, 96]) == [160, 128, 96]
    with pytest.raises(
        ValueError,
        match=r"holds 128, which VisionTransformer cannot take for images of 128 x 166 pixels \(.*"
        r"dynamic_img_size=True, dynamic_img_pad=True\) builds it for others",
    ):
        trial.check([128])


def test_default_resolutions_of_images_that_are_not_square_are_those_that_both_sides_take(recwarn):
    trial = ResolutionTrial(timm.create_model("test_vit", dynamic_img_size=True), shape=(160, 320))
    assert trial.default(160) == [160, 144, 112, 96]
    assert not recwarn
    with pytest.warns(UserWarning, match="takes images of 160 pixels alone"):
        assert trial.for_shape((160, 208)).default(160) == [160]


def test_a_network_that_is_built_for_a_shape_takes_images_of_it():
    with torch.device("meta"):
        model = timm.create_model("beit_base_patch16_224")
    assert "img_size=(192, 384)) builds it for that side alone" in dynamic_size_hint(model, [192], (224, 448))

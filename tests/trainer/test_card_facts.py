from gradaug_hf import GradAugConfig, SubnetSampler
from gradaug_hf.trainer.card_facts import subnet_facts


def facts(tmp_path, **settings) -> dict[str, str]:
    args = GradAugConfig(str(tmp_path), report_to="none", use_cpu=True, resolutions=[32, 24], **settings)
    return dict(subnet_facts(args, SubnetSampler.from_settings(args), None))


def test_parts_of_the_batch_and_a_rising_weight_are_on_the_card(tmp_path):
    found = facts(tmp_path, subnet_images="split", kl_warmup=0.25)
    assert found["share of the images of a step"] == "0.333"
    assert found["weight of their losses"] == "1, rising from 0 over 0.25 of the steps"


def test_fewer_patches_are_on_the_card_and_widths_are_not(tmp_path):
    found = facts(tmp_path, subnet_mode="tokens", min_tokens=0.4)
    assert found["smallest share of the patches"] == "0.4"
    assert "width multipliers" not in found


def test_the_published_settings_are_on_the_card_without_others(tmp_path):
    assert facts(tmp_path) == {
        "sub-networks of a step": "3",
        "width multipliers": "0.9, and 2 sampled in [0.9, 1]",
        "channels are multiples of": "1",
        "resolutions": "32 24",
        "they learned": "the full network's predictions",
        "weight of their losses": "1",
        "backward": "sequential",
    }

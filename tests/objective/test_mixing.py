import pytest
import torch

from gradaug_hf.objective.mixing import BatchMixer


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 2])


def test_mixup_interpolates_neighbours_and_their_labels(batch):
    images, labels = batch
    mixed, soft = BatchMixer(3, mixup_alpha=1.0, cutmix_alpha=0.0)(images, labels, seed=0)
    share = soft[0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    one_hot = torch.eye(3)[labels]
    torch.testing.assert_close(soft, share * one_hot + (1 - share) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_box_and_weights_labels_by_its_area(batch):
    images, labels = batch
    mixer = BatchMixer(3, mixup_alpha=0.0, cutmix_alpha=1.0)
    for seed in range(5):
        mixed, soft = mixer(images, labels, seed)
        pasted = mixed != images
        assert torch.equal(mixed[pasted], images.roll(1, 0)[pasted])
        area = pasted.float().mean().item()
        one_hot = torch.eye(3)[labels]
        torch.testing.assert_close(soft, (1 - area) * one_hot + area * one_hot.roll(1, 0))


def test_the_mix_depends_on_the_seed_alone(batch):
    mixer = BatchMixer(3, 0.5, 0.5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = mixer(*batch, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for one, other in zip(mixer(*batch, seed=1), first, strict=True))
    assert not torch.equal(mixer(*batch, seed=2)[0], first[0])


def test_both_mixes_and_none_are_as_frequent_as_they_should_be(batch):
    mixer = BatchMixer(3, 1.0, 1.0, mix_prob=0.6)
    counts = {"none": 0, "cutmix": 0, "mixup": 0}
    for seed in range(600):
        mixed, _ = mixer(*batch, seed)
        same = (mixed == batch[0]) | (mixed == batch[0].roll(1, 0))
        kind = "none" if torch.equal(mixed, batch[0]) else "cutmix" if same.all() else "mixup"
        counts[kind] += 1
    # The deviations are 12, 11 and 11; a box of no area counts as none.
    assert counts["none"] == pytest.approx(240, abs=45)
    assert counts["cutmix"] == pytest.approx(180, abs=45)
    assert counts["mixup"] == pytest.approx(180, abs=40)


def test_soft_labels_are_mixed_too(batch):
    soft = torch.softmax(torch.randn(4, 3), dim=1)
    _, mixed = BatchMixer(3, 1.0, 0.0)(batch[0], soft, seed=0)
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(4))
    assert not torch.equal(mixed, soft)


def test_an_unmixed_batch_has_soft_labels_as_well(batch):
    images, labels = BatchMixer(3, 1.0, 0.0, mix_prob=0.0)(*batch, seed=0)
    assert torch.equal(images, batch[0])
    assert torch.equal(labels, torch.eye(3)[batch[1]])

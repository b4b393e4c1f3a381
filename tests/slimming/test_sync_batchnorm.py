import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaug_hf.slimming import make_slimmable, slicing_report
from gradaug_hf.slimming.sync_batchnorm import CpuSyncBatchNorm, CpuSyncBatchNormAct, synchronise_batchnorm
from gradaug_hf.slimming.widths import subnet_pass
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.trainer import GradAugTrainer

CPU = torch.device("cpu")


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, drop_rate=0.0, drop_path_rate=0.0)


@pytest.fixture
def one_process(tmp_path):
    """A process group, in which synchronised batch norms are as if there were others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_one_process_computes_as_without_it_with_the_same_parameters_and_names(name, one_process):
    network = network_of(name)
    plain, parameters, names = copy.deepcopy(network), list(network.parameters()), list(network.state_dict())
    synchronise_batchnorm(network, CPU)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    assert {type(norm) for norm in norms} == {CpuSyncBatchNorm if name == "test_resnet" else CpuSyncBatchNormAct}
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == names
    images = torch.randn(4, 3, 32, 32)
    for training in (True, False):
        assert torch.equal(network.train(training)(images), plain.train(training)(images))
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_torchs_own_synchronised_norms_are_sliced_as_others_are_where_processes_have_met(name, one_process):
    expected = slicing_report(make_slimmable(network_of(name), input_size=32))
    network = convert_sync_batchnorm(network_of(name))
    kinds = {nn.SyncBatchNorm, SyncBatchNormAct}
    found = slicing_report(make_slimmable(network, input_size=32))
    assert (found.sliced_macs, found.sliced_params) == (expected.sliced_macs, expected.sliced_params)
    assert found.sliced_macs > 0.9
    assert {base for m in network.modules() if isinstance(m, nn.SyncBatchNorm) for base in type(m).__bases__} & kinds


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, lambda network: synchronise_batchnorm(network, CPU)])
def test_subnetworks_leave_the_statistics_of_synchronised_norms_alone(convert):
    network = network_of("test_efficientnet")
    convert(network)
    make_slimmable(network, input_size=32).train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with subnet_pass(network, 0.5):
        network(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    network(torch.randn(4, 3, 32, 32))
    assert not torch.equal(network.bn1.running_mean, before["bn1.running_mean"])


def test_torchs_own_norms_stay_where_there_is_a_gpu():
    network = network_of("test_efficientnet")
    synchronise_batchnorm(network, torch.device("cuda"))
    assert {type(m) for m in network.modules() if isinstance(m, _BatchNorm)} == {SyncBatchNormAct}


def test_a_network_that_was_made_slimmable_before_is_refused_unless_it_is_synchronised():
    network = make_slimmable(network_of("test_resnet"), input_size=32)
    with pytest.raises(ValueError, match="sync_batchnorm is True, but the model was made slimmable"):
        synchronise_batchnorm(network, CPU)
    network = network_of("test_resnet")
    synchronise_batchnorm(network, CPU)
    make_slimmable(network, input_size=32)
    synchronise_batchnorm(network, CPU)
    assert slicing_report(network).sliced_macs > 0.9


def test_a_single_process_keeps_the_batch_norms_of_its_network(tmp_path):
    network = network_of("test_resnet")
    config = GradAugConfig(str(tmp_path), sync_batchnorm=True, use_cpu=True, report_to="none", num_subnets=0)
    GradAugTrainer(network, config)
    assert not any(isinstance(module, (nn.SyncBatchNorm, CpuSyncBatchNorm)) for module in network.modules())

"""Weights under the names of the paper's own code, against networks written out by its layout."""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from gradaug_hf import make_slimmable
from gradaug_hf.cli import main
from gradaug_hf.hub import official
from gradaug_hf.slimming import subnet_pass


class Official:
    """Layers that compute with tensors by the paper's names, in float64; the first pass makes the tensors.

    A narrower pass takes the first channels and, like the paper's sub-networks, the batch's statistics.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.weights: dict[str, Tensor] = {}
        self.width = 1.0
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.empty(shape).uniform_(low, high, generator=self.generator)
        return self.weights[name].double()

    def conv(self, name: str, x: Tensor, channels: int, kernel: int, stride: int = 1) -> Tensor:
        bound = (3 / (x.shape[1] * kernel * kernel)) ** 0.5
        weight = self.tensor(f"{name}.weight", (channels, x.shape[1], kernel, kernel), -bound, bound)
        kept = int(channels * self.width + 0.5)
        return F.conv2d(x, weight[:kept, : x.shape[1]], stride=stride, padding=kernel // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        kept = x.shape[1]
        ranges = {"weight": (0.5, 1.5), "bias": (-0.3, 0.3), "running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5)}
        scale, shift, mean, var = (
            self.tensor(f"{name}.{key}", (kept,), *ends)[:kept].view(1, -1, 1, 1) for key, ends in ranges.items()
        )
        self.weights.setdefault(f"{name}.num_batches_tracked", torch.tensor(0))
        if self.width < 1:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def classifier(self, name: str, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        bound = (3 / x.shape[1]) ** 0.5
        weight = self.tensor(f"{name}.weight", (self.classes, x.shape[1]), -bound, bound)
        bias = self.tensor(f"{name}.bias", (self.classes,), -1, 1)
        return x @ weight[:, : x.shape[1]].T + bias


def resnet50(net: Official, x: Tensor) -> Tensor:
    x = net.norm("features.0.1", net.conv("features.0.0", x, 64, 7, 2)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    index, before = 0, 64
    for blocks, channels, first_stride in ((3, 256, 1), (4, 512, 2), (6, 1024, 2), (3, 2048, 2)):
        for stride in (first_stride, *[1] * (blocks - 1)):
            index += 1
            body = f"features.{index}.body"
            y = net.norm(f"{body}.1", net.conv(f"{body}.0", x, channels // 4, 1)).relu()
            y = net.norm(f"{body}.4", net.conv(f"{body}.3", y, channels // 4, 3, stride)).relu()
            y = net.norm(f"{body}.7", net.conv(f"{body}.6", y, channels, 1))
            if before != channels:
                shortcut = f"features.{index}.shortcut"
                x = net.norm(f"{shortcut}.1", net.conv(f"{shortcut}.0", x, channels, 1, stride))
            x, before = (y + x).relu(), channels
    return net.classifier("classifier.0", x)


def wrn28_10(net: Official, x: Tensor) -> Tensor:
    x, before = net.conv("conv1", x, 16, 3), 16
    for stage, channels in enumerate((160, 320, 640), start=1):
        for index in range(4):
            block = f"block{stage}.layer.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            activated = net.norm(f"{block}.bn1", x).relu()
            y = net.norm(f"{block}.bn2", net.conv(f"{block}.conv1", activated, channels, 3, stride)).relu()
            y = net.conv(f"{block}.conv2", y, channels, 3)
            x = y + (x if before == channels else net.conv(f"{block}.convShortcut", activated, channels, 1, stride))
            before = channels
    return net.classifier("fc", net.norm("bn1", x).relu())


def pyramidnet200_a240(net: Official, x: Tensor) -> Tensor:
    x, inner = net.norm("bn1", net.conv("conv1", x, 16, 3)), 16.0
    for stage in (1, 2, 3):
        for index in range(22):
            inner += 240 / 66
            block, channels = f"layer{stage}.{index}", round(inner)
            stride = 2 if stage > 1 and index == 0 else 1
            y = net.conv(f"{block}.conv1", net.norm(f"{block}.bn1", x), channels, 1)
            y = net.conv(f"{block}.conv2", net.norm(f"{block}.bn2", y).relu(), channels, 3, stride)
            y = net.conv(f"{block}.conv3", net.norm(f"{block}.bn3", y).relu(), 4 * channels, 1)
            y = net.norm(f"{block}.bn4", y)
            x = x if stride == 1 else F.avg_pool2d(x, 2)
            zeros = x.new_zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])
            x = y + torch.cat([x, zeros], 1)
    return net.classifier("fc", net.norm("bn_final", x).relu())


def resnet110_cifar(net: Official, x: Tensor) -> Tensor:
    x = net.norm("bn1", net.conv("conv1", x, 16, 3)).relu()
    for stage, channels in enumerate((16, 32, 64), start=1):
        for index in range(18):
            block = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            y = net.norm(f"{block}.bn1", net.conv(f"{block}.conv1", x, channels, 3, stride)).relu()
            y = net.norm(f"{block}.bn2", net.conv(f"{block}.conv2", y, channels, 3))
            if stride == 2:
                x = net.norm(f"{block}.downsample.1", net.conv(f"{block}.downsample.0", x, channels, 1, 2))
            x = (y + x).relu()
    return net.classifier("fc", x)


NETWORKS = {each.__name__: each for each in (resnet50, wrn28_10, pyramidnet200_a240, resnet110_cifar)}
WIDTH_NETWORKS = ["resnet50", "wrn28_10", "pyramidnet200_a240"]


def images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def save(file: Path, weights: dict[str, Tensor], key: str | None = "state_dict", prefix: str = "module.") -> Path:
    """A checkpoint as the paper's code writes it, with what else it keeps."""
    weights = OrderedDict((f"{prefix}{name}", tensor) for name, tensor in weights.items())
    weights._metadata = OrderedDict({"": {"version": 1}})  # that of a module's state dict
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, momentum=0.9).state_dict()
    checkpoint = {"epoch": 200, key: weights, "best_prec1": 81.5, "best_prec5": 95.6, "optimizer": optimizer}
    torch.save(checkpoint if key else weights, file)
    return file


def convert(file: Path, arch: str, output: Path) -> nn.Module:
    """The network that timm makes of the folder written by the command line."""
    main(["convert", str(file), "--arch", arch, "--output", str(output)])
    return timm.create_model(f"local-dir:{output}", pretrained=True)


def refusal(capsys: pytest.CaptureFixture, file: Path, arch: str, output: Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(file), "--arch", arch, "--output", str(output)])
    return f"{stopped.value.code}"


Pair = tuple[Callable[[Tensor], Tensor], Official, nn.Module]


def pair(arch: str, folder: Path, classes: int = 10) -> Pair:
    """The reference's forward, its tensors, and the converted network in float64."""
    net = Official(classes)
    with torch.no_grad():
        NETWORKS[arch](net, images(1, 32))
    network = convert(save(folder / "model_best.pth.tar", net.weights), arch, folder / "converted")
    return lambda x: NETWORKS[arch](net, x), net, network.double()


@pytest.fixture(scope="module")
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("converted", NETWORKS, indirect=True)
@torch.no_grad()
def test_logits_are_those_of_the_paper_s_network(converted: Pair):
    reference, _, network = converted
    x = images(1, 32)
    expected = reference(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(network.eval()(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("converted", WIDTH_NETWORKS, indirect=True)
@torch.no_grad()
def test_subnet_logits_are_those_of_the_paper_s_sub_networks(converted: Pair):
    reference, net, network = converted
    make_slimmable(network).train()
    x = images(2, 64 if network.pretrained_cfg["architecture"] == "resnet50" else 16)
    for width in (0.75, 0.875):
        net.width = width
        expected = reference(x)
        net.width = 1.0
        with subnet_pass(network, width):
            torch.testing.assert_close(network(x), expected, rtol=1e-7, atol=1e-7)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Tensors of a ResNet-110 with 7 classes by the paper's names."""
    net = Official(7)
    with torch.no_grad():
        resnet110_cifar(net, images(1, 8))
    return net.weights


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_tensors_are_found_under_each_key_with_and_without_prefix(weights, tmp_path: Path, key, prefix):
    network = convert(save(tmp_path / "x.pth.tar", weights, key, prefix), "resnet110_cifar", tmp_path / "out")
    state = network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_files_of_old_versions_of_pytorch_are_read(weights, tmp_path: Path):
    torch.save({"state_dict": weights}, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=False)
    network = convert(tmp_path / "x.pth.tar", "resnet110_cifar", tmp_path / "out")
    assert torch.equal(network.fc.bias, weights["fc.bias"])


def test_the_folder_is_an_ordinary_checkpoint_with_the_classes_of_the_classifier(weights, tmp_path: Path):
    convert(save(tmp_path / "x.pth.tar", weights), "resnet110_cifar", tmp_path / "deep" / "out")
    folder = tmp_path / "deep" / "out"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert [file.name for file in folder.parent.iterdir()] == ["out"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet110_cifar", 7)
    assert load_file(folder / "model.safetensors")["fc.weight"].shape == (7, 64)
    assert folder.stat().st_mode == tmp_path.joinpath("deep").stat().st_mode


@pytest.mark.parametrize(
    ("arch", "mean", "interpolation", "crop_pct", "input_size"),
    [
        ("resnet50", (0.485, 0.456, 0.406), "bilinear", 0.875, (3, 224, 224)),
        ("resnet110_cifar", (125.3 / 255, 123.0 / 255, 113.9 / 255), "bilinear", 1.0, (3, 32, 32)),
    ],
)
def test_images_are_prepared_as_the_paper_s_code_prepares_them_for_its_test(
    tmp_path: Path, arch, mean, interpolation, crop_pct, input_size
):
    net = Official(5)
    with torch.no_grad():
        NETWORKS[arch](net, images(1, 32))
    network = convert(save(tmp_path / "x.pth.tar", net.weights), arch, tmp_path / "out")
    config = resolve_model_data_config(network, use_test_size=True)
    assert config["mean"] == pytest.approx(mean)
    assert config["interpolation"] == interpolation
    assert config["crop_pct"] == crop_pct
    assert config["input_size"] == input_size


def test_all_missing_extra_and_misshaped_tensors_are_listed_and_nothing_is_written(weights, tmp_path: Path, capsys):
    broken = dict(weights)
    del broken["layer2.3.conv1.weight"], broken["bn1.running_var"]
    broken["layer4.0.conv1.weight"] = torch.ones(2)
    broken["layer1.0.bn2.bias"] = torch.ones(15)
    broken["fc.bias"] = torch.ones(8)
    error = refusal(capsys, save(tmp_path / "x.pth.tar", broken), "resnet110_cifar", tmp_path / "new" / "out")
    assert re.findall(r"^  (.*)$", error, re.MULTILINE)[-5:] == [
        "missing: bn1.running_var",
        "missing: layer2.3.conv1.weight",
        "extra: layer4.0.conv1.weight",
        "mis-shaped: layer1.0.bn2.bias is (15,) instead of (16,)",
        "mis-shaped: fc.bias is (8,) instead of (7,)",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth.tar"]


def test_weights_of_another_network_are_refused(weights, tmp_path: Path, capsys):
    error = refusal(capsys, save(tmp_path / "x.pth.tar", weights), "wrn28_10", tmp_path / "out")
    assert "these are not the weights of a wrn28_10 of the paper's code" in error
    assert "missing: block3.layer.3.conv2.weight" in error
    assert "extra: layer3.17.conv2.weight" in error
    assert not (tmp_path / "out").exists()


class Marker:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_file_that_needs_more_than_tensors_is_refused_and_runs_no_code(tmp_path: Path, capsys):
    torch.save({"state_dict": {"x": torch.ones(1)}, "args": Marker(tmp_path / "ran")}, tmp_path / "x.pth.tar")
    error = refusal(capsys, tmp_path / "x.pth.tar", "resnet50", tmp_path / "out")
    assert re.search(r"x\.pth\.tar holds \w+\.mkdir beside tensors and plain values, and is not read", error)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth.tar"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as a checkpoint of PyTorch"),
        (b"<html>not found</html>", "is no checkpoint of PyTorch"),
        (b"PK\x03\x04 cut short", "cannot be read as a checkpoint of PyTorch"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys, content, reason):
    if content is not None:
        (tmp_path / "x.pth.tar").write_bytes(content)
    error = refusal(capsys, tmp_path / "x.pth.tar", "resnet50", tmp_path / "out")
    assert "x.pth.tar" in error
    assert reason in error


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"state_dict": {"lr": 0.1}}, {"model": "resnet50"}])
def test_a_checkpoint_without_tensors_by_name_is_refused(tmp_path: Path, capsys, content):
    torch.save(content, tmp_path / "x.pth.tar")
    assert "holds no tensors by name" in refusal(capsys, tmp_path / "x.pth.tar", "resnet50", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    torch.save({"module.x": torch.tensor([1.0, float("nan")])}, tmp_path / "x.pth.tar")
    with pytest.raises(ValueError, match="the weights of .*x.pth.tar hold NaN or infinite values in module.x;"):
        official.read_weights(tmp_path / "x.pth.tar")


def test_a_folder_with_something_in_it_is_not_overwritten(weights, tmp_path: Path, capsys):
    file = save(tmp_path / "x.pth.tar", weights)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "kept").touch()
    assert f"output {folder} exists already" in refusal(capsys, file, "resnet110_cifar", folder)
    assert f"output {file} exists already" in refusal(capsys, file, "resnet110_cifar", file)
    (folder / "kept").unlink()
    convert(file, "resnet110_cifar", folder)


def test_nothing_is_left_of_a_folder_that_cannot_be_written_whole(weights, tmp_path: Path, capsys, monkeypatch):
    def fill_the_disk(state: dict[str, Tensor], file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    file = save(tmp_path / "x.pth.tar", weights)
    monkeypatch.setattr(official, "save_file", fill_the_disk)
    error = refusal(capsys, file, "resnet110_cifar", tmp_path / "out")
    assert "cannot be written: [Errno 28] No space left on device" in error
    assert [each.name for each in tmp_path.iterdir()] == ["x.pth.tar"]


def test_half_precision_is_stored_as_the_network_computes(weights, tmp_path: Path):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    network = convert(save(tmp_path / "x.pth.tar", half), "resnet110_cifar", tmp_path / "out")
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, half["conv1.weight"].float())

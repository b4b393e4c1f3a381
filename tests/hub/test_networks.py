import ast
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
)

from gradaug_hf.hub.networks import (
    accepted_arguments,
    checkpoint_folder,
    create_network,
    head_parameters,
    image_processor,
    is_checkpoint,
    load_checkpoint,
    load_network,
    network_to_train,
    pixel_statistics,
)
from tests.helpers.checkpoints import save_network
from tests.helpers.hub_server import HubServer, Repository

ABC = ["ant", "bee", "cat"]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def files_of_timm(folder: Path) -> dict[str, bytes]:
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=3), folder, safe_serialization=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def files_of_transformers(folder: Path, **settings) -> dict[str, bytes]:
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 8], embedding_size=8, num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder, **settings)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def on_the_hub(hub: HubServer, files: dict[str, bytes]) -> str:
    hub.repositories["me/net"] = Repository()
    hub.repositories["me/net"].add(files)
    return "me/net"


def without_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(".safetensors")}


def test_names_folders_and_hub_ids_are_told_apart(tmp_path):
    assert not is_checkpoint("resnet18")
    assert not is_checkpoint("resnet18.a1_in1k")
    assert is_checkpoint("timm/resnet18.a1_in1k")
    assert is_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="model is 'resnet19', which is unknown; .* timm has resnet1"):
        create_network("resnet19", ["a"], {})


@pytest.mark.parametrize("files_of", [files_of_timm, files_of_transformers])
def test_a_network_of_the_hub_is_loaded_with_its_classifier_or_another(hub, tmp_path, files_of):
    files = files_of(tmp_path / "a")
    name = on_the_hub(hub, files)
    weights = safetensors.torch.load(files["model.safetensors"])
    loaded = load_network(name, ABC).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())
    other = create_network(name, ["ant", "bee"], {})
    classifier = [module for module in other.modules() if isinstance(module, torch.nn.Linear)][-1]
    assert classifier.out_features == 2
    body = [key for key in weights if "fc" not in key and "classifier" not in key]
    assert all(torch.equal(other.state_dict()[key], weights[key]) for key in body)
    with pytest.raises(ValueError, match="'me/net' has 3 classes, the data set 10"):
        load_network(name, [*"abcdefghij"])


def test_weights_in_several_files_are_loaded(hub, tmp_path):
    files = files_of_transformers(tmp_path / "a", max_shard_size="3KB")
    assert "model.safetensors.index.json" in files
    whole = files_of_transformers(tmp_path / "b")
    loaded = load_checkpoint(on_the_hub(hub, files)).state_dict()
    for key, tensor in safetensors.torch.load(whole["model.safetensors"]).items():
        assert torch.equal(loaded[key], tensor)


def test_what_was_downloaded_is_used_without_the_hub(hub, tmp_path, monkeypatch):
    name = on_the_hub(hub, files_of_timm(tmp_path / "a"))
    folder = checkpoint_folder(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert checkpoint_folder(name) == folder
    load_network(name, ABC)
    with pytest.raises(ValueError, match="model 'me/other' is no folder, and the Hub cannot be reached"):
        load_network("me/other", ABC)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_checkpoint_that_names_its_classes_is_not_given_others_silently(tmp_path, recwarn, library):
    if library == "timm":
        save_network(tmp_path / "net", seed=0)
        config = json.loads((file := tmp_path / "net" / "config.json").read_text()) | {"label_names": ABC}
        file.write_text(json.dumps(config))
    else:
        sizes = {"depths": [1, 1], "hidden_sizes": [8, 8], "embedding_size": 8}
        config = ResNetConfig(**sizes, id2label=dict(enumerate(ABC)), label2id={name: i for i, name in enumerate(ABC)})
        ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    folder = str(tmp_path / "net")

    class Photos:
        def __init__(self, *classes: str) -> None:
            self.classes = classes

    for load in (load_network, lambda name, classes: network_to_train(name, Photos(*classes))):
        load(folder, ABC)
        assert not [warning for warning in recwarn if "class " in str(warning.message)]
        with pytest.raises(
            ValueError, match="class 1 is 'bee' for .*net', and 'cat' in the dataset: .* another order"
        ):
            load(folder, ["ant", "cat", "bee"])
        with pytest.warns(UserWarning, match="class 2 is 'cat' for the model .*net', and 'kitten' in the dataset"):
            load(folder, ["ant", "bee", "kitten"])
        recwarn.clear()
    assert network_to_train(folder, Photos("one", "two")) is not None  # refused where labels meet the classifier


# ---- failures ----


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/models", 500, "'me/net' cannot be downloaded: the Hub answers 500; try again later"),
        ("resolve", 500, "'me/net' cannot be downloaded: the Hub answers 500; try again later"),
        ("lfs", 403, "'me/net' cannot be downloaded: the Hub answers 403; run `hf auth login` with a token"),
        ("/api/models", None, "'me/net' is no folder, and the Hub cannot be reached: Server disconnected"),
    ],
)
def test_a_download_that_fails_ends_in_one_message_and_a_second_one_completes(
    hub, tmp_path, path: str, status: int | None, message: str
):
    name = on_the_hub(hub, files_of_timm(tmp_path / "a"))
    for method in ("GET", "HEAD"):
        hub.fail(method, path, status)
    with pytest.raises(ValueError, match=message):
        load_network(name, ABC)
    hub.failures.clear()
    load_network(name, ABC)


@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c", "me/net@a@b"])
def test_a_name_that_is_not_on_the_hub_is_refused(hub, name: str):
    with pytest.raises(ValueError, match="model is '.*(neither a folder nor on the Hub|has no revision)"):
        load_checkpoint(name)


def test_a_repository_without_a_configuration_is_refused(hub, tmp_path):
    name = on_the_hub(hub, {"README.md": b"nothing"})
    with pytest.raises(ValueError, match="model 'me/net' has no config.json on the Hub"):
        load_checkpoint(name)


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_a_configuration_that_is_none_is_refused(hub, tmp_path, content: bytes):
    name = on_the_hub(hub, files_of_timm(tmp_path / "a") | {"config.json": content})
    with pytest.raises(ValueError, match="config.json (cannot be read|holds a list)"):
        load_checkpoint(name)


# ---- files that do not fit each other ----


def wrapper_of_transformers(folder: Path) -> dict[str, bytes]:
    """A folder as transformers writes it, which timm cannot read."""
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def changed_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    assert name in weights
    weights = {key: value for key, value in weights.items() if key != name}
    safetensors.torch.save_file(weights | ({} if tensor is None else {name: tensor}), file, metadata={"format": "pt"})


BACKBONES = [
    (files_of_timm, "layer1.0.conv1.weight"),
    (files_of_transformers, "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"),
    (wrapper_of_transformers, "timm_model.layer1.0.conv1.weight"),
]


@pytest.mark.parametrize(("files_of", "name"), BACKBONES)
@pytest.mark.parametrize("tensor", [None, torch.zeros(5, 3, 1, 1)], ids=["missing", "mis-shaped"])
@pytest.mark.parametrize("class_names", [None, ["ant", "bee"], ["ant", "bee", "cat"]], ids=["own", "2", "3"])
def test_a_backbone_that_its_weights_lack_is_never_filled_in_at_random(tmp_path, files_of, name, tensor, class_names):
    files_of(tmp_path)
    changed_weights(tmp_path, name, tensor)
    with pytest.raises(ValueError, match=name.removeprefix("timm_model.")):
        load_checkpoint(str(tmp_path), class_names)


@pytest.mark.parametrize("files_of", [files_of_timm, files_of_transformers, wrapper_of_transformers])
def test_only_the_classifier_is_made_anew_for_other_classes(tmp_path, files_of):
    weights = safetensors.torch.load(files_of(tmp_path)["model.safetensors"])
    found = create_network(str(tmp_path), ["ant", "bee"], {}).state_dict()
    assert found.keys() == weights.keys()
    anew = {name for name, tensor in weights.items() if not torch.equal(found[name], tensor)}
    assert {name.rpartition(".")[0] for name in anew} <= {"fc", "classifier.1", "timm_model.fc"}
    assert len(anew) == 2


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("vit", {"classifier"}),
        ("cvt", {"layernorm", "classifier"}),
        ("siglip", {"classifier"}),
        ("clip", {"classifier"}),
        ("hgnet_v2", {"fc"}),
        ("pp_lcnet", {"head"}),
    ],
)
def test_the_classifier_of_a_transformers_model_is_told_from_its_backbone(kind: str, heads: set[str]):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(CONFIG_MAPPING[kind]())
    assert {name.partition(".")[0] for name in head_parameters(model)} == heads


@pytest.mark.parametrize(("files_of", "value"), [(files_of_timm, float("nan")), (files_of_transformers, float("inf"))])
def test_weights_that_are_not_finite_are_refused(tmp_path, files_of, value):
    files_of(tmp_path)
    name = next(n for f, n in BACKBONES if f is files_of)
    tensor = safetensors.torch.load_file(tmp_path / "model.safetensors")[name]
    tensor.view(-1)[3] = value
    changed_weights(tmp_path, name, tensor)
    for load in (load_checkpoint, lambda model: load_network(model, ABC)):
        with pytest.raises(ValueError, match=f"the weights of {tmp_path} hold NaN or infinite values in {name};"):
            load(str(tmp_path))


def changed_config(folder: Path, files_of, changes: dict) -> str:
    files_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


QUANTISED = ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(quantization_config\)")


@pytest.mark.parametrize(
    ("files_of", "changes", "message"),
    [
        (files_of_timm, {"architecture": 7}, "config.json has architecture 7; expected the name of a timm model"),
        (files_of_timm, {"architecture": "resnet19"}, r"Unknown model \(resnet19\)"),
        (files_of_timm, {"num_classes": "ten"}, "config.json has num_classes 'ten'; expected a number of classes"),
        (files_of_timm, {"model_args": [1]}, r"config.json has model_args \[1\]; expected arguments by name"),
        (files_of_timm, {"model_args": {"foo": 1}}, "TypeError: .* unexpected keyword argument 'foo'"),
        (files_of_timm, {"pretrained_cfg": 7}, "config.json has pretrained_cfg 7; expected values by name"),
        (files_of_timm, {"label_names": 7}, "config.json has label_names 7; expected the names of the classes"),
        (files_of_timm, *QUANTISED),
        (files_of_transformers, *QUANTISED),
        (files_of_transformers, {"num_labels": "ten"}, "config.json has num_labels 'ten'; expected a number"),
        (files_of_transformers, {"id2label": ["a"]}, r"config.json has id2label \['a'\]; expected names of classes"),
        (files_of_transformers, {"id2label": {"a": "b"}}, "invalid literal for int"),
        (files_of_transformers, {"hidden_sizes": None}, "cannot be loaded: TypeError: .*; its config.json and its"),
        (files_of_transformers, {"hidden_act": "nonesuch"}, "KeyError: 'nonesuch'; its config.json"),
        (files_of_transformers, {"depths": "abc"}, "Field 'depths' with value 'abc'"),
    ],
)
def test_a_configuration_of_wrong_types_ends_in_one_sentence(tmp_path, files_of, changes, message):
    model = changed_config(tmp_path, files_of, changes)
    loads = [load_checkpoint]
    if files_of is files_of_timm:
        loads += [accepted_arguments, lambda model: create_network(model, ["ant", "bee"], {})]
    for load in loads:
        with pytest.raises(ValueError, match=message) as raised:
            load(model)
        assert "\n" not in str(raised.value)
        assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("content", ["{", '{"image_processor_type": 7}', '{"image_processor_type": "Nonesuch"}'])
def test_a_damaged_image_processor_is_not_taken_for_none(tmp_path, content):
    files_of_transformers(tmp_path)
    assert image_processor(str(tmp_path)) is None
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match="preprocessor_config.json cannot be loaded"):
        image_processor(str(tmp_path))


# ---- what a repository must not do ----


@pytest.mark.parametrize(
    ("files_of", "settings"),
    [
        (files_of_transformers, {}),
        (files_of_timm, {}),
        (files_of_timm, {"hf_hub_filename": "pytorch_model.bin", "custom_load": "hf"}),
    ],
)
def test_no_pickle_of_the_hub_is_downloaded_or_read(hub, tmp_path, files_of, settings: dict):
    torch.save({"weight": Bomb(tmp_path / "exploded")}, tmp_path / "pickle")
    files = files_of(tmp_path / "a") | {"pytorch_model.bin": (tmp_path / "pickle").read_bytes()}
    config = json.loads(files["config.json"])
    if settings:
        config["pretrained_cfg"] |= settings
    files |= {"config.json": json.dumps(config).encode()}
    load_checkpoint(on_the_hub(hub, files))  # of the safetensors
    with pytest.raises(ValueError, match="'me/net' has no model.safetensors on the Hub; .* can hold code"):
        load_checkpoint(on_the_hub(hub, without_weights(files)))
    assert not any(".bin" in request for request in hub.requests)
    assert not (tmp_path / "exploded").exists()


def test_no_code_of_the_hub_is_run(hub, tmp_path):
    files = files_of_transformers(tmp_path / "a")
    config = json.loads(files["config.json"])
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()".encode()
    own = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    config |= {"model_type": "evil", "auto_map": own}
    files |= {"evil.py": code, "config.json": json.dumps(config).encode()}
    with pytest.raises(ValueError, match="'me/net' needs code of its own repository, which is not run"):
        load_checkpoint(on_the_hub(hub, files))
    config |= {"model_type": "resnet"}  # transformers has its own code, which is taken
    files |= {"config.json": json.dumps(config).encode()}
    assert type(load_checkpoint(on_the_hub(hub, files))) is ResNetForImageClassification
    assert not (tmp_path / "ran").exists()
    assert not any("evil.py" in request for request in hub.requests)


def test_an_image_processor_with_code_of_its_own_is_not_run(hub, tmp_path):
    processor = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()".encode()
    files = files_of_transformers(tmp_path / "a")
    files |= {"evil.py": code, "preprocessor_config.json": json.dumps(processor).encode()}
    name = on_the_hub(hub, files)
    with pytest.raises(ValueError, match="evil|Evil|custom code"):
        image_processor(name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "evil", ["../evil.json", "../../../../../evil.safetensors", "/evil.json", "a/../../evil.json"]
)
def test_a_file_name_that_leads_out_of_the_folder_is_not_followed(hub, tmp_path, monkeypatch, evil: str):
    cache = tmp_path / "1" / "2" / "3"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    files = files_of_timm(tmp_path / "a")
    load_network(on_the_hub(hub, files | {evil: b"evil"}), ABC)
    assert [file for file in tmp_path.rglob("*") if "evil" in file.name] == []
    assert not any("evil" in request for request in hub.requests)
    assert not Path("/evil.json").exists()


@pytest.mark.parametrize("evil", ["../../../secret.safetensors", "/secret.safetensors", "secret.bin"])
def test_an_index_that_leads_out_of_the_folder_is_refused(hub, tmp_path, evil: str):
    files = without_weights(files_of_transformers(tmp_path / "a"))
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": {"x": evil}}).encode()
    with pytest.raises(ValueError, match=f"index.json names '{evil}', which is no safetensors file of its folder"):
        load_checkpoint(on_the_hub(hub, files))


def test_nothing_trusts_code_or_pickles_from_elsewhere():
    root = Path(__file__).parents[2]
    sources = [
        file for folder in ("gradaug_hf", "recipes", "benchmarks", "docs") for file in root.glob(f"{folder}/**/*.py")
    ]
    assert len(sources) > 30
    for file in sources:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("trust_remote_code", "False") == "False", f"{file}: {name}"
            assert name not in ("pickle.load", "pickle.loads", "joblib.load"), f"{file}: {name}"
            if name == "torch.load":
                assert given.get("weights_only") == "True", f"{file}: {name}"


@pytest.mark.parametrize("name", ["wrn16_2", "deit_tiny_distilled_patch16_224"])
def test_a_model_accepts_what_its_constructor_passes_on_to_that_of_its_base_class(name: str):
    assert "drop_path_rate" in accepted_arguments(name)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"do_normalize": False}, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
    ],
)
def test_pixels_are_normalised_as_by_the_processor_of_a_model(settings, expected):
    config = ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[4, 4, 4, 4], embedding_size=4)
    model = ResNetForImageClassification(config)
    found = pixel_statistics(model, ViTImageProcessor(**settings))
    assert (found["mean"], found["std"]) == expected
    assert pixel_statistics(model, None) == {}

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from torch import nn
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from gradaug_hf import GradAugConfig, GradAugTrainer, SubnetSampler
from gradaug_hf.reports.history import Evaluation
from gradaug_hf.reports.model_card import CARD, GENERATED, CardMetadata, DataName, ModelFacts, write_model_card
from gradaug_hf.trainer.metrics import topk_accuracy

SIDE = 32
TOKEN = "hf_" + "aB3" * 11


def rows(count: int, channels: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(channels, SIDE, SIDE, generator=generator), "labels": i % 3} for i in range(count)
    ]


def top1_and_top5(prediction: EvalPrediction) -> dict[str, float]:
    """Both accuracies, of three classes too, among which every label is one of the best five."""
    return topk_accuracy(prediction) | {"top5": 1.0}


def trainer_of(model: nn.Module, folder: Path, channels: int = 3, **settings: Any) -> GradAugTrainer:
    arguments = {name: settings.pop(name) for name in ("subnet_sampler", "processing_class") if name in settings}
    defaults = {
        "max_steps": 2,
        "num_subnets": 2,
        "min_width": 0.5,
        "resolutions": [32, 24],
        "per_device_train_batch_size": 4,
        "learning_rate": 0.125,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return GradAugTrainer(
        model,
        GradAugConfig(str(folder), **{**defaults, **settings}),
        train_dataset=rows(8, channels),
        eval_dataset=rows(5, channels),
        compute_metrics=top1_and_top5,
        **arguments,
    )


def network(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3, **settings)


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8, num_labels=3, num_channels=3)
    )


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / CARD)


def run_code(folder: Path, monkeypatch, **names: Any) -> list[dict]:
    """Run the Python blocks of a card as a reader does who has its folder and a photo."""
    monkeypatch.chdir(folder.parent)
    Image.effect_mandelbrot((48, 40), (-2, -1, 1, 1), 50).save("photo.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```$", card_in(folder).text, flags=re.DOTALL | re.MULTILINE)
    namespaces = []
    for block in blocks:
        namespaces.append(dict(names))
        exec(compile(block, CARD, "exec"), namespaces[-1])
    return namespaces


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> GradAugTrainer:
    """A trainer after two steps, each evaluated at two widths, with a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("machine") / "run"
    trainer = trainer_of(
        network(),
        folder,
        eval_widths=[0.5],
        save_strategy="steps",
        save_steps=1,
        hub_token=TOKEN,
        seed=7,
    )
    trainer.card_metadata = {"dataset": "some/flowers", "dataset_args": "small", "license": "apache-2.0"}
    trainer.train()
    trainer.save_model()
    return trainer


def test_metrics_are_listed_in_the_schema_of_the_hub(trained):
    data = card_in(Path(trained.args.output_dir)).data
    (last,) = [e for e in trained.evaluations if e.step == 2 and e.width == 1]
    common = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": "some/flowers",
        "dataset_name": "some/flowers",
        "dataset_config": "small",
        "dataset_args": {"num_images": 5},
    }
    assert data.eval_results == [
        EvalResult(**common, metric_type="accuracy", metric_name="Top-1 accuracy", metric_value=last.metrics["top1"]),
        EvalResult(**common, metric_type="top_5_accuracy", metric_name="Top-5 accuracy", metric_value=1.0),
    ]
    index = data.to_dict()["model-index"]
    assert model_index_to_eval_results(index) == ("run", data.eval_results)
    assert eval_results_to_model_index("run", data.eval_results) == index


def test_metadata_name_the_libraries_the_task_and_the_data(trained):
    data = card_in(Path(trained.args.output_dir)).data
    assert data.library_name == "timm"
    assert data.tags == ["image-classification", "timm", "transformers", "gradaug"]
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["some/flowers"]
    assert data.license == "apache-2.0"


def test_card_shows_settings_and_measurements_of_the_run(trained):
    text = card_in(Path(trained.args.output_dir)).text
    seconds = next(entry["train_runtime"] for entry in trained.state.log_history if "train_runtime" in entry)
    for cells in (
        ("sub-networks of a step", "2"),
        ("width multipliers", r"0\.5, and 1 sampled in \[0\.5, 1\]"),
        ("resolutions", "32 24"),
        ("images", "8 of some/flowers"),
        ("steps", "2"),
        ("epochs", "1"),
        ("images in a step", "4"),
        ("optimiser", r"AdamW, highest learning rate 0\.125, weight decay 0\.0, betas \(0\.9, 0\.999\)"),
        ("seed", "7"),
        ("time since .*", re.escape(f"{seconds:.1f} s")),
        ("hardware", r".+, \d+ threads?"),
        ("timm", re.escape(timm.__version__)),
    ):
        assert re.search(r"^\| *" + r" *\| *".join(cells) + r" *\|$", text, flags=re.MULTILINE), cells
    assert "arxiv.org/abs/2006.07989" in text
    assert "@inproceedings{yang2020gradaug" in text


def test_card_shows_the_accuracy_at_each_width_that_was_measured(trained):
    text = card_in(Path(trained.args.output_dir)).text
    full, narrow = sorted((e for e in trained.evaluations if e.step == 2), key=lambda e: -e.width)
    assert "Measured on 5 images of some/flowers, after 2 steps of training." in text
    for evaluation, width in ((full, "1"), (narrow, r"0\.5")):
        accuracy = re.escape(f"{100 * evaluation.metrics['top1']:.2f}")
        assert re.search(rf"^\| {width} +\| +[\d.]+ \| +{accuracy} \| +100\.00 \|$", text, flags=re.MULTILINE)


def test_card_shows_the_pictures_that_are_there(trained):
    folder = Path(trained.args.output_dir)
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", card_in(folder).text, flags=re.MULTILINE)
    assert pictures == ["plots/curves.png", "plots/widths.png", "plots/subnets.png"]
    for picture in pictures:
        with Image.open(folder / picture) as image:
            assert image.format == "PNG"


def test_card_of_a_checkpoint_tells_what_was_measured_until_then(trained, monkeypatch):
    folder = Path(trained.args.output_dir) / "checkpoint-1"
    card = card_in(folder)
    (first,) = [e for e in trained.evaluations if e.step == 1 and e.width == 1]
    assert card.data.eval_results[0].metric_value == first.metrics["top1"]
    assert "after 1 steps of training" in card.text
    assert "![" not in card.text
    assert "time since" not in card.text
    assert len(run_code(folder, monkeypatch)) == 3


def test_code_for_timm_transformers_and_a_pipeline_gives_the_networks_probabilities(trained, monkeypatch):
    by_timm, by_transformers, _ = run_code(Path(trained.args.output_dir), monkeypatch)
    with torch.no_grad():
        expected = trained.model.eval()(by_timm["pixels"]).softmax(-1)
    assert torch.equal(by_timm["probabilities"], expected)
    assert torch.equal(by_transformers["probabilities"], expected)


def test_card_of_another_loop_than_the_trainers_shows_the_facts_that_it_is_given(tmp_path):
    facts = ModelFacts(
        name="net",
        architecture="resnet18",
        num_parameters=1234,
        data=DataName(hub_id="some/flowers", config="small", split="test"),
        train_images=8,
        eval_images=5,
        measured=[Evaluation(7, 1.0, {"loss": 0.5, "top1": 0.25})],
        steps=7,
        subnets={"width multipliers": "0.5"},
        training={"seed": "3"},
    )
    write_model_card(tmp_path, facts, CardMetadata(license="mit"))
    card = card_in(tmp_path)
    assert card.data.license == "mit"
    assert [result.metric_value for result in card.data.eval_results] == [0.25]
    assert (
        "`resnet18` with 1,234 parameters, trained on "
        "[some/flowers](https://huggingface.co/datasets/some/flowers) with [GradAug]" in card.text
    )
    assert "Measured on 5 images of some/flowers, split test, after 7 steps of training." in card.text
    for cells in (("width multipliers", r"0\.5"), ("images", "8 of some/flowers"), ("seed", "3")):
        assert re.search(r"^\| *" + r" *\| *".join(cells) + r" *\|$", card.text, flags=re.MULTILINE), cells


def test_a_local_folder_that_training_began_with_is_named_and_not_linked(tmp_path):
    (tmp_path / "earlier-net").mkdir()
    facts = ModelFacts(
        name="net", architecture="resnet18", num_parameters=1, steps=7, base=str(tmp_path / "earlier-net")
    )
    write_model_card(tmp_path, facts, CardMetadata())
    card = card_in(tmp_path)
    assert "fine-tuned from the local folder `earlier-net`, trained" in card.text
    assert "huggingface.co/earlier-net" not in card.text
    assert card.data.base_model is None


def test_neither_tokens_nor_folders_of_the_machine_are_on_the_card(trained, tmp_path, monkeypatch):
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "train.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--hub_token", TOKEN, "--output_dir", str(tmp_path / "out")])
    trained.create_model_card(dataset=str(tmp_path), model_name="flowers-net")
    content = (Path(trained.args.output_dir) / CARD).read_text()
    assert "\ntrain.py --output_dir out\n" in content
    assert f"trained on {tmp_path.name} with" in content
    for secret in (TOKEN, str(tmp_path), str(Path(trained.args.output_dir).parent), str(Path.home()) + "/"):
        assert secret not in content
    data = ModelCard(content).data
    assert data.datasets is None
    assert (data.eval_results[0].dataset_type, data.eval_results[0].dataset_name) == ("local", tmp_path.name)


def test_card_of_a_network_of_transformers_has_no_lines_of_timm(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer = trainer_of(resnet(), folder, processing_class=ViTImageProcessor(size={"height": SIDE, "width": SIDE}))
    trainer.train()
    trainer.save_model()
    card = card_in(folder)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["image-classification", "transformers", "gradaug"]
    assert "timm" not in re.sub(r"^\| timm .*$", "", card.text, flags=re.MULTILINE)
    assert card.data.eval_results is None  # the data set has no name
    assert "top-1 accuracy" in card.text
    by_transformers, _ = run_code(folder, monkeypatch)
    with torch.no_grad():
        expected = trainer.model.eval()(**by_transformers["inputs"]).logits.softmax(-1)
    assert torch.equal(by_transformers["probabilities"], expected)


def test_card_of_a_network_without_a_processor_shows_how_to_load_it_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer_of(resnet(), folder).save_model()
    (by_transformers,) = run_code(folder, monkeypatch)
    assert by_transformers["probabilities"].shape == (1, 3)


def test_card_of_a_network_for_other_channels_loads_it_too(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer_of(network(in_chans=1), folder, channels=1, num_subnets=0).save_model()
    by_timm, by_transformers = run_code(folder, monkeypatch)
    assert by_timm["probabilities"].shape == by_transformers["probabilities"].shape == (1, 3)


def test_card_of_a_hand_made_network_loads_its_weights(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 3))
    folder = tmp_path / "run"
    trainer_of(model, folder, num_subnets=0).save_model()
    card = card_in(folder)
    assert card.data.library_name is None
    assert "state dict of a `Sequential`" in card.text
    empty = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 3))
    run_code(folder, monkeypatch, model=empty)
    assert torch.equal(empty[1].weight, model[1].weight)


def test_code_for_an_architecture_of_this_package_imports_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer_of(timm.create_model("resnet20_cifar", num_classes=3), folder).save_model()
    assert all("import gradaug_hf" in block for block in card_in(folder).text.split("```python")[1:])
    assert len(run_code(folder, monkeypatch)) == 3


def test_nothing_is_said_of_a_training_that_was_not(tmp_path):
    trainer = trainer_of(network(), tmp_path / "run")
    trainer.save_model()
    text = card_in(tmp_path / "run").text
    assert "It was saved without training." in text
    for heading in ("## Results", "## GradAug", "## Training", "Command:"):
        assert heading not in text
    assert card_in(tmp_path / "run").data.tags == ["image-classification", "timm", "transformers"]


def test_plain_training_is_not_called_gradaug(tmp_path):
    trainer = trainer_of(network(), tmp_path / "run", num_subnets=0, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = card_in(tmp_path / "run")
    assert "gradaug" not in card.data.tags
    assert "trained without sub-networks" in card.text
    assert "## GradAug" not in card.text


def test_sampler_of_the_caller_is_named_instead_of_settings_that_had_no_effect(tmp_path):
    class Narrow(SubnetSampler):
        pass

    trainer = trainer_of(network(), tmp_path / "run", max_steps=1, subnet_sampler=Narrow(1, 0.5, resolutions=[32]))
    trainer.train()
    trainer.save_model()
    text = card_in(tmp_path / "run").text
    assert re.search(r"\| sub-networks +\| sampled by a Narrow +\|", text)
    assert "width multipliers" not in text


def test_results_of_the_best_checkpoint_are_shown_where_it_was_loaded(tmp_path):
    trainer = trainer_of(
        network(),
        tmp_path / "run",
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_steps_per_second",
    )
    trainer.train()
    best = trainer.state.best_global_step
    trainer.save_model()
    assert f"after {best} steps of training" in card_in(tmp_path / "run").text


def test_evaluations_on_other_data_are_not_called_those_of_the_evaluation_set(tmp_path):
    trainer = trainer_of(network(), tmp_path / "run", eval_widths=[0.5])
    trainer.evaluate()
    own = trainer.evaluations
    trainer.evaluate(rows(2))
    assert trainer.evaluations == own
    assert [e.width for e in own] == [1.0, 0.5]


def test_a_card_that_was_edited_is_kept_and_a_generated_one_is_renewed(tmp_path):
    folder = tmp_path / "run"
    trainer = trainer_of(network(), folder)
    trainer.save_model()
    trainer.create_model_card(model_name="renewed")
    file = folder / CARD
    assert "# renewed" in file.read_text()
    edited = file.read_text().replace(GENERATED, "Mine")
    file.write_text(edited)
    trainer.save_model()
    assert file.read_text() == edited


def test_dataset_is_named_as_it_remembers_its_download(tmp_path):
    trainer = trainer_of(network(), tmp_path / "run")
    data = Dataset.from_list([{"labels": 0}] * 5, split="test")
    data.info.download_checksums = {"hf://datasets/some/flowers@0123abc/data/test.parquet": {}}
    data.info.config_name = "small"
    trainer.evaluate()
    trainer.eval_dataset = data
    trainer.create_model_card()
    (result, _) = card_in(tmp_path / "run").data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("some/flowers", "small", "test")
    trainer.train_dataset = data  # the evaluation images were held out of the training split
    trainer.create_model_card()
    assert card_in(tmp_path / "run").data.eval_results[0].dataset_split is None


def test_training_without_matplotlib_ends_well_and_says_what_plots_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trainer = trainer_of(network(), tmp_path / "run", max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match="plots need matplotlib: pip install matplotlib"):
        trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "plots").exists()
    assert "![" not in card_in(tmp_path / "run").text

import pytest
import torch

from gradaug_hf.experiments.arguments import RecipeParser
from gradaug_hf.experiments.evaluation.evaluation import (
    Evaluation,
    EvaluationArguments,
    check_plots,
    short_names,
    topk_hits,
)
from tests.helpers.checkpoints import save_images, save_network


def test_hits_are_those_of_the_best_and_of_the_five_best():
    rising = torch.arange(6.0)
    logits = torch.stack([rising, rising, rising.flip(0)])
    assert topk_hits(logits, torch.tensor([5, 0, 4])).tolist() == [[True, True], [False, False], [False, True]]
    assert topk_hits(logits[:, :2], torch.tensor([1, 0, 0])).tolist() == [[True, True], [False, True], [True, True]]


def test_logits_that_are_nan_are_no_hits():
    with pytest.raises(ValueError, match="logits are NaN, so that no class is the largest"):
        topk_hits(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]))


def test_networks_may_be_given_in_one_flag_or_in_several():
    flags = ["--dataset_name", "photos", "--model", "a", "--model", "b", "c"]
    (args,) = RecipeParser(EvaluationArguments).parse_args_into_dataclasses(flags)
    assert args.model == ["a", "b", "c"]


def test_folders_are_called_by_their_last_part_where_it_tells_them_apart(tmp_path):
    folders = [tmp_path / "one/net", tmp_path / "two/net", tmp_path / "ours"]
    for folder in folders:
        folder.mkdir(parents=True)
    names = [*map(str, folders), "timm/resnet50.a1_in1k"]
    assert list(short_names(names).values()) == [*names[:2], "ours", "timm/resnet50.a1_in1k"]


def test_accuracy_counts_each_image_once_whatever_the_batches(tmp_path):
    model = save_network(tmp_path / "net", seed=0)
    photos = save_images(tmp_path / "photos", of_each_class=3)
    found = []
    for batch_size in (2, 9):
        settings = {"model": [model], "dataset_name": photos, "num_workers": 0, "output_dir": str(tmp_path)}
        args = EvaluationArguments(batch_size=batch_size, **settings)
        evaluation = Evaluation(args, [model])
        found.append(evaluation.accuracies(evaluation.models, evaluation.images("eval"), "")[model])
    images = evaluation.images("eval")
    pixels = torch.stack([images[index]["pixel_values"] for index in range(9)]) / 255
    labels = torch.tensor([images[index]["labels"] for index in range(9)])
    expected = (evaluation.models[model](pixels).argmax(1) == labels).double().mean().item()
    assert found == [(pytest.approx(expected), None)] * 2  # of three classes


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gradaug_hf.experiments.evaluation.evaluation.can_plot", lambda: False)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        check_plots()

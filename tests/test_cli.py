import re
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gradaug_hf import cli
from gradaug_hf.cli import main
from gradaug_hf.experiments.recipes import RECIPES
from gradaug_hf.version import __version__


def ending(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The line with which a command ends that cannot do its work."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err if isinstance(ended.value.code, int) else f"{ended.value.code}\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    listed = re.findall(r"^    ([a-z-]+)\s", printed, re.MULTILINE)
    assert listed == ["train", "fine-tune", "predict", "report", "convert", "results", "sweep"]


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_report_is_printed_with_the_counts_at_a_width(capsys):
    main(["report", "test_resnet", "--width", "0.5"])
    printed = capsys.readouterr().out
    assert "sliced: 100.0% of the multiply-adds" in printed
    assert "width 0.5:" in printed


def test_train_hands_the_flags_to_the_recipe(monkeypatch):
    called = []
    monkeypatch.setattr("gradaug_hf.experiments.run.run", lambda *given: called.append(given))
    monkeypatch.setattr("gradaug_hf.detection.experiment.run", lambda *given: called.append(given))
    main(["train", "cifar_wideresnet", "run.yaml", "--seed", "1", "--help"])
    main(["train", "coco_maskrcnn", "--gradaug"])
    assert called == [(RECIPES["cifar_wideresnet"], ["run.yaml", "--seed", "1", "--help"]), (["--gradaug"],)]


def test_train_names_every_recipe():
    assert set(cli.RECIPES) == {*RECIPES, "coco_maskrcnn"}


def test_help_of_a_recipe_has_its_flags_then_those_of_gradaug_then_the_trainers(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "imagenet_resnet50", "--help"])
    usage, rest = capsys.readouterr().out.split("\n\n", 1)
    assert usage == "usage: [SETTINGS.yaml] [--FLAG VALUE ...]"
    places = [
        rest.index(words)
        for words in ("\nthe recipe:", "  --method {baseline,", "\nGradAug:", "  --num_subnets ", "\nthe Trainer of ")
    ]
    assert places == sorted(places)
    trainers = rest[places[-1] :]
    assert "  --learning_rate " in trainers and "  --num_subnets " not in trainers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "resnet51"], "timm has no architecture 'resnet51'; near it: "),
        (["report", "test_resnet", "--width", "1.5"], "width is 1.5"),
        (["report", "test_resnet", "--input_size", "0"], "input_size is 0"),
        (["report", "test_resnet", "--width", "half"], "argument --width: invalid float value: 'half'"),
        (["report", "test_resnet", "--widht", "0.5"], "--widht is no flag; near it: --width"),
        (["report", "test_resnet", "twice"], "twice follows no flag that takes it"),
        (["results", "."], "holds no results.json"),
        (["trian"], "argument COMMAND: invalid choice: 'trian' (choose from "),
        ([], "the following arguments are required: COMMAND"),
        (["train", "resnet"], "argument RECIPE: invalid choice: 'resnet' (choose from "),
        (["train", "cifar_wideresnet", "--nm_subnets", "2"], "--nm_subnets is no flag; near it: --num_subnets"),
        (["train", "cifar_wideresnet", "--zzz"], "--zzz is no flag; --help lists them"),
        (["train", "cifar_wideresnet", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["train", "cifar_wideresnet", "--min_width", "0"], "min_width is 0.0; it must lie in"),
        (["train", "coco_maskrcnn", "--flip", "2"], "flip is 2.0; it must be in [0, 1]"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml cannot be read as YAML or JSON"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, words: list[str], message: str):
    line = ending(capsys, *words)
    assert line.startswith("error: ") and message in line and line.count("\n") == 1, line


def test_a_terminal_shows_the_line_in_red(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert ending(capsys, "results", ".").startswith("\033[1;31merror: ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert ending(capsys, "results", ".").startswith("error: ")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("words", [["results", "."], ["results", "--folder", "."]])
def test_torch_s_launcher_ends_its_own_lines_with_that_of_any_process(capsys, monkeypatch, tmp_path, rank, words):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    line = ending(capsys, *words)
    monkeypatch.setenv("RANK", rank)
    ending(capsys, *words)
    failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=1, error_file=str(file))
    assert f"{failure.message}\n" == line
    assert abs(failure.timestamp - time.time()) < 600


def test_of_several_processes_the_first_alone_speaks_of_a_wrong_flag(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ending(capsys, "results", "--folder", ".") == ""

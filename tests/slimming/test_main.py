import pytest

from gradaug_hf.slimming.__main__ import main


def test_prints_the_report_and_the_counts_at_a_width(capsys):
    main(["test_resnet", "--width", "0.5"])
    printed = capsys.readouterr().out
    assert "sliced: 100.0% of the multiply-adds" in printed
    assert "width 0.5:" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "timm has no architecture 'resnet51'; near it: "),
        (["test_resnet", "--width", "1.5"], "width is 1.5"),
        (["test_resnet", "--input_size", "0"], "input_size is 0"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err

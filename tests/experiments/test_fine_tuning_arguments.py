import pytest

from gradaug_hf.experiments.fine_tuning_arguments import parse

LINE = "--model backbone --dataset_name photos --use_cpu"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", 5e-4),
        ("--batch_size 128", 1e-3),
        ("--batch_size 8", 2.5e-4),
        ("--batch_size 8 --learning_rate 3e-4", 3e-4),
    ],
)
def test_learning_rate_grows_with_the_root_of_the_batch_unless_given(flags: str, expected: float):
    _, config, _ = parse(f"{LINE} {flags}".split())
    assert config.learning_rate == pytest.approx(expected)


def test_defaults_are_those_of_fine_tuning():
    args, config, _ = parse(LINE.split())
    assert (config.optim, config.lr_scheduler_type, config.warmup_steps) == ("adamw_torch", "cosine", 0.1)
    assert (config.num_subnets, config.min_width, config.label_smoothing_factor) == (1, 0.9, 0.1)
    assert (args.layer_decay, args.batch_size, args.freeze, args.method) == (0.75, 32, "batch_norm", "gradaug")


def test_names_of_transformers_example_are_taken():
    line = (
        "--model_name_or_path m --train_dir a --validation_dir b --image_column_name i --label_column_name l --use_cpu"
    )
    args, *_ = parse(line.split())
    found = (args.model, args.train_dir, args.validation_dir, args.image_column, args.label_column)
    assert found == ("m", "a", "b", "i", "l")


def test_output_folder_names_model_data_and_seed():
    line = "--model timm/resnet50.a1_in1k --dataset_name my/photos --seed 3 --use_cpu"
    assert parse(line.split())[1].output_dir == "outputs/resnet50.a1_in1k-photos-seed3"
    assert parse(f"{line} --compare".split())[1].output_dir == "outputs/resnet50.a1_in1k-photos-compared"


def test_runs_of_a_comparison_share_the_settings_that_are_given():
    flags = "--compare --seeds 5 --seed 1 --output_dir out --launch python --min_width 0.8 --num_train_epochs 3"
    _, config, comparison = parse(f"{LINE} {flags}".split())
    assert comparison.settings == {
        "model": "backbone", "dataset_name": "photos", "use_cpu": True, "min_width": 0.8, "num_train_epochs": 3.0,
    }  # fmt: skip
    assert (comparison.seeds, comparison.launch, config.seed) == (5, "python", 1)


def test_a_frozen_backbone_has_no_sub_networks():
    args, config, _ = parse(f"{LINE} --freeze backbone".split())
    assert (config.num_subnets, args.method) == (0, "plain")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--model m",
            "dataset_name or train_dir names the photos to train on, but neither is given; give one of them",
        ),
        ("--model m --dataset_name a --train_dir b", "but both are given"),
        ("--model m --dataset_name a --validation_dir b", "validation_dir is 'b' without train_dir"),
        (f"{LINE} --freeze backbone --num_subnets 2", "freeze is 'backbone' and num_subnets is 2"),
        (f"{LINE} --layer_decay 0", "layer_decay is 0.0; it must be in (0, 1]"),
        (f"{LINE} --ema_decay 1", "ema_decay is 1.0; it must be in (0, 1)"),
        (f"{LINE} --hflip 2", "hflip is 2.0; it must be in [0, 1]"),
        (f"{LINE} --random_erasing -1", "random_erasing is -1.0; it must be in [0, 1]"),
        (f"{LINE} --crop_pct 0", "crop_pct is 0.0; it must be in (0, 1]"),
        (f"{LINE} --crop_pct 80", "crop_pct is 80.0; it must be in (0, 1]"),
        (f"{LINE} --image_size 0", "image_size is 0; it must be at least 1"),
        (f"{LINE} --max_train_samples 0", "max_train_samples is 0; it must be at least 1"),
        (f"{LINE} --lora_rank 0", "lora_rank is 0; it must be at least 1"),
        (f"{LINE} --lora_rank 4 --freeze backbone", "lora_rank is 4; it must be left out with freeze 'backbone'"),
        (f"{LINE} --seeds 5", "seeds is 5 without compare, which it is for; add --compare"),
        (f"{LINE} --labels 5", "labels is [5] without compare"),
        (f"{LINE} --compare --seeds 0", "seeds is 0; it must be at least 1"),
        (f"{LINE} --compare --labels 10 0", "labels is [10, 0]; it must be a list of numbers of at least 1"),
        (f"{LINE} --compare --labels 10 --max_train_samples 9", "labels and max_train_samples are both given"),
        (f"{LINE} --compare --num_subnets 0", "num_subnets is 0, which trains without sub-networks, and compare is"),
        (
            f"{LINE} --compare --freeze backbone",
            "freeze is 'backbone', which trains without sub-networks, and compare",
        ),
        (f"{LINE} --compare --resume_from_checkpoint last", "resume_from_checkpoint is 'last', which concerns one"),
        (f"{LINE} --compare --preview", "preview is True, which concerns one training, and compare is True"),
        (f"{LINE} --compare --push_to_hub", "push_to_hub is True, which concerns one training"),
        (f"{LINE} --compare --overwrite_output_dir", "overwrite_output_dir is True, which concerns one training"),
    ],
)
def test_what_is_out_of_range_or_contradicts_is_refused_by_name(line: str, message: str):
    with pytest.raises(ValueError) as refused:
        parse(line.split())
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset_name photos", "the following arguments are required: --model/--model_name_or_path"),
        (f"{LINE} --freeze head", "argument --freeze: invalid choice: 'head' (choose from"),
        (f"{LINE} --class_weights 2", "argument --class_weights"),
        (
            f"{LINE} --streaming",
            "--streaming is no flag of this command: it counts the photos of each class first and shows the worst "
            "mistakes at the end; leave streaming out, or train the model on a stream with "
            "recipes/imagenet_resnet50.py --streaming --model, by its id on the Hub or its folder\n",
        ),
    ],
)
def test_a_flag_that_is_missing_or_no_choice_ends_in_one_line(capsys, line: str, message: str):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert message in capsys.readouterr().err

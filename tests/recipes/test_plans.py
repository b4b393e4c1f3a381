from pathlib import Path

import pytest

from gradaug_hf.experiments import fine_tuning_arguments
from gradaug_hf.experiments.arguments import as_flags, parse
from gradaug_hf.experiments.recipes import CIFAR_WIDERESNET
from gradaug_hf.experiments.run import SETTINGS
from gradaug_hf.experiments.sweep import read_plan

PLANS = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_the_recipe_of_a_plan_takes_the_settings_of_each_row_and_column(file: Path, tmp_path):
    plan = read_plan(file)
    runs = [run for run in plan.runs() if run.seed == plan.seeds[0]]
    assert len(runs) == len(plan.rows) * len(plan.columns)
    for run in runs:
        own = {"model": "resnet18", **run.settings} if plan.recipe.name == "fine_tune.py" else run.settings
        flags = as_flags({**own, "output_dir": str(tmp_path)})
        if plan.recipe.name == "fine_tune.py":
            _, config, _ = fine_tuning_arguments.parse(flags)
        else:
            _, config = parse({**SETTINGS, **CIFAR_WIDERESNET.settings}, CIFAR_WIDERESNET.methods, None, flags)
        trains_plainly = run.settings.get("num_subnets") == 0 or run.settings.get("method") in ("baseline", "cutmix")
        assert (config.num_subnets == 0) == trains_plainly, run.row


def test_the_first_row_of_a_plan_is_plain_training():
    assert len(PLANS) >= 6
    for file in PLANS:
        first = next(iter(read_plan(file).rows.values()))
        assert first in ({"method": "baseline"}, {"num_subnets": 0}), file.name

from gradaug_hf.reports.history import Evaluation, at_step, evaluations, shares, title, training_log

HISTORY = [
    {"loss": 2.5, "loss_full": 2.3, "loss_subnets": 0.2, "epoch": 1.0, "step": 5},
    {"eval_loss": 2.0, "eval_top1": 0.25, "eval_runtime": 3.0, "eval_steps_per_second": 9.0, "epoch": 1.0, "step": 5},
    {"eval_width0.75_loss": 2.1, "eval_width0.75_top1": 0.2, "epoch": 1.0, "step": 5},
    {"eval_loss": 1.5, "eval_top1": 0.5, "epoch": 2.0, "step": 10},
    {"train_runtime": 60.0, "train_loss": 2.0, "epoch": 2.0, "step": 10},
]


def test_evaluations_are_told_apart_by_step_and_width():
    assert evaluations(HISTORY) == [
        Evaluation(5, 1.0, {"loss": 2.0, "top1": 0.25}),
        Evaluation(5, 1.0, {"loss": 2.1, "top1": 0.2}, width=0.75),
        Evaluation(10, 2.0, {"loss": 1.5, "top1": 0.5}),
    ]
    assert training_log(HISTORY) == HISTORY[:1]


def test_the_last_of_several_evaluations_at_a_step_counts():
    again = {"eval_loss": 1.4, "eval_top1": 0.75, "epoch": 2.0, "step": 10}
    assert evaluations([*HISTORY, again])[-1].metrics == {"loss": 1.4, "top1": 0.75}
    assert len(evaluations([*HISTORY, again])) == 3


def test_evaluations_before_training_have_no_epoch():
    assert evaluations([{"eval_loss": 2.0, "step": 0}]) == [Evaluation(0, 0.0, {"loss": 2.0})]


def test_sets_of_a_dictionary_are_told_apart_even_if_one_name_starts_with_another():
    history = [
        {"eval_day_loss": 1.0, "step": 5},
        {"eval_day_width0.5_loss": 1.5, "step": 5},
        {"eval_day_two_loss": 2.0, "step": 5},
    ]
    found = evaluations(history, ["day", "day_two"])
    assert [(e.data, e.width, e.metrics) for e in at_step(found, 5)] == [
        ("day", 1.0, {"loss": 1.0}),
        ("day", 0.5, {"loss": 1.5}),
        ("day_two", 1.0, {"loss": 2.0}),
    ]


def test_evaluations_of_a_step_run_from_the_full_network_to_the_narrowest():
    history = [{f"eval_width{width:g}_top1": 0.5, "step": 3} for width in (0.5, 0.9)] + [{"eval_top1": 0.6, "step": 3}]
    assert [e.width for e in at_step(evaluations(history), 3)] == [1.0, 0.9, 0.5]
    assert at_step(evaluations(history), 4) == []


def test_shares_are_metrics_between_0_and_1_other_than_the_loss():
    assert shares({"loss": 0.5, "top1": 1.0, "f1": 0.3, "mean_rank": 7.0}) == {"top1": 1.0, "f1": 0.3}
    assert [title(name) for name in ("top1", "accuracy", "f1_macro")] == ["top-1 accuracy", "accuracy", "f1 macro"]

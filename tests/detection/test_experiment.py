from unittest.mock import Mock

from gradaug_hf.detection.experiment import run


def test_processes_leave_their_group_once_all_is_written(tmp_path, monkeypatch):
    done = []
    results = {"make_trainer": Mock(), "train": {}, "evaluate": {"box_AP": 0.5}, "precision_table": ""}
    for name in (*results, "write", "leave_group"):
        monkeypatch.setattr(
            f"gradaug_hf.detection.experiment.{name}", lambda *_, name=name: done.append(name) or results.get(name)
        )
    run(["--coco_dir", str(tmp_path), "--use_cpu", "--output_dir", str(tmp_path / "out")])
    assert done == ["make_trainer", "train", "evaluate", "write", "precision_table", "leave_group"]

"""Tests for JSON result files and for the summary of a run."""

import json

import pytest

from senet_transfer import UserError
from senet_transfer.config import get_senet_config
from senet_transfer.engine.results import (
    duration,
    metrics,
    summary,
    with_diagnostics,
    write_results,
)


def test_values_that_json_cannot_represent_become_null(tmp_path):
    results = {"bbox": {"AP": 1.5, "APl": float("nan")}, "rows": [float("inf"), 3, ("a", None)]}
    write_results(tmp_path / "r.json", results)

    def refuse(word):
        raise AssertionError(f"{word} is not valid JSON")

    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert found == {"bbox": {"AP": 1.5, "APl": None}, "rows": [None, 3, ["a", None]]}


def test_an_unwritable_path_is_named(tmp_path):
    with pytest.raises(UserError, match="r.json can't be written"):
        write_results(tmp_path / "absent" / "r.json", {})


def test_lists_of_numbers_are_on_one_line(tmp_path):
    results = {"matrix": [[1, 2], [-3, None]], "curve": [1e-05, 0.5], "names": ["a", "b"]}
    write_results(tmp_path / "r.json", results)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == results
    assert "\n    [1, 2],\n    [-3, null]\n" in text
    assert '"curve": [1e-05, 0.5],\n' in text
    assert '"a",\n' in text


def test_diagnostics_are_next_to_the_tasks_of_their_data_set(tmp_path):
    cfg = get_senet_config()
    cfg.OUTPUT_DIR = str(tmp_path)
    for folder, name, task in (
        ("inference", "a", "bbox"), ("inference_TTA", "a", "bbox"), ("inference", "b", "segm")
    ):  # fmt: skip
        place = tmp_path / folder / name
        place.mkdir(parents=True)
        (place / "diagnostics.json").write_text(json.dumps({task: {"AP": 1.5}}))
    cfg.DATASETS.TEST = ("a",)
    given = {"bbox": {"AP": 1.5}}
    assert with_diagnostics(cfg, given) == {**given, "diagnostics": {"bbox": {"AP": 1.5}}}
    assert metrics(with_diagnostics(cfg, given)) == {"bbox/AP": 1.5}
    cfg.TEST.AUG.ENABLED = True
    assert with_diagnostics(cfg, given)["diagnostics"].keys() == {"bbox", "bbox_TTA"}
    cfg.DATASETS.TEST = ("a", "b")
    cfg.TEST.AUG.ENABLED = False
    several = {"a": {"bbox": {"AP": 1.5}}, "b": {"segm": {"AP": 1.5}}, "training": {}}
    found = with_diagnostics(cfg, several)
    assert found["b"] == {"segm": {"AP": 1.5}, "diagnostics": {"segm": {"AP": 1.5}}}
    assert found["a"]["diagnostics"].keys() == {"bbox"}
    assert several["b"].keys() == {"segm"}


BOXES = {"bbox": {"AP": 63.08, "AP50": 83.0, "APl": float("nan"), "AP-circle": 70.0}}


def test_a_summary_is_a_sentence_and_a_table_of_metrics_and_files(tmp_path):
    (tmp_path / "log.txt").touch()
    (tmp_path / "model_final.pth").touch()
    text = summary("Trained se_resnet18 for 700 steps in 2 min 31 s", BOXES, ["val"], tmp_path)
    sentence, empty, *rows = text.splitlines()
    assert sentence == "Trained se_resnet18 for 700 steps in 2 min 31 s; box AP 63.1 on val."
    assert not empty
    assert [row.split(maxsplit=1) for row in rows] == [
        ["bbox/AP", "63.1"],
        ["bbox/AP50", "83.0"],
        ["bbox/APl", "-"],
        ["model", str(tmp_path / "model_final.pth")],
        ["log", str(tmp_path / "log.txt")],
    ]
    starts = {len(row) - len(row.split(maxsplit=1)[1]) for row in rows}
    assert len(starts) == 1  # values are aligned in one column


def test_a_summary_names_each_of_several_data_sets(tmp_path):
    results = {"a": {**BOXES, "segm": {"AP": 50.0}}, "b": {"bbox": {"AP": 9.96}}}
    sentence, _, *rows = summary("Evaluated resnet50", results, ["a", "b"], tmp_path).splitlines()
    assert sentence == "Evaluated resnet50; box AP 63.1, mask AP 50.0 on a; box AP 10.0 on b."
    assert rows[-1].split() == ["b/bbox/AP", "10.0"]


def test_a_summary_of_a_classifier_and_of_a_run_without_evaluation(tmp_path):
    errors = {"classification": {"top1_error": 23.15, "top5_error": 0.7, "images": 298}}
    sentence = summary("Trained x", errors, ["places365/val"], tmp_path).splitlines()[0]
    assert sentence == "Trained x; top-1 error 23.1%, top-5 error 0.7% on places365/val."
    assert summary("Trained x", {}, [], tmp_path) == "Trained x.\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (151, "2 min 31 s"), (7260, "2 h 1 min")],
)
def test_durations_are_formatted_as_text(seconds, words):
    assert duration(seconds) == words


def test_metrics_have_the_names_that_are_logged():
    assert metrics({"bbox": {"AP": 1}, "training": {"iterations": 2}}) == {
        "bbox/AP": 1.0,
        "training/iterations": 2.0,
    }
    assert metrics({"val": {"bbox": {"AP": 1, "note": "x"}}}) == {"val/bbox/AP": 1.0}

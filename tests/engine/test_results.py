"""Tests of JSON result files."""

import json

import pytest

from senet_transfer import UserError
from senet_transfer.engine.results import write_results


def test_what_json_has_no_word_for_becomes_null(tmp_path):
    results = {"bbox": {"AP": 1.5, "APl": float("nan")}, "rows": [float("inf"), 3, ("a", None)]}
    write_results(tmp_path / "r.json", results)

    def refuse(word):
        raise AssertionError(f"{word} is not valid JSON")

    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert found == {"bbox": {"AP": 1.5, "APl": None}, "rows": [None, 3, ["a", None]]}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="r.json can't be written"):
        write_results(tmp_path / "absent" / "r.json", {})

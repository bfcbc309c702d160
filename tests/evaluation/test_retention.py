import json

import pytest

from model.evaluation.report import json_text
from model.evaluation.retention import retention_matrix

ROWS = [
    {"after": "words", "bpc": {"words": 2.5, "stories": 3.5}},
    {"after": "stories", "bpc": {"words": 2.75, "stories": 2.25}},
    {"after": "articles", "bpc": {"words": 3.0, "stories": 2.5, "articles": 2.0}},
]


def test_matrix_and_forgetting():
    retention = retention_matrix(ROWS)
    assert retention.after == ["words", "stories", "articles"]
    assert retention.stages == ["words", "stories", "articles"]
    assert retention.matrix == [[2.5, 3.5, None], [2.75, 2.25, None], [3.0, 2.5, 2.0]]
    assert retention.forgetting == {"words": 0.5, "stories": 0.25, "articles": 0.0}


def test_a_stage_that_got_better_is_not_forgotten():
    retention = retention_matrix([{"after": "a", "bpc": {"a": 2.0}}, {"after": "b", "bpc": {"a": 1.5}}])
    assert retention.forgetting == {"a": 0.0}


def test_missing_and_non_finite_values():
    rows = [{"after": "a", "bpc": {"a": 2.0, "b": float("nan")}}, {"after": "b", "bpc": {"b": 3.0, "a": None}}]
    retention = retention_matrix(rows)
    assert retention.matrix == [[2.0, None], [None, 3.0]]
    assert retention.forgetting == {"a": None, "b": 0.0}


def test_table_is_aligned_and_to_dict_is_json():
    retention = retention_matrix(ROWS)
    lines = retention.table().splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["forgotten", "0.500", "0.250", "0.000"]
    assert lines[1].split() == ["words", "2.500", "3.500", "-"]
    assert json.loads(json_text(retention.to_dict()))["forgetting"]["words"] == 0.5


@pytest.mark.parametrize("rows", [[], [{"after": "a"}], [{"bpc": {}}], ["a"], [{"after": "a", "bpc": [1]}]])
def test_bad_rows_are_named(rows):
    with pytest.raises(ValueError, match=r"rows(\[0\])?=.*accepted"):
        retention_matrix(rows)

"""Rows that other tools reported: each is within one percent, or says why it is not."""

from __future__ import annotations

import warnings

import pytest

from derivation.evidence.public import CLOSE, predict, rows
from derivation.measure.validate import reasons, recorded


def test_each_row_is_close_or_says_why() -> None:
    found = rows()
    assert len(found) == 21
    for row in found:
        close = row.error is not None and abs(row.error) <= CLOSE
        assert close or row.reason, row.what
        assert row.versions and row.source
    assert sum(row.error is not None and abs(row.error) <= CLOSE for row in found) == 5


@pytest.mark.parametrize("row", [row for row in rows() if row.bundled], ids=lambda row: f"{row.gpu} {row.what[:30]}")
def test_what_bundled_checkpoints_predict_is_recorded(row) -> None:
    assert row.prediction is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert predict(row.prediction) == row.prediction["predicted"]


def test_hunyuan_video_is_predicted_with_the_workspaces_of_conv3d() -> None:
    [row] = [row for row in rows() if row.prediction is not None and "HunyuanVideo" in row.what]
    assert row.prediction is not None and row.error is not None
    assert predict(row.prediction) == row.prediction["predicted"]
    assert abs(row.error) < 0.001


def test_each_call_that_is_further_off_says_why_and_no_other() -> None:
    found = [row for row in recorded()[1] if row.further_off]
    assert {str(row) for row in found} == reasons().keys()
    assert sum(len(row.further_off) for row in found) == 13

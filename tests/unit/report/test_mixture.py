"""What a run read, by the arithmetic of its rows."""

from pathlib import Path

import pytest

from glamcli import step_folders
from glamcli.errors import GlamError
from glamcli.report.mixture import rows_read

HISTORY = {
    "seed": 0,
    "stages": [[0, {"a": 3, "b": 1}], [200, {"b": 1}]],
    "num_rows": {"a": 50, "b": 10},
}


@pytest.fixture
def saved(monkeypatch):
    """Sets the description of the newest saved step."""

    def saved(**meta):
        monkeypatch.setattr(step_folders, "find_step", lambda run_dir: run_dir)
        monkeypatch.setattr(step_folders, "step_meta", lambda folder: meta)

    return saved


def test_shares_follow_the_stages_and_epochs_count_passes(saved):
    saved(step=100, data={"history": HISTORY}, skipped_batches=[])
    read = rows_read(Path(), batch_rows=4)
    assert read.stages == [(0, {"a": 0.75, "b": 0.25}), (50, {"b": 1.0})]
    assert read.rows == {"a": 150, "b": 250}
    assert read.epochs["a"][-1] == (100, 3.0)
    assert read.shares["b"][-1] == (100, 1.0)
    assert abs(read.shares["a"][0][1] - 0.75) < 0.3


def test_rows_that_a_rewind_left_out_were_not_read(saved):
    saved(step=100, data={"history": HISTORY}, skipped_batches=[[40, 60]])
    assert rows_read(Path(), batch_rows=4).rows == {"a": 120, "b": 200}


@pytest.mark.parametrize(
    "meta",
    [{}, {"step": 3}, {"step": 3, "data": {"history": {}}}, {"step": 3, "data": {"history": 7}}],
)
def test_a_step_without_a_history_is_said(saved, meta):
    saved(**meta)
    with pytest.raises(GlamError, match="no history of rows"):
        rows_read(Path(), batch_rows=4)

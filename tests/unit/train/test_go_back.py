"""Going back by itself: to a step that proves to be whole, and not for what was done by hand."""

import sys

import pytest

from bare_steps import save
from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import TrainError
from glamcli.hosts.join import ALONE
from glamcli.progress import Silent
from glamcli.step_folders import complete_steps
from glamcli.train.go_back import GoBack, going_back, plan
from glamcli.train.rewind import rewind, rewinds

LOST = {"tree": {"x": ["float32", [2]]}}
"""the description of a step whose array cannot be read."""


@pytest.fixture
def heard():
    progress = Silent()
    progress.texts = []
    progress.warn = progress.texts.append
    return progress


def go_back(run, heard, to=30, skip=12):
    with going_back(run, ALONE, heard):
        raise GoBack("it exploded", to, skip)


def test_where_the_last_good_step_is_damaged_the_one_before_takes_its_place(tmp_path, heard):
    for step, meta in ((10, {}), (20, {"good": False}), (30, LOST), (40, {"good": False})):
        save(tmp_path, step, **meta)
    with pytest.raises(GoBack):
        go_back(tmp_path, heard)
    assert complete_steps(tmp_path / "checkpoints") == [10]
    (record,) = rewinds(tmp_path)
    assert (record.to_step, record.skip_batches, record.automatic) == (10, 32, True)
    assert f"checkpoint {tmp_path}/checkpoints/30 cannot be used" in heard.texts[0]
    assert heard.texts[1] == "it exploded; going back to step 10, and on without batches 11 to 42"


def test_where_all_good_steps_are_damaged_nothing_is_set_aside(tmp_path, heard):
    for step, meta in ((30, LOST), (40, {"good": False})):
        save(tmp_path, step, **meta)
    with pytest.raises(TrainError, match="it exploded") as ended:
        go_back(tmp_path, heard)
    assert "there is no good checkpoint to go back to that is not damaged" in ended.value.hint
    assert complete_steps(tmp_path / "checkpoints") == [40, 30]
    assert rewinds(tmp_path) == []


def test_a_step_too_large_to_be_read_by_one_process_is_taken(tmp_path, heard, monkeypatch):
    def verify(folder):
        raise MemoryError

    monkeypatch.setattr(sys.modules[GoBack.__module__], "verify", verify)
    save(tmp_path, 30)
    with pytest.raises(GoBack):
        go_back(tmp_path, heard)
    assert [record.to_step for record in rewinds(tmp_path)] == [30]


def test_rewinds_by_hand_leave_the_automatic_ones_their_number(tmp_path):
    recipe = load_recipe("test-tiny", ["guard.max_rewinds=1", "train.steps=500"]).recipe
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(tmp_path, 10)
    rewind(tmp_path, 10, 3)
    skip = plan(recipe, checkpoints, 10, 15)
    assert skip == 5 + recipe.guard.rewind_skip_batches
    rewind(tmp_path, 10, skip, automatic=True)
    assert "did not help 1 times" in plan(recipe, checkpoints, 10, 15)

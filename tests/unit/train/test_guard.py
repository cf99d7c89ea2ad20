"""Giving up after too many bad steps."""

import pytest

from glamcli.errors import TrainError
from glamcli.train.guard import check_bad_steps


def test_bad_steps_below_the_limit_are_borne():
    check_bad_steps(9, limit=10, step=1200, last_good=lambda: pytest.fail("not asked"))


def test_at_the_limit_the_error_names_the_last_good_checkpoint():
    with pytest.raises(TrainError) as caught:
        check_bad_steps(10, limit=10, step=1200, last_good=lambda: 1000)
    assert caught.value.what == "updates not finite at step 1200 for 10 steps in a row"
    assert caught.value.hint == "last good checkpoint: step 1000"


def test_without_a_checkpoint_it_says_so():
    with pytest.raises(TrainError) as caught:
        check_bad_steps(1, limit=1, step=1, last_good=lambda: None)
    assert caught.value.hint == "there is no checkpoint to go back to"

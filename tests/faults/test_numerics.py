"""Runs whose numbers go wrong: what is noticed, what is kept, and how they end."""

import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import TrainError
from glamcli.progress import Silent
from glamcli.train.loop import train

TINY = (
    *("moe=null", "model.num_layers=1", "model.model_dim=16", "model.ffn_dim=16"),
    *("runtime.compile_cache=false", "every.heldout_steps=null", "every.log_steps=1"),
    *("batch.rows=8", "batch.row_tokens=32", "data.mixture=./mix.yaml", "data.cache_dir=./cache"),
    "every.checkpoint_steps=5",
)


class Heard(Silent):
    def __init__(self):
        self.warned, self.steps = [], {}

    def warn(self, text):
        self.warned.append(text)

    def step(self, values):
        self.steps[values["step"]] = values


@pytest.fixture
def running(monkeypatch, tmp_path):
    """Trains a tiny model on text of its own; (what was heard, the checkpoints, the error)."""
    monkeypatch.chdir(tmp_path)
    mixture = "sources: {numbers: {kind: text, path: n.txt, separator: line, weight: 1}}"
    (tmp_path / "mix.yaml").write_text(mixture)
    lines = (f"{i} and {i + 1} make {2 * i + 1}" for i in range(400))
    (tmp_path / "n.txt").write_text("\n".join(lines))

    def run(*sets):
        heard, folder, error = Heard(), tmp_path / "run", None
        try:
            train(load_recipe("test-tiny", [*TINY, *sets]).recipe, folder, heard)
        except TrainError as raised:
            error = raised
        return heard, Checkpoints(folder / "checkpoints"), error

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sets", "what"),
    [
        (("optimizer.learning_rate=300", "optimizer.clip_update_rms=1e6"), "above the 22.48"),
        (("optimizer.learning_rate=3",), "above the 22.48"),
        (("optimizer.learning_rate=1e10",), "not finite"),
    ],
    ids=["exploded", "high", "absurd"],
)
def test_a_rate_that_spoils_the_weights_ends_the_run_and_leaves_no_checkpoint_called_good(
    running, sets, what
):
    heard, checkpoints, error = running("train.steps=60", *sets)
    assert error is not None, heard.steps[60]["loss"]
    assert error.what.startswith("10 steps in a row were skipped, up to step 1")
    assert what in error.what
    assert error.hint.startswith("there is no good checkpoint to go back to; ")
    assert "optimizer.learning_rate" in error.hint
    assert checkpoints.steps() == []
    assert len(heard.warned) == 10


@pytest.mark.slow
def test_checks_of_devices_find_nothing_on_sound_ones_and_change_no_number(running, tmp_path):
    plain, _, _ = running("train.steps=12")
    (tmp_path / "run").rename(tmp_path / "plain")
    sets = ("guard.replay_steps=3", "guard.replica_steps=4")
    checked, checkpoints, error = running("train.steps=12", *sets)
    assert error is None
    assert (checked.warned, checkpoints.latest()) == ([], 12)
    losses = [[heard.steps[step]["loss"] for step in range(1, 13)] for heard in (plain, checked)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so_and_ends_where_it_should(running):
    slow = ("train.steps=12", "optimizer.learning_rate=1e-6", "guard.no_progress_steps=5")
    heard, _, error = running(*slow)
    assert error is None
    assert [text.split(":")[0] for text in heard.warned] == [
        "no progress for 5 steps",
        "no progress for 10 steps",
    ]
    heard, _, error = running("train.steps=30", *slow[1:], "guard.on_spike=stop")
    assert error.what.startswith("no progress for 13 steps: at step 13 the loss is ")

"""Runs whose numbers go wrong: what is noticed, what is kept, and how they end."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import Preempted, TrainError
from glamcli.model.decoder import Decoder
from glamcli.progress import Silent
from glamcli.train import beginning, loop, programs
from glamcli.train.loop import train
from glamcli.train.metric_files import read_metrics, run_seconds
from glamcli.train.rewind import rewind, rewinds
from runs import assert_same_run

TINY = (
    *("moe=null", "model.num_layers=1", "model.model_dim=16", "model.ffn_dim=16"),
    *("runtime.compile_cache=false", "every.heldout_steps=null", "every.log_steps=1"),
    *("batch.rows=8", "batch.row_tokens=32", "data.mixture=./mix.yaml", "data.cache_dir=./cache"),
    "every.checkpoint_steps=5",
)


MIXTURE = """
sources:
  numbers: {kind: text, path: n.txt, separator: line, weight: 1}
  bad: {kind: text, path: bad.txt, separator: line, weight: 0}
"""
BAD_FROM_7 = MIXTURE + "stages:\n  - {from_step: 7, weights: {bad: 1}}\n"
BAD_FROM_7_TO_20 = BAD_FROM_7 + "  - {from_step: 20, weights: {numbers: 1}}\n"


class Poisoned(Decoder):
    """A decoder whose loss, hence gradient, is not a number where the text says `~`."""

    def losses(self, params, x_BSM, targets_BS):
        nats_BS, logz_BS = super().losses(params, x_BSM, targets_BS)
        return nats_BS * jnp.where(targets_BS == 3 + ord("~"), jnp.nan, 1.0), logz_BS


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
    lines = (f"{i} and {i + 1} make {2 * i + 1}" for i in range(400))
    (tmp_path / "n.txt").write_text("\n".join(lines))
    (tmp_path / "bad.txt").write_text("\n".join(f"{i} ~ {i + 1}" for i in range(200)))

    def run(*sets, mixture=MIXTURE):
        heard, folder, error = Heard(), tmp_path / "run", None
        (tmp_path / "mix.yaml").write_text(mixture)
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


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_bad_streak_goes_on_with_it(running, monkeypatch):
    monkeypatch.setattr(programs, "Decoder", Poisoned)
    asked = itertools.count(1)
    monkeypatch.setattr(loop.Meter, "exchange", lambda *_: next(asked) == 9)
    sets = ("train.max_bad_steps=4", "train.steps=60")
    with pytest.raises(Preempted, match="saved at step 9"):
        running(*sets, mixture=BAD_FROM_7)
    heard, checkpoints, error = running(*sets, mixture=BAD_FROM_7)
    assert [checkpoints.meta(step)["good"] for step in checkpoints.steps()] == [False, True]
    assert checkpoints.steps() == [9, 5]
    assert sorted(heard.steps) == [10, 11]
    assert error.what.startswith("4 steps in a row were skipped, up to step 11: ")
    assert error.hint.startswith("last good checkpoint: step 5; ")


REWIND = (
    *("guard.on_spike=rewind", "guard.rewind_skip_batches=10", "train.max_bad_steps=3"),
    *("every.checkpoint_steps=3", "train.steps=60"),
)


def metric_steps(path):
    lines = map(json.loads, path.read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_goes_back_by_itself_and_on_with_the_data_after_the_trouble(
    running, monkeypatch, tmp_path
):
    monkeypatch.setattr(programs, "Decoder", Poisoned)
    heard, checkpoints, error = running(*REWIND, mixture=BAD_FROM_7_TO_20)
    assert error is None
    assert heard.warned[-1] == (
        "3 steps in a row were skipped, up to step 10: gradients are not finite; "
        "going back to step 6, and on without batches 7 to 20"
    )
    (record,) = rewinds(tmp_path / "run")
    assert (record.to_step, record.skip_batches) == (6, 14)
    assert checkpoints.meta(60)["skipped_batches"] == [[6, 20]]
    assert metric_steps(tmp_path / "run/metrics.jsonl") == [*range(1, 7), *range(21, 61)]
    assert metric_steps(tmp_path / "run/metrics.after-6.jsonl") == [7, 8, 9, 10]
    assert record.automatic
    last = {line["step"]: line for line in read_metrics(tmp_path / "run/metrics.after-6.jsonl")}[10]
    first = next(
        line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["step"] == 21
    )
    assert run_seconds(first) > run_seconds(last) == record.seconds
    assert (last["rewinds_total"], first["rewinds_total"]) == (0, 1)
    clock = first["unix_seconds"] - last["unix_seconds"]  # with the restore and the compilation
    assert run_seconds(first) - run_seconds(last) == pytest.approx(clock, rel=0.01, abs=0.25)
    assert heard.steps[60]["loss"] < heard.steps[6]["loss"]

    # By hand it would have been the same run.
    (tmp_path / "run").rename(tmp_path / "itself")
    _, checkpoints, error = running(*REWIND, "guard.on_spike=skip", mixture=BAD_FROM_7_TO_20)
    assert error.hint.startswith(
        f"last good checkpoint: step 6; `glam checkpoint rewind {tmp_path / 'run'} --to 6 "
        "--skip-batches 14`, or "
    )
    rewind(tmp_path / "run", 6, 14)
    _, _, error = running(*REWIND, "guard.on_spike=skip", mixture=BAD_FROM_7_TO_20)
    assert error is None
    assert_same_run(tmp_path / "itself", tmp_path / "run", 60)


@pytest.mark.slow
def test_going_back_again_and_again_comes_to_an_end(running, monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "Decoder", Poisoned)
    _, checkpoints, error = running(*REWIND, "guard.max_rewinds=2", mixture=BAD_FROM_7)
    assert error.what == (
        "3 steps in a row were skipped, up to step 36: gradients are not finite; "
        "going back to step 6 did not help 2 times (`guard.max_rewinds`)"
    )
    assert [record.to_step for record in rewinds(tmp_path / "run")] == [6, 6]
    assert checkpoints.latest() == 6
    skipping = ("guard.rewind_skip_batches=50", *REWIND[:1], *REWIND[2:])
    (tmp_path / "run").rename(tmp_path / "first")
    _, _, error = running(*skipping, mixture=BAD_FROM_7)
    assert "would skip all that is left" in error.what


@pytest.mark.slow
def test_a_router_that_sends_every_token_to_one_expert_is_told_with_layer_and_advice(
    running, monkeypatch, tmp_path
):
    init_state = beginning.init_state

    def forced(*of):
        state = init_state(*of)
        weights = state.params["blocks"]["expert_layer"]["ffn"]
        # All logits of the second expert layer are 0, and of equals the first is chosen.
        even = weights["router"].at[1].set(0)
        weights["router"] = jax.device_put(even, weights["router"].sharding)
        return state

    monkeypatch.setattr(beginning, "init_state", forced)
    experts = ("moe={num_experts: 4, group_tokens: 32}", "model.num_layers=4", "model.ffn_dim=8")
    heard, _, error = running(*experts, "guard.routers.mean_steps=1", "train.steps=1")
    assert error is None
    (collapse,) = [text for text in heard.warned if "most popular expert" in text]
    assert collapse.startswith(
        "step 1: expert layer 2: the most popular expert of 4 gets 100% of first choices, in the "
        "mean of steps; raise `moe.balance_coef` (now 0.01)"
    )
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert lines[0]["max_first_frac_by_layer"][0] < lines[0]["max_first_frac_by_layer"][1] == 1
    assert collapse.removeprefix("step 1: ") in lines[1]["alarms"]

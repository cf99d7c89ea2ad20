"""Numbers are read one step late, written before a checkpoint, and repeatable but for the clock."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.guard import Guard
from glamcli.config.load import load_recipe
from glamcli.errors import TrainError
from glamcli.hosts.join import ALONE
from glamcli.hosts.pace import PACE_KEYS, Pace
from glamcli.progress import Silent
from glamcli.train.memory_use import MEMORY_KEYS, MemoryUse
from glamcli.train.meter import Meter
from glamcli.train.speed import SPEED_KEYS
from runs import WALL_CLOCK

RECIPE = load_recipe("test-tiny", ["moe=null", "every.log_steps=3", "train.steps=8"]).recipe
LIMIT = RECIPE.train.max_bad_steps


class Heard(Silent):
    def __init__(self):
        self.steps, self.warnings = [], []

    def step(self, values):
        self.steps.append(values["step"])

    def warn(self, text):
        self.warnings.append(text)


def sums(step: int, bad_steps: int = 0):
    nats = np.array([3.0, 5.0], np.float32) * step
    return {
        "step": np.int32(step),
        "loss": np.float32(1.0),
        "loss_nats": nats.sum(),
        "z_sum": np.float32(0.0),
        "num_targets": np.int32(4),
        "source_nats": nats,
        "source_targets": np.array([3, 1], np.int32),
        "learning_rate": np.float32(0.01),
        "grad_norm": np.float32(1.0),
        "update_norm": np.float32(1.0),
        "param_norm": np.float32(1.0),
        "finite": np.bool_(not bad_steps),
        "spike": np.bool_(False),
        "deviations": np.full(3, np.nan, np.float32),
        "typical": np.zeros(3, np.float32),
        "bad_steps": np.int32(bad_steps),
        "bad_steps_total": np.int32(bad_steps),
        "routing": {},
    }


def meter(
    tmp_path, start=0, progress=None, saved_steps=(), saved=None, recipe=RECIPE, writes=True, **more
):
    names, progress, pace = ("web", "books"), progress or Silent(), Pace(ALONE.name)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.good_steps = lambda: sorted({*saved_steps} - {3}, reverse=True)
    folder = tmp_path if writes else None
    return Meter(recipe, names, folder, start, progress, pace, checkpoints, saved or {}, **more)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_read_when_the_next_one_is_dispatched(tmp_path):
    heard = Heard()
    with meter(tmp_path, progress=heard) as read:
        read.add(1, sums(1))
        assert heard.steps == []
        read.add(2, sums(2))
        assert heard.steps == [1]


def test_flush_reads_what_is_pending_so_a_checkpoint_never_precedes_its_metrics(tmp_path):
    with meter(tmp_path) as read:
        read.add(3, sums(3))
        read.flush()
        assert [line["step"] for line in lines(tmp_path)] == [3]
        read.flush()
        assert len(lines(tmp_path)) == 1


def test_first_due_and_last_steps_are_written(tmp_path):
    with meter(tmp_path) as read:
        for step in range(1, 9):
            read.add(step, sums(step))
        read.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 6, 8]


def test_a_logged_loss_is_the_mean_since_the_line_before(tmp_path):
    with meter(tmp_path) as read:
        for step in range(1, 9):
            read.add(step, sums(step))
        read.flush()
    # The sums of step n are 3n over 3 targets of `web` and 5n over 1 of `books`.
    losses = {line["step"]: (line["loss/web"], line["loss/books"]) for line in lines(tmp_path)}
    assert losses == {1: (1.0, 5.0), 3: (2.5, 12.5), 6: (5.0, 25.0), 8: (7.5, 37.5)}
    assert [line["loss"] for line in lines(tmp_path)] == [2.0, 5.0, 10.0, 15.0]


@pytest.mark.parametrize(("kind", "keys"), [("TPU v4", {*SPEED_KEYS}), ("cpu", set())])
def test_mfu_is_written_where_the_peak_is_known(tmp_path, kind, keys):
    with meter(tmp_path, devices=[SimpleNamespace(device_kind=kind)]) as read:
        read.add(1, sums(1))
        read.flush()
    assert {*lines(tmp_path)[0]} & {*SPEED_KEYS} == keys


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path):
    def run(folder, *stops):
        start, saved = 0, {}
        for stop in (*stops, 8):
            heard = Heard()
            with meter(folder, start, heard, saved=json.loads(json.dumps(saved))) as read:
                for step in range(start + 1, stop + 1):
                    read.add(step, sums(step))
                if stop == 5:
                    read.flush()
                    saved = {"loss_sums": read.loss_sums}  # of steps 4 and 5
                    read.add(6, sums(60))  # a step whose checkpoint never came
                read.flush()
            assert heard.steps[0] == start + 1, "whoever waits hears of the first step"
            start = stop
        return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines(folder)]

    assert run(tmp_path / "a") == run(tmp_path / "b", 5)
    others = {*PACE_KEYS, *SPEED_KEYS, *MEMORY_KEYS}  # of many processes, of chips, from the loop
    assert set(lines(tmp_path / "a")[0]) >= set(WALL_CLOCK) - others


def test_the_most_memory_since_the_line_before_is_in_a_line(tmp_path, monkeypatch):
    held = iter((1e9, 2e9, 4e9, 3e9, 2e9, 2e9, 1e9, 1e9))
    monkeypatch.setattr(MemoryUse, "mine", lambda self: (next(held), 5.0, np.nan))
    with meter(tmp_path) as read:
        for step in range(1, 9):
            read.add(step, sums(step))
            assert read.exchange(step == 7) is (step == 7)
        read.flush()
    found = [[line.get(key) for key in MEMORY_KEYS] for line in lines(tmp_path)]
    assert found == [[1e9, 5, None], [4e9, 5, None], [3e9, 5, None], [1e9, 5, None]]


FRESH = "start anew (`--fresh`) with a lower `optimizer.learning_rate`"


def way_back(tmp_path, good, step):
    return (
        f"last good checkpoint: step {good}; `glam checkpoint rewind {tmp_path} --to {good} "
        f"--skip-batches {step - good + 100}`, or {FRESH}"
    )


def test_bad_steps_are_told_and_end_the_run_naming_the_last_good_checkpoint(tmp_path):
    heard = Heard()
    # Step 3 was saved during an earlier streak, 4 is the last applied one, 5 was saved since.
    with meter(tmp_path, progress=heard, saved_steps=(2, 3, 4, 5)) as read:
        for bad in range(1, LIMIT):
            read.add(bad + 4, sums(bad + 4, bad_steps=bad) | {"grad_norm": np.float32("nan")})
        read.add(LIMIT + 4, sums(LIMIT + 4, bad_steps=LIMIT))
        with pytest.raises(TrainError, match="not finite") as caught:
            read.flush()
    assert caught.value.hint == way_back(tmp_path, 2, LIMIT + 4)
    assert len(heard.warnings) == LIMIT
    skipped = "update skipped, weights stay as they were"
    assert heard.warnings[0] == f"step 5: gradients are not finite; {skipped}"
    assert heard.warnings[-1] == f"step {LIMIT + 4}: the update is not finite; {skipped}"
    assert [line["step"] for line in lines(tmp_path)] == list(range(5, LIMIT + 5))


def test_a_run_that_gives_up_without_a_checkpoint_says_so(tmp_path):
    with meter(tmp_path, saved_steps=(1,)) as read:
        read.add(LIMIT, sums(LIMIT, bad_steps=LIMIT))
        with pytest.raises(TrainError) as caught:
            read.flush()
    what = f"{LIMIT} steps in a row were skipped, up to step {LIMIT}: the update is not finite"
    assert caught.value.what == what
    assert caught.value.hint == "there is no good checkpoint to go back to; " + FRESH


SPIKE = {
    "spike": np.bool_(True),
    "loss_nats": np.float32(9.5 * 4),
    "grad_norm": np.float32(31.0),
    "deviations": np.float32([14.25, 3.0, -0.5]),
    "typical": np.float32([4.25, 0.8, 1.5]),
}


@pytest.mark.parametrize("on_spike", ["skip", "stop"])
def test_a_spike_is_told_with_what_is_usual_and_ends_the_run_that_asks_for_it(tmp_path, on_spike):
    heard = Heard()
    recipe = RECIPE.model_copy(update={"guard": Guard(on_spike=on_spike)})
    with meter(tmp_path, progress=heard, saved_steps=(2, 5), recipe=recipe) as read:
        read.add(7, sums(7, bad_steps=1) | SPIKE)
        if on_spike == "skip":
            read.flush()
        else:
            with pytest.raises(TrainError, match="step 7: a spike: loss") as caught:
                read.flush()
            assert caught.value.hint == way_back(tmp_path, 5, 7)
    why = (
        "a spike: loss 9.5 (usually 4.25, +14.2 deviations), gradient norm 31 (usually 0.8, +3.0 "
        "deviations), update norm 1 (usually 1.5, -0.5 deviations)"
    )
    skipped = "update skipped, weights stay as they were"
    assert heard.warnings == [f"step 7: {why}; {skipped}"]


def test_an_explosion_before_there_is_anything_usual_says_what_no_loss_should_be(tmp_path):
    heard = Heard()
    with meter(tmp_path, progress=heard) as read:
        unknown = {"deviations": np.full(3, np.nan, np.float32)}
        read.add(2, sums(2, bad_steps=1) | SPIKE | unknown | {"loss_nats": np.float32(4 * 822)})
        read.flush()
    assert heard.warnings[0].startswith("step 2: loss 822, above the 22.48 that no guess costs")


def no_progress(steps, saved=None, start=0, **guard):
    """Reads steps of 4 targets whose loss in nats is `steps(step)`; what was heard, the meter.

    Token frequencies alone cost ln 512 on `books`, 3 nats on `web`, which has 3 of 4 targets.
    """
    heard = Heard()
    recipe = RECIPE.model_copy(update={"guard": Guard(no_progress_steps=6, **guard)})
    read = meter(Path(), start, heard, saved=saved, recipe=recipe, writes=False)
    read.health.unigram_nats = {"web": 3.0}
    for step in range(start + 1, start + 31):
        nats = np.float32([3 * steps(step), steps(step)])
        read.add(step, sums(step) | {"loss_nats": nats.sum(), "source_nats": nats})
    read.flush()
    return heard.warnings, read


BLIND = (3 * 3.0 + np.log(512)) / 4


def test_a_loss_no_better_than_token_frequencies_is_told_again_and_again():
    warnings, _ = no_progress(lambda step: BLIND - 0.01)
    assert warnings == []
    warnings, _ = no_progress(lambda step: BLIND + 0.01)
    assert [text.split(": at step ")[0] for text in warnings] == [
        f"no progress for {steps} steps" for steps in (6, 12, 18, 24, 30)
    ]
    assert (
        "at step 6 the loss is 3.82, and the frequencies of tokens alone give 3.81" in (warnings[0])
    )
    warnings, _ = no_progress(lambda step: BLIND + 0.01 if step > 10 else 1.0)
    assert [text.split(":")[0] for text in warnings] == [
        f"no progress for {steps} steps" for steps in (6, 12, 18)
    ]


def test_steps_without_progress_are_counted_over_a_resumption():
    saved = {"step": 9, "steps_without_progress": 5}
    warnings, read = no_progress(lambda step: 9.0, saved=saved, start=9)
    assert warnings[0].startswith("no progress for 8 steps: at step 12 ")
    assert read.health.saved(39)["steps_without_progress"] == 35
    # Batches left out by a rewind are no steps.
    warnings, _ = no_progress(lambda step: 9.0, saved=saved, start=109)
    assert warnings[0].startswith("no progress for 7 steps: at step 111 ")


def test_no_progress_ends_a_run_that_is_to_stop(tmp_path):
    with pytest.raises(TrainError, match="no progress for 6 steps"):
        no_progress(lambda step: 9.0, on_spike="stop")


def test_held_out_losses_have_lines_of_their_own(tmp_path):
    with meter(tmp_path) as read:
        read.heldout(5, {"web": 2.5, "books": float("nan")}, {"web": 3.0, "books": 3.0})
    (line,) = lines(tmp_path)
    assert line.pop("unix_seconds") == pytest.approx(time.time(), abs=600)
    assert line == {
        "step": 5,
        "tokens_seen": 5 * RECIPE.batch.rows * RECIPE.batch.row_tokens,
        "heldout/web": 2.5,
        "heldout/books": None,
        "unigram/web": 3.0,
        "unigram/books": 3.0,
    }


def test_scores_are_told_with_their_errors_and_written_as_they_are(tmp_path):
    heard = Heard()
    heard.said = []
    heard.say = heard.said.append
    scores = {"eval/failed_tasks": 0.0, "eval/t/f1/0_shots": 0.5, "eval/t/f1/0_shots_stderr": 0.25}
    with meter(tmp_path, progress=heard) as read:
        read.evaluated(3, scores)
    assert heard.said == ["step 3: t/f1/0_shots 0.500 ± 0.250"]
    assert scores.items() <= lines(tmp_path)[0].items()

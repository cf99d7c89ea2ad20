"""One program per run, also after a restore; asked to stop, it stops at a step boundary."""

import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.monitoring
import numpy as np
import pytest

from board import curves, events_in
from glamcli import faults
from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import CheckpointError, DataError, Preempted, RecipeError, SaveFailed
from glamcli.progress import Silent
from glamcli.train import loop
from glamcli.train.go_back import GoBack
from glamcli.train.loop import train
from glamcli.train.metric_files import read_metrics, run_seconds
from glamcli.train.rewind import rewind, seconds_before
from runs import WALL_CLOCK, weights

SETS = (
    "model.num_layers=1",
    "model.model_dim=8",
    "model.num_heads=1",
    "model.head_dim=8",
    "model.ffn_dim=8",
    "model.vocab_size=259",
    "moe=null",
    "batch.row_tokens=32",
    "train.steps=4",
    "every.heldout_steps=null",
    "every.checkpoint_steps=null",
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    def make_mesh(settings):
        return original(settings, jax.devices()[:1])

    original = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", make_mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    # Every run here has the same programs.
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    (folder / "text.txt").write_text("\n".join(f"{i} and {i + 1} follow" for i in range(400)))
    (folder / "mix.yaml").write_text(
        f"sources: {{text: {{kind: text, path: {folder}/text.txt, separator: line, weight: 1}}}}"
    )
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


def recipe(folder, *sets):
    data = (f"data.mixture={folder}/mix.yaml", f"data.cache_dir={folder}/cache")
    return load_recipe("test-tiny", (*SETS, *data, *sets)).recipe


class Compilations(Silent):
    """Counts what XLA compiles while the phase `training` is open; raises a signal at a step."""

    def __init__(self, signal_at=None):
        self.count = 0
        self.signal_at = signal_at
        self.said = []
        self.training = False
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration" and self.training:
            self.count += 1

    def phase(self, name, total=None, unit=""):
        self.training = self.training or name == "training"
        return super().phase(name, total, unit)

    def step(self, values):
        if values["step"] == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def say(self, text):
        self.said.append(text)


def test_a_restored_state_runs_the_one_compiled_program(folder, tmp_path):
    # While training, only the held-out step is compiled, when it is first needed.
    fresh = Compilations()
    outcome = train(recipe(folder), tmp_path / "run", fresh)
    assert outcome.step == 4
    assert fresh.count == 1
    resumed = Compilations()
    outcome = train(recipe(folder, "train.steps=8"), tmp_path / "run", resumed)
    assert outcome.step == 8
    assert resumed.count == 1
    assert "continuing from step 4" in resumed.said


def test_a_step_is_dispatched_before_the_numbers_of_the_step_before_are_read(
    folder, tmp_path, monkeypatch
):
    events = []

    class Loss:
        """A number on the device that tells when somebody waits for it."""

        def __init__(self, step, value):
            self.step, self.value = step, value

        def block_until_ready(self):
            events.append(f"read {self.step}")

        def __array__(self, *_, **__):
            self.block_until_ready()
            return np.asarray(self.value)

    def compile_and_listen(*about):
        step_programs, step = compile_step(*about)

        def dispatch(number, state, batch):
            state, sums = step(number, state, batch)
            events.append("dispatch")
            return state, {**sums, "loss": Loss(events.count("dispatch"), sums["loss"])}

        return step_programs, dispatch

    def put_and_listen(batch, *where):
        events.append("put")
        return put(batch, *where)

    compile_step, put = loop._compiled_step, loop.global_batch
    monkeypatch.setattr(loop, "_compiled_step", compile_and_listen)
    monkeypatch.setattr(loop, "global_batch", put_and_listen)
    train(recipe(folder), tmp_path / "run", Silent())
    # The batch of the step after is on its way by then as well.
    following = ["dispatch", "put", "read 1", "dispatch", "put", "read 2", "dispatch", "read 3"]
    assert events == ["put", "dispatch", "put", *following, "read 4"]


def test_a_batch_that_is_not_on_the_devices_is_no_silent_transfer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "global_batch", lambda batch, *where: dict(batch))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(recipe(folder), tmp_path / "run", Silent())


def test_asked_to_stop_it_saves_at_the_next_boundary(folder, tmp_path):
    progress = Compilations(signal_at=2)
    with pytest.raises(Preempted, match=r"saved at step \d+, asked to stop") as stopped:
        train(recipe(folder, "train.steps=100000"), tmp_path / "run", progress)
    step = int(stopped.value.what.split()[3].rstrip(","))
    assert 3 <= step < 1000
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [step]
    assert any(text.startswith("SIGTERM received") for text in progress.said)

    with pytest.raises(CheckpointError) as caught:
        train(recipe(folder, "seed=1", "optimizer.hold_steps=5"), tmp_path / "run", Silent())
    assert f"(step {step}) is another run: `optimizer.hold_steps` was 10, is 5" in caught.value.what
    assert "`seed` was 0, is 1" in caught.value.what


def test_other_data_under_the_same_names_is_refused(folder, tmp_path):
    text = folder / "text.txt"
    with pytest.raises(Preempted):
        train(recipe(folder, "train.steps=100000"), tmp_path / "run", Compilations(signal_at=1))
    before = text.read_text()
    try:
        text.write_text(before.replace("follow", "lead"))
        with pytest.raises(CheckpointError, match="source `text`"):
            train(recipe(folder, "train.steps=1000"), tmp_path / "run", Silent())
    finally:
        text.write_text(before)


def test_a_missing_logger_refuses_a_run_but_not_one_that_is_finished(folder, tmp_path):
    logged = recipe(folder, "run.loggers=[trackio]")
    with pytest.raises(RecipeError, match="`trackio` is not installed"):
        train(logged, tmp_path / "run", Silent())
    train(recipe(folder), tmp_path / "run", Silent())
    assert train(logged, tmp_path / "run", Silent()).model is None


def test_checkpoints_that_are_all_damaged_never_become_a_fresh_start(folder, tmp_path):
    (tmp_path / "run/checkpoints/7").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="none that can be used"):
        train(recipe(folder), tmp_path / "run", Silent())


def test_a_run_file_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "run/recipe.yaml").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*run/recipe\.yaml: "):
        train(recipe(folder), tmp_path / "run", Silent())


class Warned(Silent):
    def __init__(self):
        self.warnings = []
        self.said = []

    def warn(self, text):
        self.warnings.append(text)

    def say(self, text):
        self.said.append(text)


def failing(monkeypatch, times):
    """Saves that turn out to have failed, so many times."""
    left = [times]

    def wait(checkpoints):
        step = wait_for(checkpoints)
        if step is None or not left[0]:
            return step
        left[0] -= 1
        shutil.rmtree(checkpoints.folder / str(step))
        raise SaveFailed(f"saving step {step} failed: no room", hint="of the test")

    wait_for = Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "wait", wait)


def test_a_save_that_failed_is_repeated_and_the_run_goes_on(folder, tmp_path, monkeypatch):
    failing(monkeypatch, 1)
    heard = Warned()
    train(recipe(folder, "train.steps=40", "every.checkpoint_steps=8"), tmp_path / "run", heard)
    # On a busy machine it may also be told that it waits for its data.
    (warning,) = (text for text in heard.warnings if "data" not in text)
    assert warning.startswith("saving step 8 failed: no room (of the test; ")
    saved = [int(text.split()[1][:-1]) for text in heard.said if text.endswith(": saved")]
    assert 8 < saved[0] <= 16
    assert saved[-3:] == [24, 32, 40]


def test_saves_that_keep_failing_end_the_run(folder, tmp_path, monkeypatch):
    failing(monkeypatch, 99)
    heard = Warned()
    sets = ("train.steps=40", "every.checkpoint_steps=8", "checkpoints.retry_seconds=0")
    with pytest.raises(CheckpointError, match=r"saving step \d+ failed: no room"):
        train(recipe(folder, *sets), tmp_path / "r", heard)
    assert heard.warnings == []


class Asked(Silent):
    """Sends a signal when a step has been read, and waits until it has arrived."""

    def __init__(self, step):
        self.at = step
        self.arrived = threading.Event()

    def step(self, values):
        if values["step"] == self.at and not self.arrived.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.arrived.wait(10)

    def say(self, text):
        if text.startswith("SIGTERM received"):
            self.arrived.set()


def test_a_signal_after_the_last_step_is_obeyed_when_the_run_is_saved(folder, tmp_path):
    with pytest.raises(Preempted, match="saved at step 4, asked to stop") as stopped:
        train(recipe(folder), tmp_path / "run", Asked(4))
    assert stopped.value.hint is not None
    assert stopped.value.hint.startswith("the run is complete")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]
    assert train(recipe(folder), tmp_path / "run", Silent()).model is None


def test_a_run_without_held_out_rows_is_warned_of_trained_and_saved(folder, tmp_path):
    (tmp_path / "one.txt").write_text("one document and nothing beside it, " * 40)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        f"sources: {{one: {{kind: text, path: {tmp_path}/one.txt, separator: file, weight: 1}}}}"
    )
    heard = Warned()
    outcome = train(recipe(folder, f"data.mixture={mixture}"), tmp_path / "run", heard)
    assert outcome.heldout_nats == {}
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]
    assert heard.warnings == [
        "source `one` has no held-out loss: too few documents to hold one out; "
        "`separator: blank_line` makes documents of paragraphs"
    ]


@pytest.mark.slow
def test_stopped_where_held_out_loss_is_due_it_is_scored_on_resumption(folder, tmp_path):
    due = recipe(folder, "train.steps=6", "every.heldout_steps=1", "every.log_steps=1")
    train(due, tmp_path / "whole", Silent())
    with pytest.raises(Preempted, match="saved at step 3, asked to stop"):
        train(due, tmp_path / "run", Asked(2))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 1, 2, 2, 3]
    train(due, tmp_path / "run", Silent())
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def lines(run_dir):
    """What a repeated run writes again."""
    text = (run_dir / "metrics.jsonl").read_text()
    kept = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in kept]


def scored(values, before=lambda step, between_batches: None):
    """An evaluation that gives the value of the step, or raises it; and the steps it was asked."""
    steps = []

    def evaluate(model, progress, between_batches):
        steps.append(model.identity["step"])
        before(steps[-1], between_batches)
        value = values[steps[-1]]
        if isinstance(value, Exception):
            raise value
        return {"eval/failed_tasks": 0.0, "eval/t/accuracy/0_shots": value}

    return evaluate, steps


def eval_lines(run):
    return [line for line in lines(run) if "eval/failed_tasks" in line]


def test_a_failed_evaluation_is_told_and_training_goes_on(folder, tmp_path):
    told = []
    progress = Silent()
    progress.warn = told.append
    evaluate, steps = scored({1: 0.25, 2: DataError("no file x"), 3: OSError("disk\nand"), 4: 0.5})
    settings = recipe(folder, "every.eval_steps=1")
    outcome = train(settings, tmp_path / "run", progress, evaluate=evaluate)
    assert (outcome.step, outcome.failed_evals, steps) == (4, 2, [1, 2, 3, 4])
    assert told == ["step 2: not scored: no file x", "step 3: not scored: OSError: disk"]
    found = [(line["step"], line["eval/failed_tasks"]) for line in eval_lines(tmp_path / "run")]
    assert found == [(1, 0), (2, 1), (3, 1), (4, 0)]
    assert eval_lines(tmp_path / "run")[3]["eval/t/accuracy/0_shots"] == 0.5
    drawn = curves(tmp_path / "run" / "tensorboard")
    assert {key: value for key, value in drawn.items() if key[1].startswith("eval/")} == {
        (line["step"], name): value
        for line in eval_lines(tmp_path / "run")
        for name, value in line.items()
        if name.startswith("eval/")
    }


@pytest.mark.slow
def test_stopped_while_scoring_it_leaves_at_that_step_and_scores_on_resumption(folder, tmp_path):
    def interrupt(step, between_batches):
        between_batches()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            between_batches()
            time.sleep(0.01)

    settings = recipe(folder, "every.eval_steps=2")
    run = tmp_path / "run"
    with pytest.raises(Preempted, match="step 2"):
        train(settings, run, Silent(), evaluate=scored({2: 0.25}, interrupt)[0])
    assert eval_lines(run) == []
    evaluate, steps = scored({2: 0.25, 4: 0.5})
    train(settings, run, Silent(), evaluate=evaluate)
    assert steps == [2, 4]
    again, steps = scored({2: 0.25, 4: 0.5})
    train(settings, tmp_path / "whole", Silent(), evaluate=again)
    assert eval_lines(run) == eval_lines(tmp_path / "whole")


@pytest.mark.slow
def test_scores_on_file_are_not_made_again_on_resumption(folder, tmp_path):
    settings = recipe(folder, "every.eval_steps=2", "every.checkpoint_steps=2", "train.steps=2")
    train(settings, tmp_path / "run", Silent(), evaluate=scored({2: 0.25})[0])
    evaluate, steps = scored({4: 0.5})
    longer = recipe(folder, "every.eval_steps=2", "every.checkpoint_steps=2")
    train(longer, tmp_path / "run", Silent(), evaluate=evaluate)
    assert steps == [4]


class Killed(BaseException):
    """Ends a run as nothing that it could answer to."""


class KilledAt(Silent):
    def __init__(self, step):
        self.at = step

    def step(self, values):
        if values["step"] == self.at:
            raise Killed


def test_a_rewound_run_leaves_out_exactly_the_batches_of_its_record(folder, tmp_path, monkeypatch):
    """Also when it is killed before its next save; and twice from one rewind it is the same run."""
    seen = []

    def put(batch, *where):
        seen.append(batch["tokens"].tobytes())
        return global_batch(batch, *where)

    global_batch = loop.global_batch
    monkeypatch.setattr(loop, "global_batch", put)
    eight = recipe(folder, "train.steps=8", "every.checkpoint_steps=2", "every.log_steps=1")
    run, twin = tmp_path / "run", tmp_path / "twin"
    train(eight, run, Silent())
    batches, before = seen[:8], lines(run)
    rewind(run, 4, 2, "of the test")
    shutil.copytree(run, twin)
    with pytest.raises(Killed):
        train(eight, twin, KilledAt(7))
    for each in (run, twin):
        seen.clear()
        until = max(seconds_up_to(each / "metrics.jsonl"), seconds_before(each))
        assert until > 0
        heard = Warned()
        train(eight, each, heard)
        assert seen[:2] == batches[6:]
        at_4 = sum(Checkpoints(each / "checkpoints").meta(4)["seconds"].values())
        assert read_metrics(each / "metrics.jsonl")[-2]["seconds/lost"] == pytest.approx(
            until - at_4
        )
        assert "skipping batches 5 to 6, as recorded in rewinds.jsonl" in heard.said
        assert Checkpoints(each / "checkpoints").steps() == [8, 4]
        meta = Checkpoints(each / "checkpoints").meta(8)
        assert meta["skipped_batches"] == [[4, 6]]
    now = weights(run, 8)
    assert {name for name, x in weights(twin, 8).items() if (x != now[name]).any()} == set()
    assert (now["step"], now["opt_state/count"], now["bad_steps_total"]) == (8, 6, 0)
    assert lines(run) == lines(twin)
    assert lines(run)[:4] == before[:4]
    assert [line["step"] for line in lines(run)[4:]] == [7, 8, 8]
    restarts = [e.step for e in events_in(run / "tensorboard") if e.HasField("session_log")]
    assert restarts == [5]


def seconds_up_to(path):
    return max(run_seconds(line) for line in read_metrics(path))


def test_a_step_saved_anew_after_a_fallback_is_continued_like_any_other(folder, tmp_path):
    sets = ("train.steps=9", "every.checkpoint_steps=2", "every.log_steps=1")
    nine, run = recipe(folder, *sets), tmp_path / "run"
    train(recipe(folder, *sets, "train.steps=8"), run, Silent())
    rewind(run, 6, 1)
    damage(run / "checkpoints/6")
    shutil.copytree(run, tmp_path / "whole")
    train(nine, tmp_path / "whole", heard := Warned())
    assert heard.warnings[-1] == (
        "step 6 cannot be used, so batches 7 to 7 are not left out; to leave them out, stop the "
        f"run and use `glam checkpoint rewind {tmp_path / 'whole'} --to 4 --skip-batches 3`"
    )
    with pytest.raises(Killed):
        train(nine, run, KilledAt(7))
    assert Checkpoints(run / "checkpoints").latest() == 6
    train(nine, run, Silent())
    before, after = weights(tmp_path / "whole", 9), weights(run, 9)
    assert {name for name, x in before.items() if (x != after[name]).any()} == set()
    assert lines(run) == lines(tmp_path / "whole")


def damage(step):
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")


def test_a_damaged_record_loses_no_step_before_it_and_how_to_go_on_is_said(folder, tmp_path):
    ten, run = recipe(folder, "train.steps=10", "every.checkpoint_steps=6"), tmp_path / "run"
    for _ in range(2):
        faults.arm(faults.requested("bad_record@9", allowed=True))
        with pytest.raises(DataError, match=r"row \d+ of source `text` cannot be read") as ended:
            train(ten, run, Silent())
        assert ended.value.hint.endswith(
            f"or go on without it: `glam checkpoint rewind {run} --to 8 --skip-batches 1`"
        )
        assert Checkpoints(run / "checkpoints").steps() == [8, 6]
    faults.arm([])
    rewind(run, 8, 1)
    train(ten, run, Silent())
    assert Checkpoints(run / "checkpoints").meta(10)["skipped_batches"] == [[8, 9]]


def test_a_request_to_stop_outlives_the_attempt_that_goes_back(folder, tmp_path, monkeypatch):
    attempts = []

    def attempt(*arguments):
        *_, stop, times = arguments
        attempts.append(times)
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.requested:
            time.sleep(0.01)
        raise GoBack("it exploded", 4, 2)

    monkeypatch.setattr(loop, "_attempt", attempt)
    with pytest.raises(Preempted, match="went back, asked to stop"):
        train(recipe(folder), tmp_path / "run", Silent())
    assert len(attempts) == 1


def test_time_goes_on_from_one_attempt_to_the_next(folder, tmp_path, monkeypatch):
    began, ended = [], []

    def attempt(*arguments):
        began.append(arguments[-1]._until)
        ended.append(GoBack("it exploded", 4, 2))
        raise ended[-1] if len(ended) == 1 else Killed

    monkeypatch.setattr(loop, "_attempt", attempt)
    with pytest.raises(Killed):
        train(recipe(folder), tmp_path / "run", Silent(), since=3.0)
    assert began == [3.0, ended[0].at]


def test_a_rewind_that_skips_to_the_end_is_refused(folder, tmp_path):
    train(recipe(folder, "train.steps=8", "every.checkpoint_steps=4"), tmp_path / "run", Silent())
    rewind(tmp_path / "run", 4, 3)
    with pytest.raises(CheckpointError, match="skips batches up to 7, which leaves nothing of 6"):
        train(recipe(folder, "train.steps=6"), tmp_path / "run", Silent())

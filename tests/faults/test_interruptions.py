"""A run that is killed, stopped and continued equals one that was left alone, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

import glamcli
from glamcli.checkpoint import Checkpoints
from glamcli.errors import RecipeError
from glamcli.hosts.join import ALONE
from glamcli.train.folder import take_folder
from runs import (
    STEPS,
    assert_continues,
    assert_same_run,
    kill_at_a_random_moment,
    metrics,
    weights,
)


@pytest.mark.slow
def test_killed_then_stopped_then_continued_equals_uninterrupted(train, uninterrupted, tmp_path):
    run = train(tmp_path / "run")
    run.until_step(15)
    run.process.kill()
    run.finish()

    run = train(tmp_path / "run")
    run.until("step")
    run.process.send_signal(signal.SIGTERM)
    code, err = run.finish()
    assert code == 75
    saved = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit())
    assert f"saved at step {saved}, asked to stop" in err
    assert "hint: rerun the same command" in err

    assert_continues(train(tmp_path / "run"), saved, uninterrupted)


@pytest.mark.slow
def test_a_run_that_is_traced_and_stopped_meanwhile_equals_uninterrupted(
    train, uninterrupted, tmp_path
):
    traced = (tmp_path / "run", "--profile", f"5:{STEPS}")
    first = train(*traced)
    first.until_step(9)
    first.process.send_signal(signal.SIGINT)
    code, err = first.finish()
    assert code == 75, err
    saved = Checkpoints(tmp_path / "run/checkpoints").latest()
    assert_continues(train(*traced), saved, uninterrupted)
    traces = sorted((tmp_path / "run/profile/plugins/profile").rglob("*.xplane.pb"))
    assert {path.parent.name for path in traces} == {f"5-{saved}", f"{saved + 1}-{STEPS}"}
    assert all(b"/router/" in path.read_bytes() for path in traces)


@pytest.mark.slow
def test_a_run_leaves_nothing_outside_its_folder_and_the_cache(recipe, tmp_path):
    """Also not in the home folder, the folder for temporary files, and where it was started."""
    places = {name: tmp_path / name for name in ("home", "temporary", "here", "data")}
    for place in places.values():
        place.mkdir()
    for file in recipe.parent.glob("*.txt"):
        shutil.copy(file, places["data"])
    shutil.copy(recipe.parent / "mixture.yaml", places["data"])
    text = recipe.read_text().replace(", cache_dir: ./cache", "")
    (places["data"] / "tiny.yaml").write_text(text)
    before = sorted(path.name for path in places["data"].iterdir())
    environment = {name: value for name, value in os.environ.items() if "XDG" not in name}
    environment |= {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"])}
    glam = [sys.executable, "-c", "from glamcli.cli.main import run; run()"]
    ended = subprocess.run(
        [*glam, "train", str(places["data"] / "tiny.yaml"), "--set", "train.steps=7", "--json"],
        cwd=places["here"],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert Checkpoints(places["here"] / "runs/tiny/checkpoints").steps() == [7]
    assert [path.name for path in places["here"].iterdir()] == ["runs"]
    assert [path.name for path in (places["here"] / "runs").iterdir()] == ["tiny"]
    assert list(places["temporary"].iterdir()) == []
    assert [path.name for path in places["home"].iterdir()] == [".cache"]
    assert [path.name for path in (places["home"] / ".cache").iterdir()] == ["glam"]
    assert sorted(path.name for path in places["data"].iterdir()) == before


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(train, uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.name != ".lock"}
    run = train(uninterrupted)
    run.until("say", text=f"{uninterrupted} is finished: step {STEPS}, nothing left to do")
    assert run.finish()[0] == 0
    after = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.name != ".lock"}
    assert after == before


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_intact(train, tmp_path):
    run = train(tmp_path / "run", "--set", "train.steps=100000")
    run.until("say", text="step 7: saved")
    run.process.send_signal(signal.SIGSTOP)  # both signals arrive in the same step
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGCONT)
    code, err = run.finish()
    assert code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "Traceback" not in err
    step = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert step is not None
    assert step % 7 == 0
    assert weights(tmp_path / "run", step)["step"] == step


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused(train, tmp_path):
    first = train(tmp_path / "run", "--set", "train.steps=100000")
    first.until_step(1)
    code, err = train(tmp_path / "run").finish()
    assert code == 4
    assert f"in use by process {first.process.pid}" in err
    first.process.send_signal(signal.SIGINT)
    assert first.finish()[0] == 75


@pytest.mark.parametrize(
    ("phase", "code"),
    [pytest.param("compiling", 75, marks=pytest.mark.slow), ("preparing numbers", 130)],
    ids=["compile", "data"],
)
def test_a_signal_before_the_first_step_ends_cleanly(train, recipe, tmp_path, phase, code):
    # Other row lengths: nothing of this was compiled or prepared before.
    length = {"compiling": 40, "preparing numbers": 48}[phase]
    sets = ["--set", f"batch.row_tokens={length}", "--set", f"moe.group_tokens={length}"]
    run = train(tmp_path / "run", *sets)
    for event in run.events():
        if event["event"] == "phase" and event["name"].startswith(phase):
            break
    run.process.send_signal(signal.SIGTERM)
    found, err = run.finish()
    assert found == code, err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_killed_at_twenty_random_moments_equals_uninterrupted(train, uninterrupted, tmp_path):
    rng = random.Random(20)
    for _ in range(20):
        kill_at_a_random_moment(train(tmp_path / "run"), rng)
    code, err = train(tmp_path / "run").finish()
    assert code == 0, err
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_continues_on_eight_then_four_devices_then_one(train, uninterrupted, tmp_path):
    for num_devices, steps in ((8, 14), (4, 28), (1, STEPS)):
        run = train(tmp_path / "run", "--set", f"train.steps={steps}", num_devices=num_devices)
        warned = [each["text"] for each in run.events() if each["event"] == "warn"]
        code, err = run.finish()
        assert code == 0, err
        assert num_devices == 8 or any("not bit for bit" in text for text in warned)
    # Of single steps: `loss` is a mean since the line before, and this run has more lines.
    changed = [line for line in metrics(tmp_path / "run") if "total_loss" in line]
    reference = {line["step"]: line for line in metrics(uninterrupted) if "total_loss" in line}
    for line in changed:
        if line["step"] in reference:
            expected = reference[line["step"]]["total_loss"]
            assert line["total_loss"] == pytest.approx(expected, rel=1e-2)
    meta = json.loads((tmp_path / f"run/checkpoints/{STEPS}/meta/metadata").read_text())
    assert meta["topology"]["mesh"]["data"] == 1


@pytest.mark.slow
def test_a_folder_of_any_name_is_trained_in_and_read(train, tmp_path):
    folder = tmp_path / "a b" / ("größe 模型 {red} $(x) 'y' %s #" + "n" * 150)
    assert train(folder, "--set", "train.steps=7").finish()[0] == 0
    run = train(folder, "--set", "train.steps=9")
    run.until("say", text="continuing from step 7")
    code, err = run.finish()
    assert code == 0, err
    assert glamcli.open(folder).step == 9


@pytest.mark.parametrize("name", ["run[1]", "a*b", "why?", "back\\slash", "gs:"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused(tmp_path, name):
    with ExitStack() as stack, pytest.raises(RecipeError, match="no checkpoints can be kept in"):
        take_folder(tmp_path / name / "run", ALONE, stack)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_damaged_compile_cache_costs_its_compilation(train, tmp_path):
    places = {"first": tmp_path / "first", "second": tmp_path / "second"}
    # Every program is kept, however fast it was compiled.
    keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path)}
    short = ("--set", "train.steps=7", "--set", f"data.cache_dir={tmp_path / 'cache'}")
    assert train(places["first"], *short, **keep).finish()[0] == 0
    kept = [path for path in (tmp_path / "cache/compiled").rglob("*") if path.is_file()]
    assert len(kept) > 2
    for k, path in enumerate(kept):
        data = path.read_bytes()
        damaged = (b"", data[: len(data) // 2], data[:-1] + b"?", bytes(len(data)))[k % 4]
        path.write_bytes(damaged)
    code, err = train(places["second"], *short, **keep).finish()
    assert code == 0, err
    assert_same_run(places["first"], places["second"], 7)

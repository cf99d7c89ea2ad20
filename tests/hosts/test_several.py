"""Two processes of four devices on one machine are one run, and end as one."""

import hashlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.data.open import open_data
from glamcli.progress import Silent
from glamcli.train.rewind import rewind
from runs import AT_THE_TENTH, LONG, SMALL, assert_same_run, finished, free_port, metrics, weights

# Writes which rows a process got for which place of which batch.
RECORD = """
import hashlib, json, os
from glamcli.train import loop
steps, put = iter(range(10**6)), loop.global_batch
def record(batch, here, layout):
    numbers = [n for block in here for n in block]
    rows = [hashlib.sha256(row.tobytes()).hexdigest() for row in batch["tokens"]]
    with open(os.environ["ROWS"], "a") as file:
        file.write(json.dumps([next(steps), dict(zip(numbers, rows, strict=True))]) + "\\n")
    return put(batch, here, layout)
loop.global_batch = record
"""
# What process 1 does instead of going on, at the tenth step that it was given.
HANGS = {
    "sleeps": "time.sleep(500)",
    "keeps the interpreter": "ctypes.PyDLL(None).sleep(500)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}
# Process `victim` never comes to start the checkpoint after step 7's, so that nobody completes one.
SAVES_FOR_EVER = """
import time
from glamcli.checkpoint import Checkpoints
save = Checkpoints.save
def stuck(checkpoints, step, state, meta):
    if checkpoints.host.index == {victim} and step > 7:
        checkpoints.folder.parent.joinpath("stuck").touch()
        time.sleep(500)
    save(checkpoints, step, state, meta)
Checkpoints.save = stuck
"""
TASK = 'data: {path: sums.jsonl}\nprompt: "{a} and {b} make"\noptions: o\nlabel: right\n'
ITEM = '{"a": %d, "b": %d, "o": ["odd", "even"], "right": %d}\n'


def rows(*files: Path) -> dict[int, dict[str, str]]:
    """By step, the rows in every place of the batch."""
    found: dict[int, dict[str, str]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            step, places = json.loads(line)
            assert not found.setdefault(step, {}).keys() & places.keys()
            found[step] |= places
    return found


def by_step(folder: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in metrics(folder) if name in line}


def scores(folder: Path) -> dict[tuple[int, str], float]:
    """Scores of tasks by step and name."""
    return {
        (line["step"], name): value
        for line in metrics(folder)
        for name, value in line.items()
        if name.startswith("eval/")
    }


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def listening() -> list[tuple[str, int]]:
    """Addresses, as the kernel writes them, and ports that somebody on this machine listens at."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    places = [line[1].split(":") for line in lines if line[3] == "0A"]
    return [(host, int(port, 16)) for host, port in places]


@pytest.mark.slow
def test_two_processes_read_each_its_rows_and_one_continues(several, train, recipe, tmp_path):
    where = {"first": RECORD, "ROWS": lambda k: str(tmp_path / f"{k}")}
    two = several(tmp_path / "run", *SMALL, "--set", "train.steps=4", **where)
    first, other = finished(two)
    assert first == ""
    assert "[Gloo]" not in other
    assert all(json.loads(line) for line in two[0].rest.splitlines())
    assert two[1].rest == ""
    read = rows(tmp_path / "0", tmp_path / "1")
    dataset = open_data(load_recipe(str(recipe), []).recipe, Silent())
    with dataset.batches(0, 4) as batches:
        for step, batch in enumerate(batches):
            digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in batch["tokens"]]
            assert read[step] == {str(place): row for place, row in enumerate(digests)}
    assert {len(places) for places in rows(tmp_path / "0").values()} == {4}

    finished([train(tmp_path / "run", *SMALL, "--set", "train.steps=5", num_devices=8)])
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == sorted(steps)
    assert Checkpoints(tmp_path / "run/checkpoints").latest() == 5


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(several, train, tmp_path):
    # Sums in another order change last bits, and losses part where a choice of expert turns on
    # them: drawn second experts do, and at ten times this learning rate chosen ones did.
    calm = ("--set", "moe.second_policy=all", "--set", "optimizer.learning_rate=1e-3")
    finished(several(tmp_path / "run", *calm, "--set", "train.steps=14"))
    finished([train(tmp_path / "alone", *calm, "--set", "train.steps=16", num_devices=8)])
    finished([train(tmp_path / "run", *calm, "--set", "train.steps=16", num_devices=8)])
    # `loss` is a mean since the line before, and the resumed run has one more, where it had ended.
    for name in ("total_loss", "grad_norm"):
        alone, found = by_step(tmp_path / "alone", name), by_step(tmp_path / "run", name)
        found = {step: value for step, value in found.items() if step in alone}
        assert found == pytest.approx(alone, rel=1e-5)  # the last steps are the resumed ones
        assert len(set(alone.values())) == len(alone) > 5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    together = [line for line in lines if "slowest_process_seconds" in line]
    assert together
    assert all(line["memory/process_bytes"] > 1e8 for line in together)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_either_saves_one_common_step(several, tmp_path, victim, number):
    whole = several(tmp_path / "whole", "--set", "train.steps=21")
    finished(whole)
    runs = several(tmp_path / "run", "--set", "train.steps=21")
    runs[0].until_step(8)
    runs[victim].process.send_signal(number)
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [75, 75], ends
    saved = {re.search(r"saved at step (\d+), asked to stop", err)[1] for _, err in ends}
    assert len(saved) == 1
    step = int(saved.pop())
    assert Checkpoints(tmp_path / "run/checkpoints").latest() == step
    assert weights(tmp_path / "run", step)["step"] == step
    finished(several(tmp_path / "run", "--set", "train.steps=21"))
    assert_same_run(tmp_path / "whole", tmp_path / "run", 21)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_at_once_and_is_named(several, tmp_path, victim):
    runs = several(tmp_path / "run", *LONG)
    runs[0].until("say", text="step 7: saved")
    runs[victim].process.kill()
    killed = time.monotonic()
    code, err = runs[1 - victim].finish()
    assert code == 134, err
    assert time.monotonic() - killed < 60  # and not after the heartbeat of 100
    assert f"process {victim} ({socket.gethostname()}) is gone" in err
    assert "Traceback" not in err
    # The folder is free again, also after process 0 was killed, and holds a whole checkpoint.
    runs = several(tmp_path / "run", *LONG)
    runs[0].until_step(8)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("sleeps", 86), ("keeps the interpreter", 1)])
def test_a_hung_process_is_ended_with_its_stacks(several, tmp_path, how, code):
    hang = AT_THE_TENTH.format(when="== 9", what=HANGS[how])
    runs = several(tmp_path / "run", *LONG, "--set", "runtime.step_timeout_seconds=6", first=hang)
    runs[0].until_step(6)
    ends = [run.finish() for run in runs]
    # Process 0 is in the same hang, unless it notices before that the other one has left.
    assert ends[1][0] == code, ends
    assert ends[0][0] in (86, 134), ends
    for index, (_, err) in enumerate(ends):
        if ends[index][0] != 1:  # with a locked interpreter only the stacks are shown
            name = f"process {index} ({socket.gethostname()})"
            assert f"{name} got no further for 6 s, in step" in err
        assert "most recent call first" in err
    assert "in hang" in ends[1][1]
    assert "in hang" not in ends[0][1]


@pytest.mark.slow
def test_a_stopped_process_ends_the_others_within_the_heartbeat(several, tmp_path):
    hang = AT_THE_TENTH.format(when="== 9", what=HANGS["is stopped"])
    runs = several(tmp_path / "run", *LONG, "--set", "runtime.heartbeat_seconds=8", first=hang)
    runs[0].until_step(6)
    code, err = runs[0].finish()
    assert code in (134, -signal.SIGABRT)
    assert "(stopped sending heartbeats):\n1\n" in err


@pytest.mark.slow
def test_the_error_of_one_process_ends_all_with_its_words(several, tmp_path):
    fails = AT_THE_TENTH.format(when="== 9", what='raise DataError("disk 7 is gone", hint="look")')
    runs = several(tmp_path / "run", *LONG, first=fails)
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [3, 3], ends
    assert ends[1][1].count("error: disk 7 is gone\nhint: look") == 1
    assert f"process 1 ({socket.gethostname()}) failed: disk 7 is gone\nhint: look" in ends[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_second_signal_leaves_at_once_and_takes_the_others_along(several, tmp_path, victim):
    # The victim saves for ever, so that the second signal finds it at it.
    runs = several(tmp_path / "run", *LONG, first=SAVES_FOR_EVER.format(victim=victim))
    runs[0].until("say", text="step 7: saved")
    runs[victim].process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "run" / "stuck")
    runs[victim].process.send_signal(signal.SIGINT)
    assert runs[victim].finish()[0] == 128 + signal.SIGINT
    code, err = runs[1 - victim].finish()
    assert code == 134, err
    assert f"process {victim} ({socket.gethostname()}) is gone" in err
    assert Checkpoints(tmp_path / "run/checkpoints").latest() == 7
    finished(several(tmp_path / "run", "--set", "train.steps=12"))


@pytest.mark.slow
def test_folders_that_are_no_checkpoints_are_passed_over_by_all(several, train, tmp_path):
    finished([train(tmp_path / "run", *SMALL, "--set", "train.steps=16")])
    folder = tmp_path / "run/checkpoints"
    assert sorted(Checkpoints(folder).steps()) == [7, 14, 16]
    (folder / "16/state/_METADATA").unlink()  # torn
    (folder / "14").rename(folder / "999")  # a renamed copy
    runs = several(tmp_path / "run", *SMALL, "--set", "train.steps=20")
    other = finished(runs)[1]
    said = runs[0].rest
    assert "checkpoints/16 cannot be used: the state is missing or half written" in said
    assert "checkpoints/999 cannot be used: it holds step 14" in said
    assert "continuing from step 7" in said
    assert "cannot be used" not in other
    assert sorted(Checkpoints(folder).steps()) == [7, 14, 20]
    assert sorted(path.name for path in (folder / "set-aside").iterdir()) == ["16", "999"]


@pytest.mark.slow
def test_batches_that_a_rewind_leaves_out_are_left_out_by_all(several, train, recipe, tmp_path):
    finished([train(tmp_path / "run", *SMALL, "--set", "train.steps=14")])
    rewind(tmp_path / "run", 7, skip_batches=3)
    where = {"first": RECORD, "ROWS": lambda k: str(tmp_path / f"{k}")}
    finished(several(tmp_path / "run", *SMALL, "--set", "train.steps=14", **where))
    read = rows(tmp_path / "0", tmp_path / "1")
    dataset = open_data(load_recipe(str(recipe), []).recipe, Silent())
    with dataset.batches(10, 4) as batches:
        for step, batch in enumerate(batches):
            digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in batch["tokens"]]
            assert read[step] == {str(place): row for place, row in enumerate(digests)}
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    assert checkpoints.meta(14)["skipped_batches"] == [[7, 10]]
    after = weights(tmp_path / "run", 14)
    assert (after["step"], after["opt_state/count"]) == (14, 11)


@pytest.mark.slow
def test_tasks_are_scored_during_training_as_by_one_process(several, train, tmp_path):
    (tmp_path / "sums.yaml").write_text(TASK)
    items = [ITEM % (i, 3 * i + 1, i % 2) for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(items))
    # Drawn second experts turn on the last bit of a weight, which sums in another order change.
    settings = ("every.eval_steps=4", f"eval.suite={tmp_path}/sums.yaml", "train.steps=8")
    settings = (*settings, "moe.second_policy=all", "eval.shots=[0, 1]")
    sets = [part for each in settings for part in ("--set", each)]
    finished(several(tmp_path / "two", *sets))
    finished([train(tmp_path / "one", *sets)])
    two, one = (scores(tmp_path / name) for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)
    assert {step for step, name in two} == {4, 8}
    assert two[4, "eval/failed_tasks"] == 0


@pytest.mark.slow
def test_an_evaluation_that_fails_on_one_machine_costs_its_scores_alone(several, tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sums.yaml").write_text(TASK)
        (tmp_path / name / "sums.jsonl").write_text(ITEM % (1, int(name), 1))
    runs = several(
        tmp_path / "run",
        *("--set", "every.eval_steps=4", "--set", "train.steps=6", "--set", "eval.suite=sums.yaml"),
        first='import os; os.chdir(os.environ["WHERE"])',
        WHERE=lambda k: str(tmp_path / str(k)),
    )
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [3, 3], ends
    assert f"not the same in process 1 ({socket.gethostname()})" in runs[0].rest
    assert scores(tmp_path / "run") == {(4, "eval/failed_tasks"): 1}
    assert Checkpoints(tmp_path / "run/checkpoints").latest() == 6


@pytest.mark.slow
def test_a_slow_process_is_named(several, tmp_path):
    slow = AT_THE_TENTH.format(when="> 0", what="time.sleep(0.5)")
    runs = several(tmp_path / "run", *LONG, first=slow)
    for event in runs[0].events():
        if event["event"] == "warn" and "the others wait" in event["text"]:
            break
    assert event["text"].startswith(f"the others wait for process 1 ({socket.gethostname()})")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["slowest_process"] for x in lines if "slowest_process" in x][-1] == 1


def test_a_missing_process_is_named(several, tmp_path):
    (run,) = several(tmp_path / "run", "--set", "runtime.join_seconds=1", of=3, only=0)
    code, err = run.finish()
    assert code == 134
    assert "process 1, process 2 of 3 did not come to 127.0.0.1:" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_process_zero_missing_is_said(several, tmp_path):
    (run,) = several(tmp_path / "run", "--set", "runtime.join_seconds=1", only=1)
    code, err = run.finish()
    assert code == 134
    assert "process 0 did not answer at 127.0.0.1:" in err


@pytest.mark.slow
def test_another_recipe_is_refused_by_all_naming_the_odd_one(train, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    place = ("--coordinator", address, "--num-processes", "3", "--process-id")
    # Process 2 takes its time; jax would abort it if 0, which holds the coordinator, left before.
    slow = "tell = join.Host._fail; join.Host._fail = lambda *its: (tell(*its), time.sleep(2))"
    first = f"import time; from glamcli.hosts import join; {slow}"
    runs = [
        train(
            *(tmp_path / "run", *place, str(k), "--set", f"seed={int(k == 1)}"),
            first=first if k == 2 else "",
        )
        for k in range(3)
    ]
    for code, err in [run.finish() for run in runs]:
        assert code == 2
        assert f"process 1 ({socket.gethostname()}): `seed` is 1 there, 0 elsewhere" in err


@pytest.mark.slow
def test_a_cache_of_its_own_for_every_process(several, recipe, tmp_path):
    text = recipe.read_text().replace(", cache_dir: ./cache", "")
    for file in recipe.parent.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tiny.yaml").write_text(text)
    apart = {"XDG_CACHE_HOME": lambda k: str(tmp_path / f"cache{k}")}
    here = tmp_path / "tiny.yaml"
    finished(several(tmp_path / "run", *SMALL, "--set", "train.steps=3", recipe=here, **apart))
    rows = [sorted(p.name for p in (tmp_path / f"cache{k}/glam/rows").iterdir()) for k in (0, 1)]
    assert rows[0] == rows[1] != []


@pytest.mark.slow
def test_the_coordinator_listens_on_its_address_alone(several, tmp_path):
    runs = several(tmp_path / "run", *LONG)
    runs[0].until_step(1)
    port = runs[0].process.args[runs[0].process.args.index("--coordinator") + 1].split(":")[1]
    places = [host for host, number in listening() if number == int(port)]
    assert places in (["0100007F"], ["0000000000000000FFFF00000100007F"])  # 127.0.0.1 of either


def test_a_port_in_use_is_one_line(train, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, err = train(
            tmp_path / "run", *("--coordinator", address), "--num-processes=2", "--process-id=0"
        ).finish()
    assert code == 2
    assert f"error: process 0 cannot listen on {address}: Address already in use\n" in err
    assert os.listdir(tmp_path) == []

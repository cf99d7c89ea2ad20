"""Trackio and Weights & Biases: what they get, and that nothing they do reaches training."""

import fcntl
import json
import os
import resource
import time
from contextlib import nullcontext

import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import RecipeError
from glamcli.hosts.join import ALONE, Host
from glamcli.hosts.pace import Pace
from glamcli.progress import Silent
from glamcli.train import loggers
from glamcli.train.loggers import LOGGED_AS, ProcessLogger, check_loggers
from glamcli.train.meter import Meter

FAKE = """
import json, os, sys, time
def note(*what):
    with open({calls!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    url = "https://user:secret@example.org/run"
    def define_metric(self, name, **options): pass
    def log(self, numbers, step=None):
        {log}
        note("log", numbers, step)
    def finish(self):
        {finish}
        note("finish")
def init(**options):
    print("a package that prints")
    {init}
    note("init", options)
    return Run()
log, finish = Run().log, Run().finish
"""


class Heard(Silent):
    def __init__(self):
        self.said, self.warned = [], []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warned.append(text)


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Logs steps with a fake package that does something at `init`, `log` or `finish`: its calls,
    and what was said and warned."""
    path, site = tmp_path / "calls.jsonl", tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    recipe = load_recipe("test-tiny", ["about=from https://user:secret@example.org"]).recipe

    def logged(module="trackio", first=1, last=3, recipe=recipe, **does):
        actions = {"log": "", "finish": "", "init": "", **does}
        (site / f"{module}.py").write_text(FAKE.format(calls=str(path), **actions))
        heard, run_dir = Heard(), tmp_path / "my run"
        run_dir.mkdir(exist_ok=True)
        logger = ProcessLogger(module, recipe, run_dir, heard)
        for step in range(first, last + 1):
            logger.write(
                {"step": step, "loss": 1.0 / step, "load_by_layer": [[0.5]], "x": [1, None]}
            )
        logger.close()
        logger.close()
        calls = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return calls, heard

    return logged


def test_trackio_gets_every_number_and_a_resumed_run_goes_on_there(logged):
    calls, heard = logged()
    (_, options), *steps, finish = calls
    assert steps[1] == ["log", {"loss": 0.5, "x/1": 1.0}, 2]
    assert ([step for _, _, step in steps], finish) == ([1, 2, 3], ["finish"])
    assert (options["project"], options["resume"]) == ("glam", "allow")
    assert options["name"].startswith("my-run-")
    assert (heard.said, heard.warned) == ([], [])
    again = logged(first=2, last=4)[0][len(calls) :]
    assert again[0] == ["init", options]
    assert [call[2] for call in again[1:-1]] == [2, 3, 4]


def test_weights_and_biases_gets_the_step_as_a_number_because_its_own_never_goes_back(logged):
    calls, heard = logged("wandb")
    (_, options), *steps, _ = calls
    assert steps[0] == ["log", {"step": 1, "loss": 1.0, "x/1": 1.0}, None]
    assert (options["id"], options["resume"]) == (options["name"], "allow")
    assert options["settings"]["console"] == "off"
    assert heard.said == ["Weights & Biases: https://***@example.org/run"]


def test_what_is_sent_and_kept_has_no_credentials(logged, tmp_path):
    (_, options), *_ = logged("wandb")[0]
    assert options["config"]["model"]["num_layers"] == 2
    assert "secret" not in json.dumps(options)
    assert json.loads((tmp_path / "my run" / LOGGED_AS).read_text()) == {"name": options["id"]}


def test_an_address_with_a_query_in_quotes_reaches_a_logger_without_it(logged):
    prompt = 'see "https://example.org/?key=secret" now'
    recipe = load_recipe("test-tiny", [f"finish.prompt={prompt}"]).recipe
    (_, options), *_ = logged(recipe=recipe)[0]
    assert options["config"]["finish"]["prompt"] == 'see "https://example.org/?***" now'


def test_a_logger_runs_no_module_of_the_working_folder(logged, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    calls, heard = logged()
    assert (len(calls), heard.warned) == (5, [])


def test_a_run_with_many_open_files_still_waits_for_its_loggers(logged, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    close = ProcessLogger.close

    def closing(logger):
        if (process := logger._process) is not None:
            high = fcntl.fcntl(process.stdin, fcntl.F_DUPFD_CLOEXEC, 1500)
            process.stdin.close()
            process.stdin = os.fdopen(high, "wb", buffering=0)
            logger._send(step=4, numbers={"x": 1.0}, more=" " * (1 << 19))
            assert logger._unsent
        close(logger)

    monkeypatch.setattr(ProcessLogger, "close", closing)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        calls, heard = logged()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (calls[-2:], heard.warned) == ([["log", {"x": 1.0}, 4], ["finish"]], [])


@pytest.mark.parametrize("damage", ["", "[]", '{"name": "../x"}', '{"name": 5}'])
def test_a_damaged_name_is_replaced(logged, tmp_path, damage):
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / LOGGED_AS).write_text(damage)
    (_, options), *_ = logged()[0]
    assert options["name"].startswith("my-run-")


@pytest.mark.parametrize(
    ("does", "num_calls", "reason"),
    [
        ({"init": "raise ValueError('no\\nkey')"}, 0, "failed (ValueError: no key)"),
        ({"init": "sys.exit(3)"}, 0, "failed (SystemExit: 3)"),
        ({"log": "if len(numbers) == 2: raise OSError('down')"}, 2, "failed (OSError: down)"),
        ({"finish": "raise OSError('down')"}, 4, "failed (OSError: down)"),
        ({"init": "os._exit(7)"}, 0, "has ended with 7"),
    ],
)
def test_a_failure_is_told_once_and_lines_are_counted(logged, does, num_calls, reason):
    calls, heard = logged(**does)
    assert len(calls) == num_calls
    assert heard.warned[0] == f"Trackio {reason}; training goes on"
    assert heard.warned[1:] in ([], ["Trackio: lines left out: 3"])
    assert bool(heard.warned[1:]) == (num_calls < 4 and "ended" not in reason)


def test_a_logger_that_hangs_is_left_to_itself_and_ends(logged, monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(loggers, "LINGER_SECONDS", 3)
    left, write = len(loggers._lingering), ProcessLogger.write

    def until_it_is_full(logger, values):
        until = time.monotonic() + 60
        while not logger._has_warned and time.monotonic() < until:
            write(logger, values)

    monkeypatch.setattr(ProcessLogger, "write", until_it_is_full)
    calls, heard = logged(log="time.sleep(1000)")
    assert [name for name, *_ in calls] == ["init"]
    assert heard.warned[:2] == [
        "Trackio failed (too slow, lines are left out); training goes on",
        "Trackio has not taken everything: it may go on for 3 s",
    ]
    (process,) = loggers._lingering[left:]
    assert process.wait(30) == 1


def test_what_a_pipe_does_not_take_is_left_out_and_counted(logged, monkeypatch):
    monkeypatch.setattr(loggers, "MAX_UNSENT_BYTES", 10)
    assert logged()[1].warned == [
        "Trackio does not read, lines are left out; training goes on",
        "Trackio: lines left out: 4",
    ]


def test_a_logger_ends_with_a_killed_run(logged, monkeypatch, tmp_path):
    close, opened = ProcessLogger.close, []
    monkeypatch.setattr(ProcessLogger, "close", lambda logger: opened.append(logger))
    logged()
    opened[0]._process.stdin.close()  # as the kernel does
    calls, until = tmp_path / "calls.jsonl", time.monotonic() + 30
    while not calls.exists() or '["finish"]' not in calls.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    close(opened[0])


def test_a_missing_package_is_an_error_before_anything_starts():
    recipe = load_recipe("test-tiny", ["run.loggers=[tensorboard, trackio]"]).recipe
    with pytest.raises(RecipeError) as caught:
        check_loggers(recipe, ALONE)
    assert str(caught.value).startswith("`run.loggers` asks for Trackio, but `trackio` is not")
    assert caught.value.hint == "pip install 'glamcli[trackio]'"
    check_loggers(load_recipe("test-tiny").recipe, ALONE)


@pytest.mark.parametrize("is_first_without", [True, False])
def test_only_the_first_process_needs_a_package_and_all_hear_of_it(monkeypatch, is_first_without):
    def gathered(host, name, mine):
        return [mine, []] if is_first_without else [[], mine]

    monkeypatch.setattr(Host, "gather", gathered)
    recipe = load_recipe("test-tiny", ["run.loggers=[trackio]"]).recipe
    refused = pytest.raises(RecipeError) if is_first_without else nullcontext()
    with refused:
        check_loggers(recipe, Host(1, 2))


def test_without_loggers_only_the_metrics_are_written(tmp_path):
    recipe = load_recipe("test-tiny", ["run.loggers=[]"]).recipe
    about = (recipe, (), tmp_path, 0, Silent(), Pace(ALONE.name), Checkpoints(tmp_path / "c"), {})
    with Meter(*about) as meter:
        meter.evaluated(1, {"eval/x": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

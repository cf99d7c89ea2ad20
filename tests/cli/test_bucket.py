"""Every command reads a run in a bucket as it reads a copy of it on a disk."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest

import glamcli
from bucket import new_bucket, put_run
from cli.run_folder import make_run
from glamcli import trained
from glamcli.cli.watch import run_page
from glamcli.evals.results.journal import Journal
from glamcli.hosts.lease import Lease
from glamcli.step_folders import checksum
from glamcli.storage import place
from glamcli.stored_runs import local
from glamcli.train import watching
from glamcli.train.bucket import Bucket
from glamcli.train.watching import WatchedRun
from runs import free_port


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """A run on a disk with steps 2 and 3, of equal arrays, and the URL of the same."""
    folder = tmp_path_factory.mktemp("bucket")
    run = make_run(folder)
    lines = [{"step": step, "loss": 5.0 / step, "heldout/words": 1.5} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(run / "checkpoints/3", run / "checkpoints/2")
    description = run / "checkpoints/2/meta/metadata"
    meta = {**json.loads(description.read_text()), "step": 2}
    description.write_text(json.dumps({**meta, "checksum": checksum(meta)}))
    url = f"{new_bucket(request)}/runs/words"
    put_run(run, url, folder / "working")
    return run, url


CLOCK = re.compile(
    r'seconds": [\d.]+|[\d.:]+(?: s)? ago|in [\d.]+ s|\d{4}-\d\d-\d\d \d\d:\d\d|\w+: \d+/\d+ \w+ \n'
)
"""what differs with time: also how far a phase is, which is told every 15 seconds."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder; the current one is its parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def same(glam, cache):
    """Runs a command on a run of a disk and on one in a bucket, and expects the same, also of what
    is told; this, with the second one's URL."""

    def same(run, url, *words):
        here = glam(*[str(word).replace("RUN", str(run)) for word in words])
        there = glam(*[str(word).replace("RUN", url) for word in words])
        assert there[0] == here[0], there
        for ours, theirs in zip(here[1:], there[1:], strict=True):
            assert CLOCK.sub("", theirs.replace(url, str(run))) == CLOCK.sub("", ours)
        return there

    return same


@pytest.fixture
def both(same, runs):
    """The same of the run that the tests share."""
    return partial(same, *runs)


def test_steps_are_listed_and_verified(both, runs):
    code, out, _ = both("checkpoint", "list", "RUN")
    assert (code, "good" in out, "1.500" in out) == (0, True, True)
    assert f'"folder": "{runs[1]}/' in both("checkpoint", "list", "RUN", "--json")[1]
    assert both("checkpoint", "verify", "RUN")[1] == "step 2: verified\nstep 3: verified\n"
    assert both("checkpoint", "verify", "RUN", "--step", 4)[0] == 4
    assert "arrays are equal, 0 differ" in both("checkpoint", "diff", "RUN", "RUN/checkpoints/2")[1]


def test_a_suite_is_scored_kept_there_and_shown(both, runs, glam):
    assert glam("eval", "show", runs[1])[2].startswith(
        f"error: no results of `glam eval` in {runs[1]}/eval"
    )
    both("eval", "RUN", "--limit", 2, "--shots", 0, "--json")
    url = place(runs[1])
    name, items = sorted(each for each in url.files() if each.startswith("eval/"))[::-1]
    assert items == name.replace(".json", ".items.jsonl"), "and no journal"
    assert both("eval", "show", "RUN")[0] == 0
    assert both("eval", "show", "RUN", "RUN")[0] == 0
    assert glam("eval", "show", f"{runs[1]}/{name}", runs[0])[0] == 0
    none = f"{runs[1]}/eval/none.json"
    assert f"error: no results at {none}" in glam("eval", "show", none)[2]


def test_texts_are_the_same(both):
    assert both("generate", "RUN", "the stone", "--tokens", 8)[0] == 0


def test_a_report_shows_both_side_by_side_and_writes_nothing_there(glam, runs, tmp_path, cache):
    run, url = runs
    before = place(url).files()
    assert glam("report", run, url, "-o", tmp_path / "both.html")[0] == 0
    page = (tmp_path / "both.html").read_text()
    assert str(run) in page
    assert url in page
    assert str(cache) not in page
    for each in (run, url):
        code, out, _ = glam("report", each, "-o", tmp_path / "page.html")
        assert (code, out) == (0, "wrote page.html\n")
    assert place(url).files() == before


def test_it_is_watched(both):
    code, out, _ = both("watch", "RUN", "--once")
    assert code == 0
    assert "saved     step 3" in out


@pytest.fixture
def own(runs, cache, bucket, tmp_path):
    """The URL of a copy of the run, to be changed."""
    put_run(runs[0], f"{bucket}/own", tmp_path / "working")
    return f"{bucket}/own"


def test_a_step_that_training_deletes_while_it_is_read_is_left_for_the_next(glam, own, monkeypatch):
    restore, files = trained.restore_params, place(f"{own}/steps.json")

    def deleting(folder, *others):
        if folder.name == "3":
            texts = json.loads(files.read(1 << 30))
            files.write(json.dumps({k: v for k, v in texts.items() if k[0] != "3"}).encode())
            place(f"{own}/arrays/1/1-3").delete()
        return restore(folder, *others)

    monkeypatch.setattr(trained, "restore_params", deleting)
    code, out, err = glam("eval", own, "--limit", 1, "--shots", 0)
    assert (code, "step 2, percent" in out, "warning" in err) == (0, True, False)


def test_an_interrupted_evaluation_goes_on_on_another_machine(glam, own, monkeypatch, tmp_path):
    words, add = ("eval", own, "--limit", 4, "--shots", 0), Journal.add

    def interrupted(journal, *batch):
        add(journal, *batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        assert glam(*words)[0] == 130
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    code, _, err = glam(*words)
    assert (code, "continuing from 1 batches" in err) == (0, True)
    assert not [name for name in place(own).files() if "unfinished" in name]


def test_it_is_rewound_and_damage_is_left_for_an_older_step(glam, own):
    for path in (each for each in place(own).files() if "/1-3/d/" in each):
        place(f"{own}/{path}").write(b"")
    code, out, _ = glam("checkpoint", "verify", own)
    assert (code, f"step 3: damaged: checkpoint {own}/checkpoints/3" in out) == (4, True)
    code, out, err = glam("checkpoint", "rewind", own, "--to", 2, "--skip-batches", 1)
    assert (code, err.count("error")) == (0, 0)
    assert out == (f"step 3 is now {own}/checkpoints/set-aside/3\n\nnext:\n  glam train {own}\n")
    assert json.loads(place(f"{own}/lock.json").read(999))["holder"] == "nobody"
    assert place(f"{own}/metrics.jsonl").read(999).count(b"\n") == 2
    code, out, _ = glam("checkpoint", "list", own)
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["2", "good"], ["3", "set"]]
    assert "from step 3 to 2, 1 batches skipped" in out
    assert glam("checkpoint", "rewind", own, "--to", 3)[0] == 4


def test_a_rewind_that_cannot_be_uploaded_in_time_says_how_to_look_for_it(glam, own, monkeypatch):
    monkeypatch.setattr(Bucket, "uploaded", lambda bucket, seconds: False)
    code, out, err = glam("checkpoint", "rewind", own, "--to", 2)
    assert (code, out) == (4, "")
    assert f"{own} may not be changed: " in err
    assert f"`glam checkpoint list {own}`" in err


def test_a_run_that_trains_is_not_rewound(glam, own, monkeypatch):
    monkeypatch.setattr("glamcli.hosts.lease.RENEW_SECONDS", 0.02)
    lease = Lease(place(f"{own}/lock.json"), pytest.fail, pytest.fail)
    try:
        code, _, err = glam("checkpoint", "rewind", own, "--to", 2)
    finally:
        lease.release(60)
    assert (code, f"error: run folder {own} is in use by process" in err) == (4, True)
    assert "hint: stop it first" in err


def test_watching_goes_on_when_the_bucket_does_not_answer(glam, own, weather, monkeypatch):
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    watched = WatchedRun(place(own))
    watched.refresh()
    weather.fault = lambda method, path: 503
    watched.refresh()
    page = run_page(watched, 200, watched.read_at + 90)
    assert page[0] == f"{own}  stopped"
    assert page[2].startswith(f"no answer {own}: no answer, or none that helps")
    assert page[2].endswith("shown is what was there 1:30 ago")
    assert any("step 3" in line for line in page)
    code, out, err = glam("watch", own)
    assert (code, out, f"error: {own}: no answer" in err) == (4, "", True)
    weather.fault = lambda method, path: None
    watched.refresh()
    assert run_page(watched, 200, watched.read_at)[2].startswith("steps")


def test_who_trains_it_is_watched_and_whether_it_lives(own, monkeypatch):
    def write(**owner):
        place(f"{own}/lock.json").write(json.dumps({"holder": "process 5 on h", **owner}).encode())

    watched, states = WatchedRun(place(own)), []

    def look():
        watched.refresh()
        states.append(watched.state)

    write(beat=1)
    look()
    line = {"step": 4, "unix_seconds": time.time() + 5}
    place(f"{own}/metrics.jsonl").write(json.dumps(line).encode() + b"\n")
    write(beat=2)
    look()
    monkeypatch.setattr(watching, "STALE_SECONDS", -1.0)
    look()
    monkeypatch.setattr(watching, "STALE_SECONDS", 60.0)
    write(beat=3, holder="nobody")
    look()
    assert states == ["starting", "training", "stopped", "stopped"]


def test_the_python_interface_and_the_analyses_read_and_keep_there(glam, own):
    run = glamcli.open(own)
    assert (run.step, repr(run)) == (3, f"<glamcli.Run {own} at step 3>")
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    assert run.evaluate("last_word", shots=[0], limit=1).model["run"] == own
    assert glam("eval", "cooccurrence", own, "--samples", 1, "--tokens", 1)[0] == 0
    words = ("eval", "overlap", own, "--suite", "last_word", "--limit", 1, "--processes", 1)
    code, out, err = glam(*words)
    assert (code, f"kept in {own}/overlap/" in err, "of " + own in out) == (0, True, True)
    kept = {name.split("/")[0] for name in place(own).files()}
    assert {"eval", "bias", "overlap"} <= kept


def test_toxicity_and_lm_evals_own_command_take_its_url(glam, own, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": {"text": "stone", "toxicity": 0.1}}\n')
    (tmp_path / "words.json").write_text('{"bias": 0, "weights": {}}')
    words = ("--prompts", "prompts.jsonl", "--classifier", "words.json", "--tokens", 1)
    code, out, err = glam("eval", "toxicity", own, *words, "--samples", 1)
    assert (code, "0.1 to 0.2" in out, f"kept in {own}/bias/" in err) == (0, True, True), err
    pytest.importorskip("lm_eval")
    from glamcli.cli.harness import Glam

    model, text = Glam(path=f"{own}/checkpoints/2"), ("the stone", " river")
    asked = SimpleNamespace(args=text, task_name="t", doc_id=0)
    assert model.get_model_info()["glam"]["run"] == own
    (answer,) = model.loglikelihood([asked])
    assert answer[0] == glamcli.open(own).loglikelihood(text[0], [text[1]])[0]


@pytest.mark.slow
def test_a_run_that_was_trained_there_reads_as_a_copy_of_it_on_a_disk(
    train, same, glam, bucket, tmp_path
):
    url, copy = f"{bucket}/run", tmp_path / "copy"
    assert train(url, "--set", "train.steps=14").finish()[0] == 0
    shutil.copytree(local(place(url)), copy)
    for link in copy.glob("checkpoints/*/arrays.url"):
        arrays = place(link.read_text())
        for name in arrays.files():
            (link.parent / "state" / name).parent.mkdir(parents=True, exist_ok=True)
            (link.parent / "state" / name).write_bytes((arrays / name).read(1 << 30))
        link.unlink()
    assert "\n  14 good" in same(copy, url, "checkpoint", "list", "RUN")[1]
    assert same(copy, url, "checkpoint", "verify", "RUN")[0] == 0
    assert " differ\n" in same(copy, url, "checkpoint", "diff", "RUN", "RUN/checkpoints/7")[1]
    assert "finished" in same(copy, url, "watch", "RUN", "--once")[1]
    assert same(copy, url, "generate", "RUN", "the red fox", "--tokens", 8)[0] == 0
    assert glam("report", copy, url, "-o", tmp_path / "page.html")[0] == 0


@pytest.mark.slow
def test_two_processes_that_share_no_disk_score_it_together(own, tmp_path):
    place_of_all = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    words = ("eval", own, "--suite", "last_word", "--limit", "2", "--shots", "0", *place_of_all)
    start = [sys.executable, "-c", "from glamcli.cli.main import run; run()", *words]
    processes = [
        subprocess.Popen(
            [*start, "--process-id", str(index)],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / f"cache of {index}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (1, 0)
    ]
    try:
        ends = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    assert f"kept in {own}/eval/last_word-shots0-limit2-step3.json" in ends[1]

"""Every command reads a run in a bucket as it reads a copy of it on a disk."""

import json
import re

import pytest

from bucket import new_bucket, put_run
from cli.run_folder import make_run
from glamcli.storage import place


@pytest.fixture(scope="module")
def runs(object_server, tmp_path_factory):
    """A run on a disk, and the URL of the same."""
    folder = tmp_path_factory.mktemp("bucket")
    run = make_run(folder)
    lines = [{"step": step, "loss": 5.0 / step, "heldout/words": 1.5} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    url = f"{new_bucket(object_server)}/runs/words"
    put_run(run, url, folder / "working")
    return run, url


CLOCK = re.compile(r'seconds": [\d.]+|in [\d.]+ s|\d{4}-\d\d-\d\d \d\d:\d\d')


@pytest.fixture
def both(glam, runs, tmp_path, monkeypatch):
    """Runs a command on both, and expects the same; what it wrote on the one in the bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, url = runs

    def both(*words):
        here = glam(*[str(word).replace("RUN", str(run)) for word in words])
        there = glam(*[str(word).replace("RUN", url) for word in words])
        assert there[0] == here[0], there
        for ours, theirs in zip(here[1:], there[1:], strict=True):
            assert CLOCK.sub("", theirs.replace(url, str(run))) == CLOCK.sub("", ours)
        return there

    return both


def test_steps_are_listed_and_verified(both):
    code, out, _ = both("checkpoint", "list", "RUN")
    assert (code, "good" in out, "1.500" in out) == (0, True, True)
    assert '"folder": "gs://' in both("checkpoint", "list", "RUN", "--json")[1]
    assert both("checkpoint", "verify", "RUN")[1] == "step 3: verified\n"
    assert both("checkpoint", "verify", "RUN", "--step", 4)[0] == 4
    assert "arrays are equal, 0 differ" in both("checkpoint", "diff", "RUN", "RUN/checkpoints/3")[1]


def test_a_suite_is_scored_kept_there_and_shown(both, runs, glam):
    both("eval", "RUN", "--limit", 2, "--shots", 0, "--json")
    url = place(runs[1])
    name, items = sorted(each for each in url.files() if each.startswith("eval/"))[::-1]
    assert items == name.replace(".json", ".items.jsonl"), "and no journal"
    assert both("eval", "show", "RUN")[0] == 0
    assert both("eval", "show", "RUN", "RUN")[0] == 0
    assert glam("eval", "show", f"{runs[1]}/{name}", runs[0])[0] == 0


def test_texts_are_the_same(both):
    assert both("generate", "RUN", "the stone", "--tokens", 8)[0] == 0

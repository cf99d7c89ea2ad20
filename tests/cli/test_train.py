"""`glam train` as a person and as a program meet it."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.cli.main import run
from glamcli.evals import run as evals_run
from glamcli.model.decoder import Decoder
from glamcli.train import loop, programs
from glamcli.trained import Trained
from runs import STEPS


def glam(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def trained(monkeypatch) -> list[Any]:
    """Replaces training by an outcome; the calls it got."""
    calls: list[Any] = []

    def train(recipe, folder, progress, host, score, *options):
        calls.append((recipe, folder))
        folder.mkdir(parents=True, exist_ok=True)
        nothing: Any = None
        model = Trained(recipe, nothing, {}, nothing, run_dir=folder)
        return loop.Outcome(recipe.train.steps, model, {"web": 2.5}, {"web": 3.25})

    monkeypatch.setattr(loop, "train", train)
    return calls


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


OFF = ("--set", "runtime.compile_cache=false")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_nothing_is_said_of_held_out_text_that_there_is_not(elsewhere, capsys, monkeypatch, form):
    def train(recipe, folder, progress, host, score, *options):
        nothing: Any = None
        return loop.Outcome(recipe.train.steps, Trained(recipe, nothing, {}, nothing))

    monkeypatch.setattr(loop, "train", train)
    assert glam("train", "test-tiny", *OFF, *form) == 0
    assert "held" not in capsys.readouterr().out


def test_a_run_is_named_after_its_recipe_and_ends_with_a_table_and_three_commands(
    trained, elsewhere, capsys
):
    assert glam("train", "test-tiny", *OFF, "--set", "train.steps=7") == 0
    assert [folder for _, folder in trained] == [Path("runs/test-tiny")]
    assert capsys.readouterr().out == (
        "\n"
        "held-out text after step 7 (nats per token, lower is better)\n"
        "source held-out loss unigram entropy\n"
        "web            2.500           3.250\n"
        "unigram entropy: the best possible without looking at the context\n"
        "\n"
        "next:\n"
        "  glam generate runs/test-tiny 'Once upon a time'\n"
        "  glam eval runs/test-tiny --suite quick\n"
        "  glam train test-tiny --set runtime.compile_cache=false --set train.steps=14\n"
    )


class Poisoned(Decoder):
    """A decoder whose loss, hence gradient, is not a number where the text says `~`."""

    def losses(self, params, x_BSM, targets_BS):
        nats_BS, logz_BS = super().losses(params, x_BSM, targets_BS)
        return nats_BS * jnp.where(targets_BS == 3 + ord("~"), jnp.nan, 1.0), logz_BS


MIXTURE = """
sources:
  good: {kind: text, path: good.txt, separator: line, weight: 1}
  bad: {kind: text, path: bad.txt, separator: line, weight: 0}
stages:
  - {from_step: 7, weights: {bad: 1}}
"""


def test_gradients_that_stay_bad_end_the_run_and_the_last_good_checkpoint_is_named(
    elsewhere, capsys, monkeypatch
):
    (elsewhere / "mix.yaml").write_text(MIXTURE)
    (elsewhere / "good.txt").write_text("\n".join(f"{i} and {i + 1}" for i in range(200)))
    (elsewhere / "bad.txt").write_text("\n".join(f"{i} ~ {i + 1}" for i in range(200)))
    monkeypatch.setattr(programs, "Decoder", Poisoned)
    sets = ["moe=null", "model.num_layers=1", "model.model_dim=8", "model.ffn_dim=8"]
    sets += ["runtime.compile_cache=false", "runtime.huge_pages=off", "train.max_bad_steps=3"]
    sets += ["data.mixture=./mix.yaml", "data.cache_dir=./cache", "every.checkpoint_steps=5"]
    assert glam("train", "test-tiny", *(part for each in sets for part in ("--set", each))) == 6
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(
        "error: 3 steps in a row were skipped, up to step 10: gradients are not finite\n"
        f"hint: last good checkpoint: step 5; `glam checkpoint rewind {elsewhere}/runs/test-tiny "
        "--to 5 --skip-batches 105`, "
        "or start anew (`--fresh`) with a lower `optimizer.learning_rate`\n"
    )
    for step in (8, 9, 10):
        assert f"step {step}: gradients are not finite; update skipped" in err
    assert Checkpoints(elsewhere / "runs/test-tiny/checkpoints").steps() == [5]


def test_interrupted_while_it_is_scored_it_says_that_the_model_is_saved(
    trained, elsewhere, capsys, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evals_run, "evaluate", interrupted)
    assert glam("train", "test-tiny", *OFF, "--set", "finish.suite=quick") == 130
    assert capsys.readouterr().err.endswith(
        "the model is trained and saved: `glam eval runs/test-tiny --suite quick` scores it\n"
        "\nerror: interrupted\n"
    )


def test_on_a_full_disk_it_still_says_that_the_model_is_saved(
    trained, elsewhere, capsys, monkeypatch
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert glam("train", "test-tiny", *OFF) == 1
    assert capsys.readouterr().err.endswith(
        "error: standard output cannot be written: No space left on device\n"
        "hint: the model is trained and saved: `glam eval runs/test-tiny --suite quick` scores it\n"
    )


@pytest.mark.parametrize("steps", ["5", "null", "", "5:1", "0:3"])
def test_steps_to_profile_that_are_no_span_are_refused_by_the_option(steps, elsewhere, capsys):
    assert glam("train", "test-tiny", *OFF, "--profile", steps) == 2
    what = "error: invalid value for `--profile`: write FIRST:LAST, both included, as in 100:105\n"
    assert capsys.readouterr().err.startswith(what)


def test_fresh_renames_the_earlier_run(trained, elsewhere, capsys):
    for expected in ([], ["mine.1"], ["mine.1", "mine.2"]):
        assert glam("train", "test-tiny", *OFF, "--run", "mine", "--fresh") == 0
        assert sorted(p.name for p in elsewhere.iterdir()) == ["mine", *expected]
    assert "the earlier run is now mine.2" in capsys.readouterr().err


def test_json_is_one_object_per_line(trained, elsewhere, capsys):
    assert glam("train", "test-tiny", *OFF, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"event": "heldout", "nats": {"web": 2.5}, "unigram_nats": {"web": 3.25}},
        {"event": "done", "run": "runs/test-tiny", "step": 20},
    ]


def test_a_whole_run_tells_its_phases_numbers_and_end(uninterrupted):
    text = (uninterrupted.parent / "events.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    begun = [e["name"] for e in events if e["event"] == "phase" and e["state"] == "begin"]
    order = ["preparing numbers", "preparing words", "compiling", "training", "evaluating"]
    assert [begun.index(name) for name in order] == sorted(begun.index(name) for name in order)
    assert begun[-1] == "saving"
    steps = [e for e in events if e["event"] == "step"]
    assert steps[0]["step"] == 1
    assert steps[-1]["step"] == steps[-1]["steps"] == STEPS
    assert steps[-1]["loss"] < steps[0]["loss"]
    wanted = {"tokens_per_second", "seconds_left", "dropped_frac", "balance", "learning_rate"}
    assert all(wanted <= step.keys() for step in steps)
    *_, heldout, done = events
    assert heldout["nats"].keys() == heldout["unigram_nats"].keys() == {"numbers", "words"}
    assert done == {"event": "done", "run": str(uninterrupted), "step": STEPS}


def test_a_run_folder_holds_what_is_promised(uninterrupted):
    assert {p.name for p in uninterrupted.iterdir() if not p.name.startswith(".")} == {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    identity = json.loads((uninterrupted / "run.json").read_text())
    assert identity["recipe"]["train"]["steps"] == STEPS
    origins = identity["origins"]
    assert origins["train.steps"].endswith("tiny.yaml:6")
    assert origins["batch.rows"].endswith("test-tiny.yaml:14")
    assert origins["seed"] == "default"
    assert {"jax", "glamcli", "python"} <= identity["versions"].keys()
    assert sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir()) == [28, 35, 40]


def test_another_recipe_is_refused_with_a_short_diff(uninterrupted, recipe, capsys):
    code = glam("train", recipe, "--run", uninterrupted, "--set", "moe.num_experts=8")
    err = capsys.readouterr().err
    assert code == 4
    assert f"(step {STEPS}) is another run: `moe.num_experts` was 4, is 8\n" in err
    assert "hint: continue with" in err


def test_a_finished_run_is_said_to_be_finished(uninterrupted, recipe, capsys):
    assert glam("train", recipe, "--run", uninterrupted) == 0
    out, err = capsys.readouterr()
    assert err == f"{uninterrupted} is finished: step {STEPS}, nothing left to do\n"
    assert "glam generate" in out


def test_a_run_folder_as_recipe_goes_on_in_that_run(trained, elsewhere, capsys):
    (elsewhere / "runs" / "b").mkdir(parents=True)
    for name in ("recipe.yaml", "run.json"):
        (elsewhere / "runs" / "b" / name).write_text("extends: test-tiny\n")
    for given in ("runs/b", "runs/b/", "runs/b/recipe.yaml"):
        assert glam("train", given, *OFF) == 0
        assert "  glam train " + given + " --set" in capsys.readouterr().out
    assert glam("train", "runs/b", *OFF, "--run", "c") == 0
    assert [folder for _, folder in trained] == [*[Path("runs/b")] * 3, Path("c")]


@pytest.mark.parametrize("url", ["memory://x", "file:///x", "https://host/run", "az://bucket/run"])
def test_a_run_folder_that_is_a_url_is_refused(trained, elsewhere, capsys, url):
    assert glam("train", "test-tiny", *OFF, "--run", url) == 2
    assert f"a run folder cannot be a URL: {url}" in capsys.readouterr().err
    assert (trained, list(elsewhere.iterdir())) == ([], [])


def test_a_misspelled_setting_is_refused_before_anything_is_made(elsewhere, capsys):
    assert glam("train", "test-tiny", "--set", "train.step=3") == 2
    assert "train.steps" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("tasks: {a: 1}\n", "my.yaml:1: `tasks`"),
        ("tasks: [piqa]\nshot: [0]\n", "my.yaml:2: unknown key `shot`"),
        ("tasks: [piqa, nothing]\n", "no task `nothing`"),
        ("prompt: [\n", "my.yaml:"),
    ],
)
def test_a_suite_that_cannot_be_read_is_refused_before_training(
    trained, elsewhere, capsys, text, what
):
    (elsewhere / "my.yaml").write_text(text)
    assert glam("train", "test-tiny", *OFF, "--set", "finish.suite=./my.yaml") == 2
    assert what in capsys.readouterr().err
    assert trained == []

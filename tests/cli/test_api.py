"""The Python interface: what it returns, and that it says the same as the commands."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import glamcli
from cli.run_folder import make_run
from glamcli.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def run(folder):
    return glamcli.open(folder)


def test_importing_it_loads_nothing_and_its_functions_win_over_packages():
    code = (
        "import sys, glamcli\n"
        "assert not {'jax', 'flax', 'numpy', 'click', 'pydantic', 'rich'} & set(sys.modules)\n"
        "from glamcli.train import meter\n"
        "assert glamcli.train.__module__ == 'glamcli.api'\n"
        "assert all(hasattr(glamcli, name) for name in glamcli.__all__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, b"")


def test_logits_and_likelihoods_agree_whatever_the_length(run):
    ids = run.tokenizer.encode("stone river")
    logits_SV = run.logits("stone river")
    assert logits_SV.shape == (1 + len(ids), 259)
    assert logits_SV.dtype == np.float32
    np.testing.assert_allclose(run.logits("stone"), logits_SV[:6], atol=1e-5)
    logp_SV = np.asarray(jax.nn.log_softmax(logits_SV, axis=-1))
    wanted = [float(logp_SV[5 + i, each]) for i, each in enumerate(ids[5:])]
    found = run.loglikelihood("stone", [" river", " moon"])
    assert found[0] == pytest.approx(sum(wanted), rel=1e-4)
    assert run.loglikelihood("stone", []) == []


def test_parameters_are_named_as_in_the_checkpoint_and_carry_their_axes(run, folder):
    tree = Checkpoints(folder / "checkpoints").meta(3)["tree"]
    shapes = {name.removeprefix("params/"): tuple(each[1]) for name, each in tree.items()}
    assert {name: each.value.shape for name, each in run.params.items()} == shapes
    assert all(len(each.axes) == each.value.ndim for each in run.params.values())
    assert run.params["blocks/expert_layer/ffn/w_in"].axes[:2] == ("layers", "expert")


def test_texts_and_scores_are_those_of_the_commands(run, folder, glam):
    (text,) = run.generate("stone ", tokens=8, seed=3)
    assert glam("generate", folder, "stone ", "--tokens", 8, "--seed", 3)[1] == f"stone {text}\n"
    results = run.evaluate("last_word", shots=[0], limit=2)
    (kept,) = (folder / "eval").glob("last_word*.json")
    scores = json.loads(kept.read_text())["scores"]
    assert [each["task"] for each in scores] == [each.task for each in results.scores]
    kept.unlink()
    options = ("--suite", "last_word", "--shots", "0", "--limit", "2")
    assert glam("eval", folder, *options)[0] == 0
    assert json.loads(kept.read_text())["scores"] == scores


def test_running_out_of_memory_is_an_error_of_glam(folder, monkeypatch, glam):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("glamcli.api.open_trained", full)
    monkeypatch.setattr("glamcli.trained.open_trained", full)
    with pytest.raises(glamcli.GlamError, match="out of memory"):
        glamcli.open(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": {"text": "stone", "toxicity": 0.5}}\n')
    for words in (("cooccurrence",), ("toxicity", "--prompts", prompts, "--scorer", "true")):
        code, _, err = glam("eval", words[0], folder, *words[1:])
        assert (code, err.splitlines()[0]) == (5, "error: out of memory")


def test_metrics_are_the_lines_of_the_run_but_for_a_torn_one(run, folder):
    with pytest.raises(glamcli.GlamError, match=r"metrics\.jsonl"):
        run.metrics()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "lo')
    assert run.metrics() == [{"step": 1, "loss": 5.5}]
    assert (run.step, run.recipe.batch.row_tokens) == (3, 128)
    (folder / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda run: glamcli.open("https://bucket/run"), "a run folder cannot be a URL"),
        (lambda run: glamcli.open("nowhere"), "no run folder or checkpoint nowhere"),
        (lambda run: glamcli.load_recipe("test-tiny", {"train.steps": 0}), "train.steps"),
        (lambda run: run.logits("a" * 128), "129 tokens are more than the 128 of a row"),
        (lambda run: run.loglikelihood("a", ["b" * 200]), "longer than the 128 tokens"),
        (lambda run: run.generate("a", beam=100_000), "`beam` must be 1 to 256"),
        (lambda run: run.evaluate("nothing"), "nothing"),
    ],
)
def test_mistakes_are_errors_of_glam_with_their_reason(run, use, what):
    with pytest.raises(glamcli.GlamError, match=what):
        use(run)

"""A run with damaged checkpoints: it goes on from the newest that is whole, says so, and loses
nothing else; or stops, if told to."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glamcli
from cli.run_folder import make_run
from glamcli.checkpoint import Checkpoints
from glamcli.errors import CheckpointError, DamagedCheckpoint
from glamcli.named_leaves import nested
from glamcli.parallel.mesh import make_mesh
from glamcli.progress import Silent
from glamcli.step_folders import move_aside
from glamcli.train import loop
from glamcli.train.loop import train
from glamcli.trained import open_trained
from runs import assert_same_run, weights
from unit.test_checkpoint import rewrite_meta
from unit.train import test_loop
from unit.train.test_loop import Warned, recipe

texts = test_loop.folder

EVERY_2 = ("every.checkpoint_steps=2", "every.log_steps=1", "checkpoints.keep=4")


def flip_a_weight(step: Path) -> None:
    """One bit in the largest file of values that restoring reads."""
    for path in sorted(step.glob("state/**/d/*"), key=lambda path: -path.stat().st_size):
        before = path.read_bytes()
        path.write_bytes(before[:100] + bytes([before[100] ^ 1]) + before[101:])
        try:
            weights(step.parent.parent, int(step.name))
        except DamagedCheckpoint:
            return
        path.write_bytes(before)
    raise AssertionError("no file of values is read")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run of 8 steps which saved 2, 4, 6 and 8."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(texts, *EVERY_2, "train.steps=8"), run, Silent())
    return run


@pytest.fixture
def run(whole, tmp_path):
    """The same as it was when step 6 was its newest."""
    ignored = shutil.ignore_patterns("8")
    return shutil.copytree(whole, tmp_path / "run", ignore=ignored)


def test_training_goes_on_from_the_newest_whole_step_to_the_same_bits(texts, run, whole):
    flip_a_weight(run / "checkpoints" / "6")
    heard = Warned()
    assert train(recipe(texts, *EVERY_2, "train.steps=8"), run, heard).step == 8
    assert_same_run(whole, run, 8)
    damaged, lost = heard.warnings
    assert f"{run}/checkpoints/6 cannot be used: not as saved: `" in damaged
    assert lost == "going back to step 4: up to 2 steps of training are lost"
    assert (run / "checkpoints/set-aside/6/meta/metadata").is_file()
    assert Checkpoints(run / "checkpoints").steps() == [8, 6, 4, 2]


def test_strict_training_stops_at_a_damaged_step_and_changes_nothing(texts, run):
    flip_a_weight(run / "checkpoints" / "6")
    before = contents(run / "checkpoints")
    with pytest.raises(DamagedCheckpoint, match="checkpoints/6 cannot be used"):
        train(recipe(texts, *EVERY_2, "train.steps=8"), run, Silent(), strict=True)
    assert contents(run / "checkpoints") == before


@pytest.mark.parametrize("key", ["recipe", "data", "versions", "topology", "step", "tree"])
@pytest.mark.parametrize("value", [None, [], "text"])
def test_an_edited_description_without_a_checksum_is_no_bug(
    texts, run, model, tmp_path, key, value
):
    """Of a version before format 4: what is missing is refused, or is not needed."""
    edited = shutil.copytree(model, tmp_path / "model")
    for step in (*(run / "checkpoints").iterdir(), *(edited / "checkpoints").iterdir()):
        rewrite_meta(step, format=3, **{key: value})
    for folder, use in (
        (run, lambda: train(recipe(texts, *EVERY_2, "train.steps=8"), run, Silent())),
        (edited, lambda: glamcli.open(edited)),
    ):
        assert str(folder) in refusal(use, str(folder))


@pytest.mark.parametrize("key", ["recipe", "data"])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_step_with_a_lacking_description_is_set_aside_and_trained_again(
    texts, run, whole, key, at_end
):
    """Of a version before checksums: it would be in the way of the save at the same step."""
    step = run / "checkpoints/6"
    rewrite_meta(step, format=3)
    meta = json.loads((step / "meta/metadata").read_text())
    del meta[key]
    (step / "meta/metadata").write_text(json.dumps(meta))
    heard = Warned()
    steps = "train.steps=6" if at_end and key == "recipe" else "train.steps=8"
    last = train(recipe(texts, *EVERY_2, steps), run, heard).step
    assert "checkpoints/6: its description (meta/metadata) cannot be used" in heard.warnings[0]
    assert (run / "checkpoints/set-aside/6").is_dir()
    assert Checkpoints(run / "checkpoints").latest() == last


def refusal(use, otherwise: str) -> str:
    try:
        use()
    except CheckpointError as error:
        return error.what
    return otherwise


def test_a_run_never_starts_anew_over_damaged_checkpoints(texts, run):
    for step in (run / "checkpoints").iterdir():
        (step / "state/manifest.ocdbt").unlink()
    before = contents(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"manifest\.ocdbt is missing") as caught:
        train(recipe(texts, *EVERY_2, "train.steps=8"), run, Silent())
    assert all(f"checkpoints/{step} " in caught.value.what for step in (2, 4, 6))
    assert contents(run / "checkpoints") == before


def test_a_run_whose_steps_are_all_set_aside_does_not_start_anew(texts, run):
    for step in ("2", "4", "6"):
        move_aside(run / "checkpoints", step)
    before = contents(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"all are set aside \(2, 4, 6\)") as caught:
        train(recipe(texts, *EVERY_2, "train.steps=8"), run, Silent())
    assert "--fresh" in (caught.value.hint or "")
    assert contents(run / "checkpoints") == before


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder with steps 3 and 5."""
    run = make_run(tmp_path_factory.mktemp("model"))
    checkpoints = Checkpoints(run / "checkpoints")
    params = {name: jnp.asarray(2 * x) for name, x in weights(run, 3).items()}
    checkpoints.save(5, nested(params), checkpoints.meta(3))
    checkpoints.close()
    return run


def test_generation_takes_an_older_step_with_a_warning_or_stops(model, tmp_path, glam):
    run = shutil.copytree(model, tmp_path / "run")
    question = ("stone", "--tokens", "4", "--seed", "1")
    older = glam("generate", run / "checkpoints/3", *question)
    flip_a_weight(run / "checkpoints" / "5")
    code, out, err = glam("generate", run, *question)
    assert (code, out) == older[:2]
    assert f"{run}/checkpoints/5 cannot be used: not as saved: `params/" in err
    assert "going back to step 3: up to 2 steps of training are lost" in err
    for place in ((run, "--strict"), (run / "checkpoints/5",)):
        code, out, err = glam("generate", *place, *question)
        assert (code, out) == (4, "")
        assert "not as saved" in err
    with warnings.catch_warnings(record=True, action="always") as warned:
        assert glamcli.open(run).step == 3
    assert [str(each.message)[:12] for each in warned] == ["checkpoint /", "going back t"]
    with pytest.raises(DamagedCheckpoint):
        glamcli.open(run, strict=True)


def test_strict_analyses_and_lm_eval_stop_at_a_damaged_step(model, tmp_path, glam):
    run = shutil.copytree(model, tmp_path / "run")
    flip_a_weight(run / "checkpoints" / "5")
    (tmp_path / "prompts").write_text('{"prompt": {"text": "stone", "toxicity": 0.1}}')
    (tmp_path / "words").write_text('{"bias": 0, "weights": {}}')
    files = ("--prompts", tmp_path / "prompts", "--classifier", tmp_path / "words")
    for analysis in (("cooccurrence",), ("toxicity", *files)):
        code, out, err = glam("eval", *analysis, run, "--samples", 1, "--strict")
        assert (code, out) == (4, "")
        assert "not as saved" in err
        assert "going back" not in err
    pytest.importorskip("lm_eval")
    from glamcli.cli.harness import Glam

    with pytest.raises(DamagedCheckpoint):
        Glam(path=str(run), strict=True)


def test_weights_of_a_bad_streak_are_used_with_a_warning(model, tmp_path):
    run = shutil.copytree(model, tmp_path / "run")
    rewrite_meta(run / "checkpoints/5", good=False)
    heard = Warned()
    assert open_trained(run, heard).identity["step"] == 5
    (warning,) = heard.warnings
    assert "step 5 was saved in a bad streak" in warning
    assert warning.endswith(f"the newest good step is {run}/checkpoints/3")
    rewrite_meta(run / "checkpoints/3", good=False)
    open_trained(run, heard)
    assert heard.warnings[1].endswith("no good step is left")


def test_weights_that_are_not_finite_are_refused(model, tmp_path, glam):
    run = shutil.copytree(model, tmp_path / "run")
    checkpoints = Checkpoints(run / "checkpoints")
    tree = {name: np.array(x) for name, x in weights(run, 3).items()}
    tree["params/embedding/table"][2, 3] = np.nan
    checkpoints.save(9, nested({k: jnp.asarray(x) for k, x in tree.items()}), checkpoints.meta(3))
    checkpoints.close()
    code, out, err = glam("generate", run, "stone", "--tokens", "4")
    assert (code, out) == (4, "")
    assert "weights are not finite, `embedding/table` for one" in err
    assert "RUN/checkpoints/STEP" in err

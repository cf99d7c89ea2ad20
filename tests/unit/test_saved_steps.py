"""The list of saved steps: what each is, from descriptions and metrics alone."""

import json

import pytest

from bare_steps import save
from glamcli.errors import CheckpointError
from glamcli.saved_steps import saved_steps
from glamcli.step_folders import CHECKPOINT_FORMAT, move_aside


def test_every_step_is_described(tmp_path):
    recipe = {"batch": {"rows": 4, "row_tokens": 32}}
    save(tmp_path, 9, recipe=recipe)
    save(tmp_path, 10, recipe=recipe, skipped_batches=[[9, 10]])
    save(tmp_path, 100, good=False)
    save(tmp_path, 11)
    move_aside(tmp_path / "checkpoints", "11")
    save(tmp_path, 11)
    (tmp_path / "checkpoints/11/meta/metadata").write_text("{")
    move_aside(tmp_path / "checkpoints", "11")
    (tmp_path / "checkpoints/12").mkdir()
    lines = [
        {"step": 9, "heldout/a": 2.0, "heldout/b": 3.0, "unigram/a": 4.0},
        {"step": 10, "loss": 1.0},
        {"step": 11, "heldout/a": 1.0},
        {"step": 100, "heldout/a": None, "heldout/b": "x"},
        {"step": 9, "loss": 1.0},
    ]
    text = "not JSON\n" + "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)

    found = saved_steps(tmp_path)
    assert [(each.step, each.status, each.folder.name) for each in found] == [
        (9, "good", "9"),
        (10, "good", "10"),
        (12, "damaged", "12"),
        (100, "bad streak", "100"),
        (11, "set aside", "11"),
        (11, "set aside", "11.1"),
    ]
    nine, ten, twelve, *_ = found
    assert nine.heldout_nats == {"a": 2.0, "b": 3.0}
    assert [each.heldout_nats for each in found[1:]] == [{}] * 5
    assert (nine.tokens_seen, nine.format) == (9 * 4 * 32, CHECKPOINT_FORMAT)
    files = [path.stat() for path in nine.folder.rglob("*") if path.is_file()]
    assert nine.num_bytes == sum(file.st_size for file in files)
    assert nine.unix_seconds == (nine.folder / "meta/metadata").stat().st_mtime
    assert ten.skipped_batches == [[9, 10]]
    assert twelve.reason == "the state is missing or half written"
    assert (twelve.unix_seconds, twelve.format, twelve.tokens_seen) == (None, None, None)


@pytest.mark.parametrize(
    "meta",
    [
        {"skipped_batches": 5},
        {"skipped_batches": [["a", {}]]},
        {"skipped_batches": [[1, float("inf")]]},
        {"recipe": 7},
        {"recipe": {"batch": {"rows": float("inf"), "row_tokens": 1}}},
        {"recipe": {"batch": {"rows": "x", "row_tokens": []}}},
    ],
)
def test_values_of_other_types_are_left_out(tmp_path, meta):
    save(tmp_path, 5, **meta)
    [found] = saved_steps(tmp_path)
    assert (found.skipped_batches, found.tokens_seen) == ([], None)


def test_a_folder_without_steps_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        saved_steps(tmp_path)

"""Going back: what moves where, in which order, and which batches a continued run leaves out."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bare_steps import save
from glamcli.errors import CheckpointError
from glamcli.step_folders import complete_steps, step_meta
from glamcli.train.rewind import RECORDS, not_skipped, rewind, rewinds, seconds_before, skipped_at

METRICS = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 41))


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"train": {"steps": 50}}}))
    return tmp_path


def contents(run: Path) -> dict[str, str]:
    files = {path.relative_to(run): path.read_text() for path in run.rglob("*") if path.is_file()}
    return {str(name): text for name, text in files.items() if name.name != RECORDS}


def skipped(run: Path, step: int) -> int:
    folder = run / "checkpoints" / str(step)
    return skipped_at(run, step, step_meta(folder)["checksum"] if folder.exists() else None)


def lines_up_to(step: int) -> str:
    return "".join(METRICS.splitlines(keepends=True)[:step])


def test_later_steps_and_metrics_are_set_aside_and_the_record_says_so(run):
    (run / "checkpoints" / "50").mkdir()  # half written: goes too
    rewind(run, 20, 5, "loss exploded")
    assert complete_steps(run / "checkpoints") == [20, 10]
    assert sorted(p.name for p in (run / "checkpoints/set-aside").iterdir()) == ["30", "40", "50"]
    assert (run / "metrics.jsonl").read_text() == lines_up_to(20)
    beside = (run / "metrics.after-20.jsonl").read_text()
    assert lines_up_to(20) + beside == METRICS
    [record] = rewinds(run)
    assert record.unix_seconds > 1e9
    assert (record.from_step, record.to_step, record.skip_batches) == (50, 20, 5)
    assert record.reason == "loss exploded"
    aside = {name: f"checkpoints/set-aside/{name}" for name in ("50", "40", "30")}
    assert record.set_aside == aside


def test_a_second_rewind_to_the_same_step_overwrites_nothing(run):
    rewind(run, 20, 5)
    save(run, 30)
    (run / "metrics.jsonl").write_text(lines_up_to(20) + '{"step": 30, "loss": 2.0}\n')
    rewind(run, 20, 8)
    assert sorted(p.name for p in (run / "checkpoints/set-aside").iterdir()) == ["30", "30.1", "40"]
    assert rewinds(run)[1].set_aside == {"30": "checkpoints/set-aside/30.1"}
    assert (run / "metrics.after-20.jsonl").read_text() == METRICS.removeprefix(lines_up_to(20))
    assert (run / "metrics.after-20.1.jsonl").read_text() == '{"step": 30, "loss": 2.0}\n'
    assert skipped(run, 20) == 8


def test_skipping_after_the_newest_step_moves_nothing(run):
    before = contents(run)
    rewind(run, 40, 3)
    assert contents(run) == before
    assert skipped(run, 40) == 3


def test_a_step_saved_anew_after_a_later_rewind_skips_nothing(run):
    rewind(run, 20, 5)
    assert [skipped(run, step) for step in (10, 20, 30)] == [0, 5, 0]
    rewind(run, 10, 0)
    save(run, 20)
    assert [skipped(run, step) for step in (10, 20)] == [0, 0]


def test_a_step_saved_anew_after_it_was_lost_skips_nothing(run):
    rewind(run, 20, 5)
    (record,) = rewinds(run)
    assert (not_skipped(run, 20), not_skipped(run, 30)) == (None, None)
    shutil.rmtree(run / "checkpoints/20")
    assert not_skipped(run, 10) == record
    save(run, 20, loss=2)
    assert (skipped(run, 20), not_skipped(run, 20)) == (0, None)


def test_after_a_step_of_an_earlier_format_batches_are_skipped_as_well(run):
    description = run / "checkpoints/20/meta/metadata"
    meta = {**json.loads(description.read_text()), "format": 3}
    del meta["checksum"]
    description.write_text(json.dumps(meta))
    rewind(run, 20, 5)
    assert skipped_at(run, 20, None) == 5


def test_the_time_that_was_lost_is_known_whatever_is_moved(run):
    assert seconds_before(run) == 0
    lines = [{"step": 30, "seconds/step": 70.5, "seconds/lost": 4.0}, {"step": 40, "eval/x": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        rewind(run, 20)
        assert seconds_before(run) == 74.5
    with (run / RECORDS).open("a") as file:
        file.write((run / RECORDS).read_text().splitlines()[0].replace("74.5", "NaN") + "\n")
    assert seconds_before(run) == 74.5


@pytest.mark.parametrize(
    ("to", "skip", "message"),
    [
        (25, 0, "no complete checkpoint of step 25"),
        (30, 0, "step 30 (its description (meta/metadata) cannot be read)"),
        (20, 30, "skipping 30 batches after step 20 leaves nothing of 50 steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(run, to, skip, message):
    (run / "checkpoints/30/meta/metadata").write_text("{")
    before = contents(run)
    with pytest.raises(CheckpointError) as caught:
        rewind(run, to, skip)
    assert message in caught.value.what
    assert contents(run) == before
    assert not (run / RECORDS).exists()


class Killed(BaseException):
    pass


def test_killed_at_any_operation_it_can_be_run_again_and_meanwhile_nothing_is_lost(
    run, monkeypatch, tmp_path_factory
):
    """Every rename, replacement and truncation in turn is the last thing that does not happen."""
    lines = set(METRICS.splitlines())
    whole = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(run, whole)
    rewind(whole, 20, 5)
    expected = contents(whole)
    for number in range(100):
        copy = tmp_path_factory.mktemp("copy") / "run"
        shutil.copytree(run, copy)
        with monkeypatch.context() as patched:
            _kill_at(number, patched)
            killed = False
            try:
                rewind(copy, 20, 5)
            except Killed:
                killed = True
        texts = [path.read_text() for path in copy.glob("metrics*.jsonl")]
        assert {line for text in texts for line in text.splitlines()} == lines
        newest = complete_steps(copy / "checkpoints")[0]
        assert skipped(copy, newest) == (5 if newest == 20 else 0)
        rewind(copy, 20, 5)
        assert skipped(copy, 20) == 5
        assert contents(copy) == expected
        if not killed:
            break
    assert number == 5  # the record, metrics twice, two steps


def _kill_at(number: int, patched: pytest.MonkeyPatch) -> None:
    done = 0

    def counted(operation):
        def call(*args):
            nonlocal done
            done += 1
            if done > number:
                raise Killed
            return operation(*args)

        return call

    patched.setattr(os, "replace", counted(os.replace))
    patched.setattr(os, "truncate", counted(os.truncate))
    patched.setattr(Path, "rename", counted(Path.rename))


def test_a_failed_operation_is_an_error_that_names_the_file(run, monkeypatch):
    def full(path, length):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(CheckpointError) as caught:
        rewind(run, 20)
    assert f"{run / 'metrics.jsonl'}: Input/output error" in caught.value.what
    assert "again" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "line", ["{", "[]", "5", '{"to_step": 3}', '{"to_step": "3"}', "\udcff", "[" * 9999]
)
def test_a_damaged_record_is_named_and_nothing_is_guessed(run, line):
    rewind(run, 20, 5)
    with (run / RECORDS).open("ab") as file:
        file.write(line.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        skipped(run, 20)
    assert f"{RECORDS}:2: not the record" in caught.value.what


def test_damaged_lines_of_the_metrics_stay_where_they_are(run):
    (run / "metrics.jsonl").write_bytes(b'\xff\n{"step": "x"}\n{"step": 20}\n{"step": 21}\n{"st')
    rewind(run, 20)
    assert (run / "metrics.jsonl").read_bytes() == b'\xff\n{"step": "x"}\n{"step": 20}\n'
    assert (run / "metrics.after-20.jsonl").read_bytes() == b'{"step": 21}\n{"st'

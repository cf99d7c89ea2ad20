"""Files of metrics survive what happens to them."""

import json
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from board import events_in
from glamcli.progress import Silent
from glamcli.train import metric_files
from glamcli.train.metric_files import MetricsFile, TensorBoard, read_metrics


class Warned(Silent):
    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_is_one_object_and_not_finite_is_null(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0, Silent())
    file.write({"step": 7, "loss": 2.0, "note": "text"})
    file.write({"step": 8, "loss": float("nan"), "loss_by_layer": [1.0, float("inf")]})
    file.close()
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"step": 7, "loss": 2.0, "note": "text"}
    assert second == {"step": 8, "loss": None, "loss_by_layer": [1.0, None]}


def test_resuming_drops_later_steps_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, Silent())
    for step in range(1, 8):
        file.write({"step": step})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 8, "lo')
    again = MetricsFile(path, 5, Silent())
    again.write({"step": 6})
    again.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


DAMAGED = (
    b'{"step": "2"}\n',
    b'{"loss": 1}\n',
    b'{"step": 2, "note": "\xff"}\n',
    b"5\n",
    b"[" * 5000 + b"\n",
    b'{"step": true}\n',
    b'{"step": NaN}\n',
    b"\x00" * 40 + b"\n",
)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_lines_are_left_out_and_the_file_as_it_was_is_kept(tmp_path, damage):
    path, progress = tmp_path / "metrics.jsonl", Warned()
    before = b'{"step": 1}\n' + damage + b'{"step": 3}\n{"step": 4}\n'
    path.write_bytes(before)
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4]
    file = MetricsFile(path, 3, progress)
    file.write({"step": 4})
    file.close()
    assert steps_in(path) == [1, 3, 4]
    (aside,) = tmp_path.glob("metrics.damaged-*.jsonl")
    assert aside.read_bytes() == before
    assert progress.texts == [
        f"{path}: 1 line is damaged or out of order and left out; the file as it was is {aside}"
    ]


def test_a_line_too_long_to_be_one_of_a_run_is_read_in_parts(tmp_path, monkeypatch):
    path, progress = tmp_path / "metrics.jsonl", Warned()
    path.write_bytes(b'{"step": 1}\n')
    monkeypatch.setattr(metric_files, "LINE_BYTES", 64)
    with path.open("ab") as file:
        file.truncate(10_000)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 2}\n')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    MetricsFile(path, 2, progress).close()
    assert steps_in(path) == [1, 2]


def test_what_is_no_regular_file_is_neither_read_nor_written(tmp_path):
    pipe, device = tmp_path / "pipe.jsonl", tmp_path / "device.jsonl"
    os.mkfifo(pipe)
    device.symlink_to("/dev/full")
    for path in (pipe, device):
        progress = Warned()
        file = MetricsFile(path, 5, progress)
        file.write({"step": 6})
        file.close()
        assert progress.texts == [
            f"{path} cannot be written (not a regular file); training goes on"
        ]
        with pytest.raises(OSError, match="not a regular file"):
            read_metrics(path)


def test_resuming_on_a_full_disk_still_drops_later_steps(tmp_path):
    path, progress = tmp_path / "metrics.jsonl", Warned()
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    with files_no_larger_than(1):
        file = MetricsFile(path, 5, progress)
        file.write({"step": 6})
        file.close()
    assert (steps_in(path), len(progress.texts)) == ([1, 2, 3, 4, 5], 1)


def test_the_newest_lines_are_known_also_those_of_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    file = MetricsFile(path, 5, Silent())
    file.write({"step": 6, "heldout/web": float("nan")})
    file.close()
    assert list(file.recent) == [
        *({"step": step} for step in (3, 4, 5)),
        {"step": 6, "heldout/web": None},
    ]


@contextmanager
def files_no_larger_than(size):
    """What a full disk does to a write: part of it is written, then none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_whole_lines_and_one_warning(tmp_path):
    path, progress = tmp_path / "metrics.jsonl", Warned()
    file = MetricsFile(path, 0, progress)
    file.write({"step": 1})
    with files_no_larger_than(path.stat().st_size + 5):
        file.write({"step": 2})
        file.write({"step": 3})
    file.write({"step": 4})
    file.close()
    assert steps_in(path) == [1, 4]
    assert len(progress.texts) == 1
    assert progress.texts[0].startswith(f"{path} cannot be written")


def test_a_metrics_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    progress = Warned()
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl", 0, progress)
    file.write({"step": 1})
    file.close()
    board = TensorBoard(tmp_path / "run" / "tensorboard", 0, progress)
    board.write({"step": 1, "loss": 2.0})
    board.close()
    assert len(progress.texts) == 2


def test_tensorboard_gets_a_curve_per_number_and_layer(tmp_path):
    board = TensorBoard(tmp_path, 6, Silent())
    board.write(
        {
            "step": 7,
            "loss": 2.5,
            "balance_by_layer": [1.0, None],
            "load_by_layer": [[0.5, 0.5], [0.1, 0.9]],  # a curve per expert would be too many
            "note": "text",
        }
    )
    board.close()
    version, restart, event = events_in(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert restart.step == 7  # what an earlier process wrote from here on is forgotten
    assert event.step == 7
    curves = {value.tag: value.simple_value for value in event.summary.value}
    assert curves == {"loss": 2.5, "balance_by_layer/1": 1.0}


def test_tensorboard_on_a_full_disk_ends_with_one_warning(tmp_path):
    progress = Warned()
    board = TensorBoard(tmp_path, 0, progress)
    with files_no_larger_than(100):
        for step in range(1, 30):
            board.write({"step": step, **{f"value/{i}": np.pi for i in range(20)}})
            board.flush()
    board.close()
    assert len(progress.texts) == 1


def test_how_long_a_run_took_is_known_until_the_first_new_line_says_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "seconds/step": 0.5 * step, "seconds/lost": 2.0} for step in (3, 6, 9)]
    lines += [{"step": 9, "heldout/web": 1.0}, {"step": 10, "seconds/step": "x", "seconds/y": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # the second time after a process that was killed before its first line
        file = MetricsFile(path, 7, Silent())
        file.close()
        assert (steps_in(path), file.seconds) == ([3, 6, 9, 9, 10], 6.5)
    file = MetricsFile(path, 7, Silent())
    file.write({"step": 8})
    file.close()
    assert steps_in(path) == [3, 6, 8]

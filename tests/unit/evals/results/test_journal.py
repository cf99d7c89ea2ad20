import numpy as np
import pytest

from glamcli.evals.results.journal import Journal, inputs_digest
from glamcli.storage import place

CONDITIONS = {"step": 3, "suite": "quick"}


def test_an_unfinished_file_is_gone_on_with(tmp_path):
    first = Journal.open(tmp_path, CONDITIONS)
    first.add("a", {"nats": "x"})
    first.add("b", {"nats": "y"})
    second = Journal.open(tmp_path, CONDITIONS)
    assert len(second.known) == 2
    assert (second.known.get("b") or {})["nats"] == "y"
    assert second.known.get("c") is None
    second.finish()
    assert list(tmp_path.iterdir()) == []


CHANGED = b'{"key": "c", "nats": "z", "sha256": "%s"}\n' % inputs_digest([{"key": "c"}]).encode()


@pytest.mark.parametrize(
    "torn",
    [b'{"key": "c", "na', b'{"key": "c"}', b"\xff\xfe\n", b"[1]\n", b"[" * 100_000, CHANGED],
    ids=["torn", "no end", "bytes", "list", "depth", "changed"],
)
def test_a_torn_or_changed_last_line_is_dropped_and_written_over(tmp_path, torn):
    journal = Journal.open(tmp_path, CONDITIONS)
    journal.add("a", {})
    with journal.path.open("ab") as file:
        file.write(torn)
    again = Journal.open(tmp_path, CONDITIONS)
    assert len(again.known) == 1
    again.add("d", {})
    assert len(Journal.open(tmp_path, CONDITIONS).known) == 2


def test_other_conditions_have_another_file_and_fresh_starts_over(tmp_path):
    Journal.open(tmp_path, CONDITIONS).add("a", {})
    assert len(Journal.open(tmp_path, {**CONDITIONS, "step": 4}).known) == 0
    assert len(Journal.open(tmp_path, CONDITIONS).known) == 1
    assert len(Journal.open(tmp_path, CONDITIONS, fresh=True).known) == 0


def test_a_file_of_something_else_is_not_believed(tmp_path):
    journal = Journal.open(tmp_path, CONDITIONS)
    journal.path.write_text('{"step": 9}\n{"key": "a"}\n')
    assert len(Journal.open(tmp_path, CONDITIONS).known) == 0


def test_a_digest_tells_shapes_and_types_apart():
    zeros = np.zeros((2, 3), np.int32)
    told = {inputs_digest([x]) for x in (zeros, zeros.T, zeros.astype(np.int8), zeros[:1], [0, 0])}
    assert len(told) == 5


def test_batches_that_a_bucket_did_not_take_are_in_it_once_it_does(bucket, weather, monkeypatch):
    monkeypatch.setattr("glamcli.atomic._SECONDS_BETWEEN", 0.0)
    told = []
    journal = Journal.open(place(f"{bucket}/eval"), CONDITIONS, warn=told.append)
    weather.fault = lambda method, path: 403 if method == "POST" else None
    for key in ("a", "b"):
        journal.add(key, {"found": 1})
    (warning,) = told
    assert "not yet stored for resuming" in warning
    assert f"{bucket}/eval" in warning
    weather.fault = lambda method, path: None
    journal.flush()
    assert [*Journal.open(place(f"{bucket}/eval"), CONDITIONS).known] == ["a", "b"]

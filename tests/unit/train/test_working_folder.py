"""What is read of a working folder while training changes it."""

import json
from pathlib import Path

from glamcli import atomic, step_folders
from glamcli.train.working_folder import packed_steps


def test_a_step_that_is_deleted_while_they_are_read_hides_no_other(tmp_path, monkeypatch):
    read_text, deleting = Path.read_text, iter("0")
    for step in range(3):
        atomic.write(tmp_path / f"checkpoints/{step}/arrays.url", f"{step}")

    def read_and_delete(path: Path) -> str:
        if step := next(deleting, None):
            step_folders.delete_step(tmp_path / "checkpoints", step)
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", read_and_delete)
    assert json.loads(packed_steps(tmp_path)) == {"1/arrays.url": "1", "2/arrays.url": "2"}

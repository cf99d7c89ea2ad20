"""Step folders without arrays: complete as far as their descriptions say."""

import json
from pathlib import Path
from typing import Any

from glamcli.step_folders import CHECKPOINT_FORMAT, checksum


def save(run: Path, step: int, **meta: Any) -> Path:
    """The folder of a step of this run."""
    folder = run / "checkpoints" / str(step)
    for item in ("state", "meta"):
        (folder / item).mkdir(parents=True)
    (folder / "state" / "_METADATA").write_text("12345")
    described = {"step": step, "format": CHECKPOINT_FORMAT, "tree": {}, **meta}
    text = json.dumps({**described, "checksum": checksum(described)})
    (folder / "meta" / "metadata").write_text(text)
    return folder

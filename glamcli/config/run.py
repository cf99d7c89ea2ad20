"""The section `run` of a recipe: where its numbers go beside `metrics.jsonl`."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from glamcli.config.settings import Settings

_PROJECT = r"^[\w. -]{1,128}$"


def _is_project(name: str) -> str:
    if not re.fullmatch(_PROJECT, name):
        raise ValueError("write 1 to 128 letters, digits, spaces and any of `_.-`, as in my-models")
    return name


class RunSettings(Settings):
    """Where the numbers of a run go beside metrics.jsonl (docs/metrics.md)."""

    loggers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    """`tensorboard`: event files in the run folder; `trackio`, `wandb` (Weights & Biases): as those
    packages are set up on this machine. They may fail, and training goes on."""
    project: Annotated[
        str, Field(json_schema_extra={"pattern": _PROJECT}), AfterValidator(_is_project)
    ] = "glam"
    """project of Trackio and Weights & Biases."""

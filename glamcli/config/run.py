"""The section `run` of a recipe: where its numbers go beside `metrics.jsonl`."""

from typing import Annotated, Literal

from pydantic import Field

from glamcli.config.settings import Settings


class RunSettings(Settings):
    """Where the numbers of a run go beside metrics.jsonl (docs/metrics.md)."""

    loggers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    """`tensorboard`: event files in the run folder; `trackio`, `wandb` (Weights & Biases): as those
    packages are set up on this machine. They may fail, and training goes on."""
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w. -]+$")] = "glam"
    """project of Trackio and Weights & Biases."""

"""The section `runtime` of a recipe: how its processes run."""

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from glamcli.config.settings import Count, Positive, Settings

XlaValue = Annotated[
    bool | int | float | str, WithJsonSchema({"type": ["boolean", "number", "string"]})
]


class Runtime(Settings):
    """How processes start, wait for each other and end; only `xla_flags` may change results."""

    huge_pages: Literal["auto", "off"] = "auto"
    """Linux on CPU: ask the C library for huge pages (the process restarts itself once)."""
    compile_cache: bool = True
    """keep compiled programs in the cache folder, so that the next start is fast."""
    xla_flags: dict[str, XlaValue] = Field(default_factory=dict)
    """options of XLA's compiler for the training step and the held-out step, by name without
    dashes, also in `glam plan`; `glam doctor` lists those that are known."""
    join_seconds: Positive = 300.0
    """on several hosts: how long to wait for all processes to connect."""
    heartbeat_seconds: Count = 100
    """on several hosts: how long a process may be silent before the others end."""
    step_timeout_seconds: Positive | None = 600.0
    """on several hosts: a process that makes no progress for so long prints its stacks and exits
    with 86; compiling, restoring and saving may take ten times as long. null disables this."""

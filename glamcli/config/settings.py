"""The base class of all settings read from YAML, and the types of their numbers."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from glamcli.errors import redacted

Count = Annotated[int, Field(ge=1, le=10**15)]
CountOrZero = Annotated[int, Field(ge=0, le=10**15)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Prose = Annotated[str, AfterValidator(redacted)]
"""Text for people, which is shown and stored: without the credentials of its URLs."""


def first_and_last(steps: str) -> tuple[int, int]:
    """Both ends of `FIRST:LAST`.

    Raises: ValueError when it is not that.
    """
    match = re.fullmatch(r"([1-9]\d{0,14}):([1-9]\d{0,14})", steps)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError("write FIRST:LAST, both included, as in 100:105")
    return int(match[1]), int(match[2])


def _is_span(steps: str) -> str:
    first_and_last(steps)
    return steps


StepSpan = Annotated[str, AfterValidator(_is_span)]
"""Some steps, `FIRST:LAST`."""
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

MAX_NEW_TOKENS = 65_536
"""Tokens of a generated text, at most: its key/value cache has to fit into memory."""
MAX_TEXTS = 256
"""Samples that grow side by side, and width of a beam, at most: rows of that cache."""


def is_due(step: int, period: int | None) -> bool:
    """Whether what happens every `period` steps does so at this one; None means never."""
    return period is not None and step % period == 0


class Settings(BaseModel):
    """Frozen settings; unknown keys are refused, and attribute docstrings describe the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

"""How texts are continued: what a caller chooses, checked before anything is loaded.

Made by the command line and the Python interface; the model's side is `generate.py`. Imports no
jax.
"""

from dataclasses import dataclass

from glamcli.config.settings import MAX_NEW_TOKENS, MAX_TEXTS
from glamcli.errors import RecipeError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_k: int | None = None
    """draw among this many most likely tokens."""
    top_p: float | None = None
    """draw among the fewest tokens that together have this probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError(f"`temperature` must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise RecipeError(f"`top_k` must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RecipeError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued: by samples or, with `beam`, by the best texts of a beam search.

    Raises:
        RecipeError: a setting is out of its range.
    """

    tokens: int = 128
    """of a continuation, at most."""
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    beam: int | None = None
    """width of the beam search."""
    alpha: float = 0.6
    """length penalty of the beam search."""
    seed: int = 0
    samples: int = 1
    """continuations per prompt."""

    def __post_init__(self) -> None:
        for name, most in (("tokens", MAX_NEW_TOKENS), ("samples", MAX_TEXTS), ("beam", MAX_TEXTS)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise RecipeError(f"`{name}` must be 1 to {most}, got {value}")
        if self.beam is not None and self.samples > self.beam:
            raise RecipeError(
                f"a beam of width {self.beam} cannot give {self.samples} samples",
                hint="raise `beam`",
            )
        _ = self.sampling  # checks its part

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

"""What a rule between fields yields, and advice: the names and values nearest to a refused one."""

import difflib
import math
from collections.abc import Iterable, Iterator

Found = Iterator[tuple[str, str, str | None]]
"""(key, what, hint) of every contradiction, the key being the one to edit."""


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str | None = None, *, cutoff: float = 0.6
) -> str | None:
    """The hint with the known name that is most like an unknown one; `otherwise` where none is.

    `cutoff` is how alike they have to be, from 0 to 1.
    """
    near = nearest(name, known, cutoff)
    return otherwise if near is None else f"did you mean `{near}`?"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like another, at least as alike as `cutoff`, from 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def use(*values: int) -> str:
    """The hint `use 2 or 4`."""
    return "use " + " or ".join(str(value) for value in dict.fromkeys(values))


def multiples(value: int, of: int) -> str:
    """The hint to use the multiples next to a value."""
    below = value // of * of
    return use(*([below] if below else []), below + of)


def divisors(value: int) -> list[int]:
    """Divisors in order; for huge values only the small ones and their counterparts."""
    small = [n for n in range(1, min(math.isqrt(value), 10**5) + 1) if value % n == 0]
    return sorted({*small, *(value // n for n in small)})

"""Words, and the n-grams of words that are searched for in texts.

Words become 64-bit numbers and n-grams polynomials of them, so memory holds the items' n-grams
(8 bytes each) and one piece of training text; two different n-grams are taken for the same about
once in 10^19 / (n-grams of the items x words of the training text) cases.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Words as they are compared."""
    return _WORD.findall(text.lower())


class Grams:
    """The n-grams of all items, and which of them occur in texts."""

    def __init__(self, wanted: Iterable[Sequence[str]]):
        """`wanted`: every n-gram as its words."""
        self._numbers: dict[str, int] = {}
        by_length: dict[int, set[int]] = {}
        for gram in wanted:
            by_length.setdefault(len(gram), set()).add(self._value(gram))
        self._known = {n: np.array(sorted(by_length[n]), np.uint64) for n in sorted(by_length)}
        ends = np.cumsum([0, *(len(known) for known in self._known.values())])
        self._starts = dict(zip(self._known, ends.tolist(), strict=False))
        self.count = int(ends[-1])

    def index(self, gram: Sequence[str]) -> int:
        """The number of one of the n-grams."""
        known = self._known[len(gram)]
        return self._starts[len(gram)] + int(np.searchsorted(known, np.uint64(self._value(gram))))

    def found(self, texts: Iterable[str]) -> np.ndarray:
        """Numbers of the n-grams that occur in the texts, each once, in order."""
        # 0 stands for a word of no item and for the end of a text: no n-gram extends over it.
        numbers = [
            number for text in texts for number in (*map(self._numbers.get, words(text)), None)
        ]
        h = np.array([number or 0 for number in numbers], np.uint64)
        unknown = np.concatenate([[0], np.cumsum(h == 0)])
        sums = np.zeros(len(h), np.uint64)
        hits = [np.zeros(0, np.int64)]
        for n in range(1, max(self._known, default=0) + 1):
            size = len(h) - n + 1
            if size <= 0:
                break
            sums = sums[:size] * _BASE + h[n - 1 :]  # modulo 2^64
            if n in self._known:
                inside = unknown[n:] == unknown[:size]
                hits.append(self._matches(n, sums[inside]))
        return np.unique(np.concatenate(hits))

    def _matches(self, n: int, values: np.ndarray) -> np.ndarray:
        known = self._known[n]
        at = np.searchsorted(known, values)
        at[at == len(known)] = 0
        return self._starts[n] + at[known[at] == values]

    def _value(self, gram: Sequence[str]) -> int:
        value = 0
        for word in gram:
            if word not in self._numbers:
                digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
                self._numbers[word] = int.from_bytes(digest, "big") | 1
            value = (value * int(_BASE) + self._numbers[word]) % 2**64
        return value

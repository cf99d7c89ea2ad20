"""The host's side of generation: the hypotheses of beam search, and text out of tokens.

Called by `generate.py`, which owns the model and the cache. Nothing here touches a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glamcli.data.tokenizer import Tokenizer

CONTEXT_PIECES = 8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NEVER = -1e30
"""The log-probability of a token that must not be produced."""


@dataclass(frozen=True)
class Hypothesis:
    """One text of a beam search."""

    text: str
    """the text up to a stop text or the end of the document."""
    ids: tuple[int, ...]
    """all tokens, those of the stop text included."""
    token_nats: tuple[float, ...]
    score: float
    """log-probability divided by the length penalty."""
    ended: bool
    """by a stop text or the end of the document, not by the limit."""


class TextStream:
    """Turns token ids into text as they come, holding back characters that are not complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._settle()

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty inside a character of several bytes."""
        self._ids.append(token_id)
        self._held += 1
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT) and self._held < 4:  # UTF-8 has at most four bytes
            return ""
        return self.flush()

    def flush(self) -> str:
        """What was held back, at the end of a text."""
        text = self._tokenizer.decode(self._ids)[self._num_shown :]
        self._settle()
        return text

    def _settle(self) -> None:
        # Some pieces are kept: a decoder drops the blank of a first piece.
        self._ids = self._ids[-CONTEXT_PIECES:]
        self._num_shown, self._held = len(self._tokenizer.decode(self._ids)), 0


class Search:
    """Beam search for one prompt, on the host; the device only ranks single steps."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], width: int, alpha: float, stop: Sequence[str]
    ):
        self.tokenizer, self.width, self.alpha, self.stop = tokenizer, width, alpha, stop
        self._tail = prompt[-CONTEXT_PIECES:]
        self._num_shown = len(tokenizer.decode(self._tail))
        # Only the first row is used at first: the others are copies of it.
        self.live: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = [(0.0, (), ())]
        self.ended: list[Hypothesis] = []

    def extend(self, nats_WK: np.ndarray, ids_WK: np.ndarray) -> tuple[list[int], list[int]]:
        """Keeps the best continuations; parent row and token of each of the `width` rows."""
        candidates = [
            (total + float(nats), row, int(token_id), float(nats))
            for row, (total, _, _) in enumerate(self.live)
            for nats, token_id in zip(nats_WK[row], ids_WK[row], strict=True)
            if nats > NEVER / 2
        ]
        candidates.sort(key=lambda each: -each[0])
        kept, parents, chosen = [], [], []
        for rank, (total, row, token_id, nats) in enumerate(candidates):
            if len(kept) == self.width:
                break
            ids = (*self.live[row][1], token_id)
            token_nats = (*self.live[row][2], nats)
            text = self._end(ids)
            if text is None:
                kept.append((total, ids, token_nats))
                parents.append(row)
                chosen.append(token_id)
            elif rank < self.width:  # an ending must be among the best to count
                score = total / self._penalty(len(ids))
                self.ended.append(Hypothesis(text, ids, token_nats, score, True))
        self.live = kept
        missing = self.width - len(kept)
        return parents + [0] * missing, chosen + [self.tokenizer.eos_id] * missing

    def settled(self, limit: int) -> bool:
        """Whether no unfinished text can still get among the best."""
        if not self.live:
            return True
        if len(self.ended) < self.width:
            return False
        worst = sorted(each.score for each in self.ended)[-self.width]
        return self.live[0][0] / self._penalty(limit) <= worst

    def results(self) -> list[Hypothesis]:
        """The best texts, ended or not, best first."""
        unfinished = [
            Hypothesis(self._text(ids), ids, nats, total / self._penalty(len(ids)), False)
            for total, ids, nats in self.live
        ]
        return sorted(self.ended + unfinished, key=lambda each: -each.score)[: self.width]

    def _penalty(self, length: int) -> float:
        return ((5 + length) / 6) ** self.alpha

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([*self._tail, *ids])[self._num_shown :]

    def _end(self, ids: Sequence[int]) -> str | None:
        """The text if it has ended, else None."""
        text = self._text(ids)
        body = text.lstrip(" ")
        ends = [end for end in (body.find(stop) for stop in self.stop) if end >= 0]
        if ends:
            return text[: len(text) - len(body) + min(ends)]
        return text if ids[-1] == self.tokenizer.eos_id else None

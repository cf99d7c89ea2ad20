"""The training text of a run or of a mixture, looked through for n-grams by several processes.

A run's text is that of its prepared rows, decoded; a mixture's, of which there are no rows, the
documents of its sources that are not held out. Either is read piece by piece.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glamcli.config.mixtures import Mixture
from glamcli.data.open import Dataset
from glamcli.data.rows import Rows
from glamcli.data.sources import Reading, documents
from glamcli.data.split import divide_mixture
from glamcli.data.tokenizer import Tokenizer
from glamcli.data.workers import num_cores
from glamcli.evals.paper.overlap import Grams, row_documents
from glamcli.progress import Progress

PIECE_TOKENS = 1 << 18
PIECE_CHARS = 1 << 20
# Fewer pieces than this are looked through before other processes would have started.
WORTH_PROCESSES_PIECES = 16


@dataclass(frozen=True)
class RowsPiece:
    """Documents that begin in some rows."""

    rows: Rows
    start: int
    end: int
    is_joined: bool

    def texts(self, tokenizer: Tokenizer | None) -> Iterator[str]:
        assert tokenizer is not None
        found = row_documents(self.rows, self.start, self.end, tokenizer.bos_id, self.is_joined)
        return (tokenizer.decode(ids) for ids in found)


@dataclass(frozen=True)
class TextsPiece:
    """Documents themselves."""

    documents: tuple[str, ...]

    def texts(self, tokenizer: Tokenizer | None) -> Iterator[str]:
        del tokenizer
        return iter(self.documents)


Piece = RowsPiece | TextsPiece
Pieces = Iterator[tuple[str, Piece]]
"""pieces with the source each is of"""


def of_rows(dataset: Dataset, packing: str) -> tuple[Pieces, int]:
    """The prepared training rows of a run; also the number of pieces."""
    plan: list[tuple[str, Piece]] = []
    for name, rows in dataset.prepared.train.items():
        step = max(1, PIECE_TOKENS // rows.row_tokens)
        plan += [
            (name, RowsPiece(rows, start, start + step, packing == "fill"))
            for start in range(0, len(rows), step)
        ]
    return iter(plan), len(plan)


def of_mixture(mixture: Mixture, cache: Path, progress: Progress) -> Pieces:
    """The documents of a mixture that are not held out."""
    sides = divide_mixture(mixture, cache, progress)
    for name, source in mixture.sources.items():
        piece: list[str] = []
        num_chars = 0
        for text, is_heldout in sides.divide(documents(source, name, Reading())):
            if is_heldout:
                continue
            piece.append(text)
            num_chars += len(text)
            if num_chars >= PIECE_CHARS:
                yield name, TextsPiece(tuple(piece))
                piece, num_chars = [], 0
        if piece:
            yield name, TextsPiece(tuple(piece))


def search(
    grams: Grams,
    pieces: Pieces,
    total: int | None,
    tokenizer: Tokenizer | None,
    progress: Progress,
    processes: int = 0,
) -> dict[str, np.ndarray]:
    """Which n-grams stand in the text of every source (booleans); 0 processes is one per core."""
    if total is not None and total < WORTH_PROCESSES_PIECES:
        processes = 1
    hits: dict[str, np.ndarray] = {}

    def note(name: str, found: np.ndarray) -> None:
        hits.setdefault(name, np.zeros(grams.count, bool))[found] = True

    with progress.phase("looking for overlap", total, "pieces") as phase:
        if processes == 1 or (processes or num_cores()) == 1:
            for name, piece in pieces:
                note(name, grams.found(piece.texts(tokenizer)))
                phase.advance()
            return hits
        context = multiprocessing.get_context("spawn")  # not fork: jax has threads
        count = processes or num_cores()
        with ProcessPoolExecutor(count, context, _start, (grams, tokenizer)) as pool:
            waiting: dict[Future[np.ndarray], str] = {}
            for name, piece in pieces:
                waiting[pool.submit(_found, piece)] = name
                while len(waiting) > 2 * count:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        note(waiting.pop(future), future.result())
                        phase.advance()
            for future, name in waiting.items():
                note(name, future.result())
                phase.advance()
    return hits


# Of a worker process: set once when it starts, so that neither travels with every piece.
_grams: Grams | None = None
_tokenizer: Tokenizer | None = None


def _start(grams: Grams, tokenizer: Tokenizer | None) -> None:
    global _grams, _tokenizer
    _grams, _tokenizer = grams, tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reacts, and ends the workers


def _found(piece: Piece) -> np.ndarray:
    assert _grams is not None
    return _grams.found(piece.texts(_tokenizer))

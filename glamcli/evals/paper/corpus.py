"""The training text of a run or of a mixture, searched for n-grams by several processes.

A run's text is that of its prepared rows, decoded; a mixture's, of which there are no rows, the
documents of its sources that are not held out. Either is read piece by piece.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from glamcli.config.mixtures import Mixture
from glamcli.data.cache import user_cache_dir
from glamcli.data.open import Dataset
from glamcli.data.parts import cut
from glamcli.data.rows import Rows
from glamcli.data.sources import documents
from glamcli.data.split import divide_mixture
from glamcli.data.tokenizer import Tokenizer
from glamcli.data.workers import Workers
from glamcli.evals.paper.ngrams import Grams
from glamcli.progress import Progress

_PIECE_TOKENS = 1 << 18
_PIECE_CHARS = 1 << 20
# Fewer pieces than this are searched before other processes would have started.
_WORTH_PROCESSES_PIECES = 16
_MEMORY_HINT = "run again with fewer `--processes`, which need less memory"


_Piece = list[str] | Callable[[Tokenizer], Iterator[str]]
"""documents, or what decodes them"""
_Pieces = Iterator[tuple[str, _Piece]]
"""pieces with the source each is of"""


def search_text(
    grams: Grams, text: Dataset | Mixture, packing: str, progress: Progress, processes: int = 0
) -> dict[str, np.ndarray]:
    """Which n-grams occur in every source (booleans [grams]): in the prepared training rows of a
    run, or in the documents of a mixture that are not held out.

    In rows of `packing` `fill` documents are put together over rows; 0 processes is one per core.
    """
    tokenizer = total = None
    if isinstance(text, Mixture):
        pieces = _mixture_pieces(text, progress)
    else:
        found = list(_row_pieces(text, packing))
        pieces, total, tokenizer = iter(found), len(found), text.tokenizer
        processes = 1 if total < _WORTH_PROCESSES_PIECES else processes
    hits: dict[str, np.ndarray] = {}

    def note(name: str, found: np.ndarray) -> None:
        hits.setdefault(name, np.zeros(grams.count, bool))[found] = True
        phase.advance()

    work = partial(_found, grams, tokenizer)
    with (
        progress.phase("searching for overlap", total, "pieces") as phase,
        Workers(work, processes, "searches for overlap", _MEMORY_HINT) as workers,
    ):
        for name, piece in pieces:
            workers.submit(piece, then=partial(note, name))
        workers.wait()
    return hits


def _row_pieces(dataset: Dataset, packing: str) -> _Pieces:
    """The prepared training rows of a run, piece by piece."""
    for name, rows in dataset.prepared.train.items():
        step = max(1, _PIECE_TOKENS // rows.row_tokens)
        for start in range(0, len(rows), step):
            yield name, partial(_row_texts, rows, start, start + step, packing == "fill")


def _mixture_pieces(mixture: Mixture, progress: Progress) -> _Pieces:
    """The documents of a mixture that are not held out."""
    sides = divide_mixture(mixture, user_cache_dir(), progress)
    for name, source in mixture.sources.items():
        for part in cut(sides.divide(documents(source, name)), _PIECE_CHARS):
            yield name, [text for text, is_heldout in part if not is_heldout]


def _found(grams: Grams, tokenizer: Tokenizer | None, piece: _Piece) -> np.ndarray:
    if isinstance(piece, list):
        return grams.found(piece)
    assert tokenizer is not None  # rows come with theirs
    return grams.found(piece(tokenizer))


def _row_texts(
    rows: Rows, start: int, end: int, is_joined: bool, tokenizer: Tokenizer
) -> Iterator[str]:
    """The documents that begin in rows `start` to `end`, put together again.

    `is_joined`: documents continue in the next row (packing `fill`); else each piece is a text.
    """
    document: list[int] | None = None
    for number in range(start, len(rows)):
        row = rows[number]
        for segment in range(1, int(row["segments"].max()) + 1):
            ids = row["tokens"][row["segments"] == segment].tolist()
            begins = ids[0] == tokenizer.bos_id
            if begins or not is_joined:
                if document is not None:
                    yield tokenizer.decode(document)
                if number >= end:
                    return
                document = ids[1:] if begins else ids
            elif document is not None:  # else it began before `start`
                document += ids
        if number >= end and document is None:
            return
    if document is not None:
        yield tokenizer.decode(document)

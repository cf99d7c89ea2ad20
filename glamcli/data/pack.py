"""Documents to rows: which token goes where, as NumPy arrays.

A document of tokens t1..tn becomes inputs BOS t1..tn and targets t1..tn EOS, so every token is an
input once and a target once, also when the document continues in another row. Segments count the
pieces of a row from 1; 0 marks padding, whose targets are 0 and never count.

A document arrives as chunks of token ids, so a very long one is never laid out at once. One
without any token adds nothing.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

Chunks = Iterable[np.ndarray]
Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
# Rows kept open for short pieces by `whole`: more waste less and cost more time per piece.
OPEN_ROWS = 64


def pack(
    documents: Iterable[Chunks], packing: str, row_tokens: int, bos_id: int, eos_id: int
) -> Iterator[Packed]:
    """Rows (tokens, targets, segments) of the documents, by the recipe's `data.packing`.

    `fill` fills rows to the last token; a document that does not fit continues in the next row.
    """
    positions = (_positions(d, number, bos_id, eos_id) for number, d in enumerate(documents))
    if packing == "whole":
        return _whole(positions, row_tokens)
    pieces = _pieces(chain.from_iterable(positions), row_tokens)
    return (_row([piece], row_tokens) for piece in pieces)


def _positions(document: Chunks, number: int, bos_id: int, eos_id: int) -> Iterator[np.ndarray]:
    """Input, target and number of the document at every position of it, block by block."""
    before = bos_id
    for chunk in document:
        if len(chunk):
            block = np.empty((3, len(chunk)), np.int32)
            block[0, 0], block[0, 1:], block[1], block[2] = before, chunk[:-1], chunk, number
            before = int(chunk[-1])
            yield block
    # `before` is still BOS only when there was no token (no text encodes to BOS).
    if before != bos_id:
        yield np.array([[before], [eos_id], [number]], np.int32)


def _pieces(blocks: Iterable[np.ndarray], row_tokens: int) -> Iterator[np.ndarray]:
    """The positions in pieces of a row, the last one shorter."""
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for block in blocks:
        waiting.append(block)
        num_waiting += block.shape[1]
        if num_waiting >= row_tokens:
            joined = np.concatenate(waiting, axis=1)
            num_whole = num_waiting // row_tokens * row_tokens
            for start in range(0, num_whole, row_tokens):
                yield joined[:, start : start + row_tokens]
            waiting = [joined[:, num_whole:]]
            num_waiting -= num_whole
    if num_waiting:
        yield np.concatenate(waiting, axis=1)


def _whole(documents: Iterable[Iterable[np.ndarray]], row_tokens: int) -> Iterator[Packed]:
    """Rows in which a document that fits into one is never split (first fit).

    Longer documents fill rows of their own; their rest is placed like a short document. When a
    piece fits nowhere and enough rows are open, the fullest is closed.
    """
    open_rows: list[list[np.ndarray]] = []
    room: list[int] = []
    for piece in chain.from_iterable(_pieces(blocks, row_tokens) for blocks in documents):
        size = piece.shape[1]
        chosen = next((i for i, free in enumerate(room) if free >= size), len(room))
        if chosen == OPEN_ROWS:
            fullest = room.index(min(room))
            yield _row(open_rows.pop(fullest), row_tokens)
            room.pop(fullest)
            chosen -= 1
        if chosen == len(room):
            open_rows.append([])
            room.append(row_tokens)
        open_rows[chosen].append(piece)
        room[chosen] -= size
        if room[chosen] == 0:
            yield _row(open_rows.pop(chosen), row_tokens)
            room.pop(chosen)
    for row in open_rows:
        yield _row(row, row_tokens)


def _row(pieces: list[np.ndarray], row_tokens: int) -> Packed:
    """The pieces side by side, padded; segments number the runs of equal documents."""
    filled = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    size = filled.shape[1]
    row = np.zeros((3, row_tokens), np.int32)
    row[:2, :size] = filled[:2]
    if filled[2, 0] != filled[2, -1]:  # their order is that of the documents
        row[2, 1:size] = np.cumsum(filled[2, 1:] != filled[2, :-1])
    row[2, :size] += 1
    return row[0], row[1], row[2]

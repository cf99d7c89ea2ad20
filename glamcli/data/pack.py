"""Documents to rows: which token goes where, as NumPy arrays.

A document of tokens t1..tn becomes inputs BOS t1..tn and targets t1..tn EOS, so every token is an
input once and a target once, also when the document continues in another row. Segments count the
pieces of a row from 1; 0 marks padding, whose targets are 0 and never count.

A document arrives as chunks of token ids, so a very long one is never laid out at once. One
without any token adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

Document = Iterable[np.ndarray]
Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
# Rows kept open for short pieces by `pack_whole`: more waste less and cost more time per piece.
OPEN_ROWS = 64
# Tokens `pack_fill` lays out at once.
BLOCK_TOKENS = 1 << 19


def pack(
    documents: Iterable[Document], packing: str, row_tokens: int, bos_id: int, eos_id: int
) -> Iterator[Packed]:
    """Rows (tokens, targets, segments) of the documents, by the recipe's `data.packing`."""
    layout = {"fill": pack_fill, "whole": pack_whole}[packing]
    return layout(documents, row_tokens, bos_id, eos_id)


def pack_fill(
    documents: Iterable[Document], row_tokens: int, bos_id: int, eos_id: int
) -> Iterator[Packed]:
    """Rows filled to the last token; a document that does not fit continues in the next row."""
    stream = np.zeros((3, 0), np.int32)  # inputs, targets, number of the document
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for number, document in enumerate(documents):
        for block in _positions(document, bos_id, eos_id):
            waiting.append(np.vstack([block, np.full(block.shape[1], number, np.int32)]))
            num_waiting += block.shape[1]
            if num_waiting >= BLOCK_TOKENS:
                stream = np.concatenate([stream, *waiting], axis=1)
                waiting, num_waiting = [], 0
                num_whole = stream.shape[1] // row_tokens * row_tokens
                yield from _cut(stream[:, :num_whole], row_tokens)
                stream = stream[:, num_whole:]
    yield from _cut(np.concatenate([stream, *waiting], axis=1), row_tokens)


def _positions(document: Document, bos_id: int, eos_id: int) -> Iterator[np.ndarray]:
    """Inputs and targets of every position of a document, block by block."""
    before = bos_id
    for chunk in document:
        if len(chunk):
            block = np.empty((2, len(chunk)), np.int32)
            block[0, 0], block[0, 1:], block[1] = before, chunk[:-1], chunk
            before = int(chunk[-1])
            yield block
    # `before` is still BOS only when there was no token (no text encodes to BOS).
    if before != bos_id:
        yield np.array([[before], [eos_id]], np.int32)


def _cut(stream: np.ndarray, row_tokens: int) -> Iterator[Packed]:
    """The stream as rows, the last one padded."""
    num_rows = -(-stream.shape[1] // row_tokens)
    padded = np.zeros((3, num_rows * row_tokens), np.int32)
    padded[:, : stream.shape[1]] = stream
    tokens, targets, numbers = padded.reshape(3, num_rows, row_tokens)
    # Per row 1, 2, .. for each run of equal document numbers, which may have gaps.
    steps = np.diff(numbers, axis=1, prepend=numbers[:, :1] - 1) != 0
    segments = np.cumsum(steps, axis=1, dtype=np.int32)
    segments.reshape(-1)[stream.shape[1] :] = 0
    yield from zip(tokens, targets, segments, strict=True)


def pack_whole(
    documents: Iterable[Document], row_tokens: int, bos_id: int, eos_id: int
) -> Iterator[Packed]:
    """Rows in which a document that fits into one is never split (first fit).

    Longer documents fill rows of their own; their rest is placed like a short document. When a
    piece fits nowhere and enough rows are open, the fullest is closed.
    """
    open_rows: list[list[np.ndarray]] = []
    room: list[int] = []
    for document in documents:
        for piece in _pieces(_positions(document, bos_id, eos_id), row_tokens):
            size = piece.shape[1]
            chosen = next((i for i, free in enumerate(room) if free >= size), len(room))
            if chosen == OPEN_ROWS:
                fullest = room.index(min(room))
                yield _join(open_rows.pop(fullest), row_tokens)
                room.pop(fullest)
                chosen -= 1
            if chosen == len(room):
                open_rows.append([])
                room.append(row_tokens)
            open_rows[chosen].append(piece)
            room[chosen] -= size
            if room[chosen] == 0:
                yield _join(open_rows.pop(chosen), row_tokens)
                room.pop(chosen)
    for row in open_rows:
        yield _join(row, row_tokens)


def _pieces(blocks: Iterable[np.ndarray], row_tokens: int) -> Iterator[np.ndarray]:
    """The positions of one document in pieces of a row, the last one shorter."""
    rest = np.zeros((2, 0), np.int32)
    for block in blocks:
        rest = np.concatenate([rest, block], axis=1)
        num_whole = rest.shape[1] // row_tokens * row_tokens
        for start in range(0, num_whole, row_tokens):
            yield rest[:, start : start + row_tokens]
        rest = rest[:, num_whole:]
    if rest.shape[1]:
        yield rest


def _join(pieces: list[np.ndarray], row_tokens: int) -> Packed:
    row = np.zeros((3, row_tokens), np.int32)
    start = 0
    for number, piece in enumerate(pieces, 1):
        end = start + piece.shape[1]
        row[:2, start:end] = piece
        row[2, start:end] = number
        start = end
    return row[0], row[1], row[2]

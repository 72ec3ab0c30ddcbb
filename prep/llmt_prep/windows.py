"""Windows of documents that are packed together: all sources merged in proportion, in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.mixture import Mixture, Selection, Source
from llmt_prep.order import Documents


class _Placed(NamedTuple):
    """Documents of one source, in order."""

    documents: Documents
    place: NDArray[np.float64]
    """Share of the source's selected tokens before the document's middle: rises from 0 to 1."""


def windows(sources: Sequence[Source], mixture: Mixture, window_documents: int) -> Iterator[Documents]:
    """Yield all selected documents in windows of ``window_documents``; the last may hold fewer.

    A document's place is the share of its source's tokens that come before its middle, and all sources are merged by
    place: up to any point they have given the same share of their tokens, within half a document. Memory: of each
    source one group, 12 bytes a document (20 of chats and pairs) and so at most 13 MB (21), and one piece; besides,
    about one window.
    """
    streams = [_placed(source, selection) for source, selection in zip(sources, mixture.selections, strict=True)]
    return in_windows(_merged(streams), window_documents)


def in_windows(pieces: Iterable[Documents], window_documents: int) -> Iterator[Documents]:
    """Cut a stream of documents anew, into windows of ``window_documents``; the last may hold fewer."""
    parts: list[Documents] = []
    ready = 0
    for piece in pieces:
        parts.append(piece)
        ready += len(piece.document)
        if ready >= window_documents:
            whole = _joined(parts)
            cut = ready - ready % window_documents
            for start in range(0, cut, window_documents):
                yield _part(whole, start, start + window_documents)
            parts, ready = [_part(whole, cut, ready)], ready - cut
    if ready:
        yield _joined(parts)


def _placed(source: Source, selection: Selection) -> Iterator[_Placed]:
    before, left = 0, selection.selected
    for epoch in range(selection.whole_epochs + (selection.extra_documents > 0)):
        for piece in source.in_order(epoch):
            documents = _part(piece, 0, left)
            lands = source.landing(documents)
            ends = before + np.cumsum(lands)
            yield _Placed(documents, (2 * ends - lands) / (2 * selection.got))
            before, left = int(ends[-1]), left - len(lands)
            if not left:
                return


def _merged(streams: Sequence[Iterator[_Placed]]) -> Iterator[Documents]:
    """Merge by place, then source: one piece of each source waits, and all go as far as the piece that ends first."""
    waiting = {number: piece for number, stream in enumerate(streams) if (piece := next(stream, None)) is not None}
    while waiting:
        edge, shortest = min((piece.place[-1], number) for number, piece in waiting.items())
        parts = []
        for number, piece in waiting.items():
            end = int(np.searchsorted(piece.place, edge, "right" if number <= shortest else "left"))
            parts.append(_cut(piece, 0, end))
            waiting[number] = _cut(piece, end, len(piece.place))
        order = np.argsort(np.concatenate([part.place for part in parts]), kind="stable")
        yield Documents._make(column[order] for column in _joined([part.documents for part in parts]))
        following = next(streams[shortest], None)
        if following is None:
            del waiting[shortest]
        else:
            waiting[shortest] = following


def _cut(piece: _Placed, start: int, end: int) -> _Placed:
    return _Placed(_part(piece.documents, start, end), piece.place[start:end])


def _joined(parts: Sequence[Documents]) -> Documents:
    return Documents(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _part(documents: Documents, start: int, end: int) -> Documents:
    return Documents._make(column[start:end] for column in documents)

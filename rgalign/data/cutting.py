"""What goes first when a prompt is too long [C]: the ends of texts, then old history, then the last features."""

from bisect import bisect_right
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Piece:
    """One feature in ids: what opens it, its units (a value; a history's entries, oldest first), what closes it."""

    column: str
    kind: str
    opening: list[int]
    units: list[list[int]]
    closing: list[int]

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return [*self.opening, *(i for unit in self.units for i in unit), *self.closing]


def cut(pieces: list[Piece], room: int) -> list[Piece]:
    """The pieces, in their order, cut to at most `room` ids together.

    First the longest text loses its end until it is no longer than the next, then both do, and so on; a text of which
    nothing is left goes. Then the longest history loses its oldest entry, again and again. Then the last features go.
    """
    pieces = _cut_texts(pieces, room)
    while _size(pieces) > room and any(piece.kind == "history" for piece in pieces):
        longest = max((p for p in pieces if p.kind == "history"), key=lambda piece: len(piece.ids))
        shorter = replace(longest, units=longest.units[1:])
        pieces = [shorter if piece is longest else piece for piece in pieces]
        pieces = [piece for piece in pieces if piece.units]
    while _size(pieces) > room:
        pieces = pieces[:-1]
    return pieces


def _cut_texts(pieces: list[Piece], room: int) -> list[Piece]:
    texts = [piece for piece in pieces if piece.kind == "text"]
    lengths = [sum(map(len, piece.units)) for piece in texts]
    spare = room - (_size(pieces) - sum(lengths))
    if spare >= sum(lengths):
        return pieces
    levels = range(max(lengths, default=0) + 1)
    level = bisect_right(levels, spare, key=lambda level: sum(min(length, level) for length in lengths)) - 1
    if level < 1:
        return [piece for piece in pieces if piece.kind != "text"]
    return [replace(p, units=[_first(p, level)]) if p.kind == "text" else p for p in pieces]


def _first(piece: Piece, level: int) -> list[int]:
    return [i for unit in piece.units for i in unit][:level]


def _size(pieces: list[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)

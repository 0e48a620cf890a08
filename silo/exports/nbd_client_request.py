"""One request of an NBD client, and what its reply has told so far.

A reply may come in many pieces, and the server is not trusted: content outside of what was asked for, or twice, a
status that nobody asked for, a success that leaves bytes untold all raise `RemoteProtocolError`. What has to be
remembered meanwhile is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from silo.errors import RemoteProtocolError, SiloError
from silo.exports.nbd_wire import Command, NbdError, error_from_code

__all__ = ["NbdRequest"]

_PIECES_MAX: Final = 1 << 16
"""Pieces of one reply that are out of order: as many as there are blocks in the largest usual request."""


@attrs.define(eq=False)
class NbdRequest:
    """A request on its way."""

    cookie: int
    command: Command
    offset: int
    length: int
    into: memoryview | None = None
    """For READ: where the content goes. None once nobody wants it any more."""
    contexts: Mapping[int, str] = attrs.field(factory=dict)
    """For BLOCK_STATUS: the contexts that the reply must tell about."""
    one: bool = False
    """For BLOCK_STATUS: a single extent was asked for."""
    abandoned: bool = False
    status: dict[str, list[tuple[int, int]]] = attrs.field(factory=dict)
    """Per context, ``(length, flags)`` of consecutive extents."""
    error: SiloError | None = None
    code: int = 0
    """The server's error code, 0 for success."""
    _pieces: list[tuple[int, int]] = attrs.field(factory=list)
    """Extents ``(offset, length)`` of the content received so far, those that follow one another joined."""
    _told: int = 0
    """How many bytes that is."""

    def __str__(self) -> str:
        if self.command is Command.FLUSH:
            return "flush"
        return f"{self.command.name.lower()} of {self.length} bytes at {self.offset}"

    def forget(self) -> None:
        """Nobody wants the reply any more."""
        self.abandoned = True
        self.into = None

    def claim(self, offset: int, length: int) -> memoryview | None:
        """Note that content arrives; the memory that it belongs to, or None when nobody wants it any more."""
        start = offset - self.offset
        if self.command is not Command.READ or start < 0 or start + length > self.length:
            raise RemoteProtocolError(f"content for {offset}+{length} is outside of the {self}")
        self._told += length
        if self._told > self.length:
            raise RemoteProtocolError(f"more content than the {self} asks for")
        pieces = self._pieces
        if pieces and sum(pieces[-1]) == offset:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + length)
        elif len(pieces) < _PIECES_MAX:
            pieces.append((offset, length))
        else:
            raise RemoteProtocolError(f"the content of the {self} comes in too many pieces")
        return None if self.into is None else self.into[start : start + length]

    def take_status(self, context_id: int, extents: list[tuple[int, int]]) -> None:
        """Note the status in one context."""
        name = self.contexts.get(context_id)
        if name is None or name in self.status:
            raise RemoteProtocolError(f"the status of context {context_id} was not asked for, or comes twice")
        if self.one and (len(extents) > 1 or extents[0][0] > self.length):
            raise RemoteProtocolError("more status was told than the one extent that was asked for")
        if sum(length for length, _ in extents[:-1]) >= self.length:
            raise RemoteProtocolError("the status goes on past the extent that was asked for")
        self.status[name] = extents

    def fail(self, code: int, message: str) -> None:
        """Note an error; the first one counts."""
        if self.error is None:
            name = NbdError(code).name if code in NbdError.__members__.values() else f"error {code}"
            self.code = code
            self.error = error_from_code(code, f"{self}: {message or name}")

    def finish(self) -> None:
        """The last part of the reply was here: it must be complete, unless it is an error."""
        self.into = None  # a bytearray cannot be resized while somebody has a view of it
        if self.error is not None:
            return
        if self.command is Command.READ:
            self._check_content()
        elif self.command is Command.BLOCK_STATUS and len(self.status) != len(self.contexts):
            raise RemoteProtocolError(f"the reply to the {self} leaves out a context")

    def _check_content(self) -> None:
        """All of the bytes, each of them once."""
        position = self.offset
        for offset, length in sorted(self._pieces):
            if offset != position:
                raise RemoteProtocolError(f"the content of the {self} has a gap or an overlap at {position}")
            position += length
        if position != self.offset + self.length:
            raise RemoteProtocolError(f"the content of the {self} ends at {position}")

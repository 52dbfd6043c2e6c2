"""What happens in folders, as it happens (Linux's inotify): how a test hits the moment between a write and a rename."""

import ctypes
import os
import select
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

WRITTEN, MADE, RENAMED = 0x2, 0x100, 0x80  # modified, created, moved to this name
HEADER = struct.Struct("iIII")


class Events:
    """Events of folders that are there when watching begins; names of folders made later are told, not watched."""

    def __init__(self, folders: Sequence[Path]):
        self._system = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._system.inotify_init1(os.O_NONBLOCK)
        kinds = WRITTEN | MADE | RENAMED
        self._folders = {
            self._system.inotify_add_watch(self._descriptor, os.fsencode(folder), kinds): folder for folder in folders
        }

    def wait(self, seconds: float) -> Iterator[tuple[int, Path]]:
        """(kind, path) of what happens, for so long; kind is WRITTEN, MADE or RENAMED."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            if select.select([self._descriptor], [], [], left)[0]:
                yield from self._read()

    def _read(self) -> Iterator[tuple[int, Path]]:
        buffer = os.read(self._descriptor, 1 << 16)
        while buffer:
            watch, kind, _, length = HEADER.unpack_from(buffer)
            name = buffer[HEADER.size : HEADER.size + length].rstrip(b"\0")
            buffer = buffer[HEADER.size + length :]
            yield kind & (WRITTEN | MADE | RENAMED), self._folders[watch] / os.fsdecode(name)

    def close(self) -> None:
        os.close(self._descriptor)

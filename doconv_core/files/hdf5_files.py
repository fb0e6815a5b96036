"""Files that h5py takes in place of a path: a part of one, and one that may fill a disk."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO


class Written:
    """A file for h5py to write, whose errors HDF5's library does not see.

    Where a write fails, such as on a full disk, the library (1.14.6) cannot close the file, tells
    of it as of any damage, and may crash when the process ends. So what cannot be written is kept
    in memory until the file is closed, and the error is raised then, or by `check`; so is an
    interruption. mode: as `open` takes it. Use as a context manager.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self._file: Any = path.open(mode, buffering=0)
        self._at = 0
        self._error: BaseException | None = None
        self._kept: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise what a write has met: an OSError, or an interruption."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position, as files do."""
        end = max((begin + len(data) for begin, data in self._kept), default=0)
        self._at = offset + (0, self._at, max(self._file.seek(0, 2), end))[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def write(self, data: Any) -> int:
        """Write all of the data, or keep it."""
        view = memoryview(data).cast("B")
        begin, done = self._at, 0
        try:
            self.check()
            self._file.seek(begin)
            while done < len(view):
                done += self._file.write(view[done:])
        except (OSError, KeyboardInterrupt) as error:
            self._error = error
            self._kept.append((begin + done, bytes(view[done:])))
        self._at += len(view)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what has been written or kept."""
        view = memoryview(buffer).cast("B")
        begin, end = self._at, self._at + len(view)
        self._file.seek(begin)
        found = self._file.readinto(view)
        for start, data in self._kept:
            first, last = max(start, begin), min(start + len(data), end)
            if first < last:
                view[first - begin : last - begin] = data[first - start : last - start]
                found = max(found, last - begin)
        self._at += found
        return int(found)

    def read(self, size: int) -> bytes:
        """Return bytes, as files do."""
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])

    def truncate(self, size: int | None = None) -> int:
        """Cut the file, or make it longer."""
        size = self._at if size is None else size
        try:
            self.check()
            self._file.truncate(size)
        except (OSError, KeyboardInterrupt) as error:
            self._error = error
        return size

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""

    def __enter__(self) -> Written:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self.check()


class Window:
    """A part of a file, as a file of its own for h5py to read."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position, as files do."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        self._file.seek(self._begin + self._at)
        read = self._file.readinto(view[:count])  # type: ignore[attr-defined]
        self._at += read
        return int(read)

    def read(self, size: int = -1) -> bytes:
        """Return bytes, as files do."""
        buffer = bytearray(self._size - self._at if size < 0 else min(size, self._size))
        return bytes(buffer[: self.readinto(buffer)])

    def write(self, data: bytes) -> int:
        """Refuse: the part is only read."""
        raise OSError("the file is open for reading only")

    def truncate(self, size: int | None = None) -> int:
        """Refuse: the part is only read."""
        raise OSError("the file is open for reading only")

    def flush(self) -> None:
        """Do nothing; h5py asks for it."""

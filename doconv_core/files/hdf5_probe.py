"""Reads all that HDF5's library parses of a file, in a process of its own, within limits.

On a file that was made to, the library may search forever, ask for all memory, or crash. Whoever
runs this learns of it by how the process ends; what h5py itself refuses is no concern here. It is
run by its path and imports h5py alone, so that it starts fast.
"""

import os
import sys
from typing import Any

import h5py

SECONDS, BYTES = 3, 1 << 30  # of processor time and of memory, beyond what starting took


def limit() -> None:
    """Let the system end this process where it takes too much; elsewhere only time is limited."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def visit(group: Any, left: int, path: str = "") -> None:
    """Read names, links, types and attributes, at most `left` groups deep."""
    list(group.attrs.values())
    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.HardLink):
            item = group[name]
            if isinstance(item, h5py.Group) and left:
                visit(item, left - 1, f"{path}{name}/")
                continue
            list(item.attrs.values())
            if isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
                tell(f"{path}{name}")


def tell(elsewhere: str) -> None:
    """Print the path of an array that is kept in another file, and end, whatever is open.

    A process that has opened such an array may crash when it closes the file.
    """
    sys.stdout.buffer.write(elsewhere.encode(errors="surrogatepass"))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    limit()
    try:
        with h5py.File(sys.argv[1], "r") as file:
            visit(file, 65)
    except Exception:  # which whoever reads the file meets, too
        sys.exit(0)

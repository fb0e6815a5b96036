"""Kernel sizes that a file does not tell, as the caller gives them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import prod

from doconv_core.files.checkpoint import KernelSizes
from doconv_core.maths.spec import MAX_RANK, as_integer, is_sequence


class Sizes:
    """Kernel sizes by glob pattern on a layer's names; the first pattern that matches counts.

    Raises TypeError or ValueError for what is no kernel size.
    """

    def __init__(self, sizes: KernelSizes) -> None:
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._unused = set(sizes)
        self._asked: list[str] = []
        for pattern, size in sizes.items():
            if not is_sequence(size) or not 1 <= len(size) <= MAX_RANK:
                raise ValueError(
                    f"kernel_sizes must give 1 to {MAX_RANK} integers for each pattern; received "
                    f"{size!r} for {pattern!r}."
                )
            self._sizes[pattern] = tuple(
                as_integer(f"kernel_sizes[{pattern!r}]", entry) for entry in size
            )

    def given(self, names: Iterable[str], taps: int) -> tuple[int, ...] | None:
        """Return the kernel size given for the layer that bears one of these names, if any is.

        Raises ValueError where its product is not `taps`.
        """
        names = list(dict.fromkeys(names))
        self._asked += names
        matching = [
            pattern for pattern in self._sizes if any(fnmatchcase(name, pattern) for name in names)
        ]
        self._unused.difference_update(matching)
        if not matching:
            return None
        size = self._sizes[matching[0]]
        if prod(size) != taps:
            raise ValueError(
                f"layer {names[0]!r} has {taps} kernel taps; received the kernel size {size}, "
                f"which has {prod(size)}."
            )
        return size

    def check_used(self) -> None:
        """Raise ValueError for a pattern that no over-parameterized layer has matched."""
        if self._unused:
            there = ", ".join(map(repr, self._asked[:3])) or "no over-parameterized layer"
            raise ValueError(
                f"kernel_sizes: {', '.join(map(repr, sorted(self._unused)))} matches no "
                f"over-parameterized layer; the file has {there}."
            )

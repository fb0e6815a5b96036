"""The state dicts in what training writes, and tensors beside them that bear no names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from doconv_core.files.entries import NO_MODEL

MAX_DEPTH = 8  # of dicts and lists in each other, among which state dicts are looked for


class StateDicts:
    """The state dicts in what a file holds, by the keys that lead to them, and what is above them.

    is_tensor: tells a tensor, of whatever framework; it has a `shape`. found: dicts of tensors by
    name, of which one has two axes or more; they lie in dicts, lists and tuples. What is reached
    twice counts once. others: the keys of what else there is beside them.
    """

    def __init__(self, content: Any, is_tensor: Callable[[Any], bool]) -> None:
        self.found: dict[str, Any] = {}
        self.others: list[str] = []
        self._content, self._is_tensor = content, is_tensor
        self._above: set[int] = set()
        self._seen: set[int] = set()
        self._visit(content, "", 0)

    def holds(self, value: Any) -> bool:
        """Return whether `value` is one of them, or above one."""
        return id(value) in self._above

    def tensors_of(self, content: Any) -> dict[str, Any]:
        """Return the tensors by name of a dict; none of anything else."""
        if not isinstance(content, Mapping):
            return {}
        return {k: v for k, v in content.items() if isinstance(k, str) and self._is_tensor(v)}

    def _visit(self, content: Any, path: str, depth: int) -> bool:
        if not is_container(content) or id(content) in self._seen or depth > MAX_DEPTH:
            return self.holds(content)
        self._seen.add(id(content))
        own = self.tensors_of(content)
        is_state = any(len(tensor.shape) > 1 for tensor in own.values())
        if is_state:
            self.found[path] = content
        others = []
        below = False
        for key, value in items_of(content):
            name = joined(path, str(key))
            if _is_followed(content, key) and self._visit(value, name, depth + 1):
                below = True
            elif not (is_state and key in own):
                others.append(name)
        if is_state or below:
            self._above.add(id(content))
            self.others += others
        return is_state or below

    def nameless(self, shapes: Collection[tuple[int, ...]]) -> dict[str, int]:
        """Return where tensors lie that are in no state dict, and how many, by the keys to them.

        Only where one of them has one of these shapes. They may be a copy of the model, such as an
        average that is kept as a list.
        """
        return {
            path: len(tensors)
            for path, tensors in self._outside()
            if any(tuple(tensor.shape) in shapes for tensor in tensors)
        }

    def _outside(self) -> Iterator[tuple[str, list[Any]]]:
        states = {id(state) for state in self.found.values()}
        waiting, seen = [("", self._content)], set()
        while waiting:
            path, content = waiting.pop()
            if not is_container(content) or id(content) in seen:
                continue
            seen.add(id(content))
            items = [(k, v) for k, v in items_of(content) if not _is_no_model(content, k)]
            named = self.tensors_of(content) if id(content) in states else {}
            yield path, [v for key, v in items if key not in named and self._is_tensor(v)]
            waiting += [(joined(path, str(key)), value) for key, value in reversed(items)]


def is_container(value: Any) -> bool:
    """Return whether `value` may hold state dicts."""
    return isinstance(value, (Mapping, list, tuple))


def items_of(container: Any) -> list[tuple[Any, Any]]:
    """Return what a dict, list or tuple holds, with its keys or numbers."""
    return list(container.items() if isinstance(container, Mapping) else enumerate(container))


def joined(part: str, key: str) -> str:
    """Return the name of an entry: the keys that lead to it, with slashes between."""
    return f"{part}/{key}" if part else key


def _is_followed(container: Any, key: Any) -> bool:
    is_named = isinstance(key, str) or not isinstance(container, Mapping)
    return is_named and not _is_no_model(container, key)


def _is_no_model(container: Any, key: Any) -> bool:
    return isinstance(key, str) and NO_MODEL.search(key.lower()) is not None

"""PyTorch's files, as far as they can be told without PyTorch, and the state dicts in them."""

from __future__ import annotations

import argparse
import pickletools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from doconv_core.backends import GROUP
from doconv_core.files.checkpoint import Beginning, Checkpoint
from doconv_core.files.entries import (
    AVERAGED,
    NO_MODEL,
    PYTORCH,
    Allowed,
    Array,
    CheckpointError,
    Entry,
    KernelSizes,
    shown,
)
from doconv_core.files.paths import check_whole

NAME, SUFFIXES, FRAMEWORK = "PyTorch", (".pt", ".pth", ".bin", ".ckpt"), PYTORCH
ALLOWS = True  # classes, by `open_checkpoint(…, allow=…)`
TYPES = frozenset((
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
))  # fmt: skip

# How the number begins a file of torch.save from before it wrote archives.
MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def sniff(begin: Beginning) -> bool:
    """Return whether this is an archive with a data.pkl, or any pickle."""
    head = begin.head
    if head[:1] == b"\x80" and len(head) > 1 and head[8:9] != b"{":  # that is safetensors'
        return 2 <= head[1] <= 5
    return any(name.rpartition("/")[2] == "data.pkl" for name in begin.members)


def read(path: Path, kernel_sizes: KernelSizes, allow: Allowed = ()) -> Checkpoint:
    """Return the open file, read by PyTorch with `weights_only=True`. allow: as in `Inert`."""
    check_whole(path)
    with path.open("rb") as file:
        head = file.read(1 << 16)
    zipped = head[:1] != b"\x80"
    if not zipped and MAGIC not in head[:64]:
        raise CheckpointError(
            f"{path} is a pickle that torch.save did not write{_calls(head)}; unpickling could run "
            "any code, so it is not read."
        )
    try:
        files = _backend()
    except ImportError as error:
        raise CheckpointError(f"{path} is a PyTorch file. {error}") from error
    checkpoint: Checkpoint = files.PyTorchCheckpoint(path, kernel_sizes, zipped=zipped, allow=allow)
    return checkpoint


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write a state dict; of `like`, what it has beside its tensors, and how they lie in it."""
    _backend().write(path, entries, arrays, like)


def _backend() -> Any:
    """Return what the backend has for files; ImportError where PyTorch is missing."""
    for backend in metadata.entry_points(group=GROUP, name="torch"):
        return import_module(f"{backend.load().__name__}.files")
    raise ImportError("doconv_torch, which reads and writes PyTorch's files, is not installed.")


def _calls(begin: bytes) -> str:
    """Return what a pickle's first global is, to tell; nothing is unpickled."""
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(begin):
            if opcode.name in ("GLOBAL", "INST"):
                return f", and needs {shown(str(argument).replace(' ', '.'))}"
            if opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                return f", and needs {shown('.'.join(texts[-2:]))}"
            if isinstance(argument, str) and opcode.name != "PUT":
                texts.append(argument)
    except ValueError:  # truncated, perhaps by us
        return ""
    return ""


MAX_DEPTH = 8  # of dicts and lists in each other, among which state dicts are looked for
GROUPS, STATE = "param_groups", "state"  # what an optimizer's state has
# What optimizers keep averages and copies of the parameters under, beside what `AVERAGED` knows:
# ASGD, Lookahead, SAM, mixed precision, schedule-free ones and those that keep where they began.
AVERAGES = ("ax", "z", "x0", "p0")
COPIED = re.compile("(^|[^a-z])(slow|master|polyak|params?|weights?|p)([^a-z]|$)")


class StateDicts:
    """The state dicts in what a file holds, by the keys that lead to them, and what is above them.

    is_tensor: tells a tensor, of whatever framework; it has a `shape`. found: dicts of tensors by
    name, of which one has two axes or more; they lie in dicts, lists and tuples. Tensors that stand
    beside a dict of these, and are in no module, are none. What is reached twice counts once.
    others: the keys of what else there is beside them. twice: the keys to several of them, where
    they are the same; else None.
    """

    def __init__(self, content: Any, is_tensor: Callable[[Any], bool]) -> None:
        self.found: dict[str, Any] = {}
        self.others: list[str] = []
        self.twice: str | None = None
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
            self.twice = path if path in self.found else self.twice
            self.found[path] = content
        others = []
        below = False
        for key, value in items_of(content):
            name = joined(path, str(key))
            if _is_followed(content, key) and self._visit(value, name, depth + 1):
                below = True
            elif not (is_state and key in own):
                others.append(name)
        if below and is_state and not any("." in key or key.endswith("weight") for key in own):
            # Such as a confusion matrix: a model's own entries have the names of modules.
            is_state = False
            del self.found[path]
            others += [joined(path, key) for key in own]
        if is_state or below:
            self._above.add(id(content))
            self.others += others
        return is_state or below

    def outside(self) -> Iterator[tuple[str, list[tuple[Any, Any]], bool]]:
        """Yield what lies in no state dict, wherever it is: the keys to it, and arrays by theirs.

        A copy of the model may be among them. Last, whether these are what an optimizer knows of a
        parameter, and no copy of any, but for averages.
        """
        states = {id(state) for state in self.found.values()}
        waiting, seen = [("", self._content, 0)], set()
        while waiting:
            path, content, in_optimizer = waiting.pop()
            if id(content) in seen:
                continue
            seen.add(id(content))
            items = inner_items(content)
            known = self.tensors_of(content) if id(content) in states else {}
            arrays = [(k, v) for k, v in items if is_array(v)]
            if arrays:
                yield path, [(k, v) for k, v in arrays if k not in known], in_optimizer == 2
            for key, value in reversed(items):
                if _is_inside(value):
                    begins = _is_state(content, key, value)
                    below = in_optimizer + 1 if in_optimizer else int(begins)
                    waiting.append((joined(path, str(key)), value, below))


def is_array(value: Any) -> bool:
    """Return whether `value` is a tensor or an array."""
    kind = type(value)  # an object's own attributes may be of any names, as those of arguments are
    if not (hasattr(kind, "shape") and hasattr(kind, "dtype")):
        return False
    return not getattr(value, "is_nested", False)  # which has no one shape


def is_container(value: Any) -> bool:
    """Return whether `value` may hold state dicts."""
    return isinstance(value, (Mapping, list, tuple))


def items_of(container: Any) -> list[tuple[Any, Any]]:
    """Return what a dict, list or tuple holds, with its keys or numbers."""
    return list(container.items() if isinstance(container, Mapping) else enumerate(container))


def inner_items(value: Any) -> list[tuple[Any, Any]]:
    """Return what a container or an object holds: its items, and its attributes."""
    items = items_of(value) if is_container(value) else []
    if isinstance(value, (set, frozenset)):
        items = [*enumerate(value)]
    return [*items, *getattr(value, "__dict__", {}).items()]


def _is_inside(value: Any) -> bool:
    """Return whether there may be arrays in `value`, which is none."""
    if is_array(value) or isinstance(value, type):
        return False
    holds = is_container(value) or isinstance(value, (set, frozenset))
    return holds or bool(getattr(value, "__dict__", None))


def joined(part: str, key: str) -> str:
    """Return the name of an entry: the keys that lead to it, with slashes between."""
    return f"{part}/{key}" if part else key


def is_optimizer(value: Any) -> bool:
    """Return whether `value` is an optimizer's state, as PyTorch's optimizers give it."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get(GROUPS), (list, tuple))
        and isinstance(value.get(STATE), Mapping)
    )


def is_average(key: Any) -> bool:
    """Return whether an optimizer keeps averages or copies of the parameters by this key."""
    words = (AVERAGED, COPIED)
    return isinstance(key, str) and (key in AVERAGES or any(w.search(key.lower()) for w in words))


def _is_state(container: Any, key: Any, value: Any) -> bool:
    """Return whether this is where an optimizer keeps what it knows of each parameter."""
    if key != STATE or not isinstance(value, Mapping):
        return False
    return is_optimizer(container) or all(isinstance(number, int) for number in value)


def _is_followed(container: Any, key: Any) -> bool:
    if not isinstance(container, Mapping):
        return True
    if not isinstance(key, str) or NO_MODEL.search(key.lower()):
        return False
    return not (key == STATE and is_optimizer(container))


def walk(content: Any) -> Iterator[Any]:
    """Yield everything in what was read from a pickle, each thing once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type)):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            waiting += dict.values(value)
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        waiting += attributes(value).values()


def attributes(value: Any) -> dict[str, Any]:
    """Return what an object has of its own, in its `__dict__`."""
    own = getattr(value, "__dict__", None)
    return own if isinstance(own, dict) else {}


def check_attributes(path: Any, content: Any) -> None:
    """Raise CheckpointError where a pickle hides a method of an object behind an attribute.

    What is done to the object later would find that attribute in place of the method.
    """
    for value in walk(content):
        is_known = type(value) in (argparse.Namespace, types.SimpleNamespace)
        if not (is_known or isinstance(value, dict) or hasattr(type(value), "dtype")):
            continue
        for name in attributes(value):
            if not isinstance(name, str) or hasattr(type(value), name):
                raise CheckpointError(
                    f"{path} gives an object of {type(value).__name__} the attribute {name!r}, "
                    "which is one of the class's own; it is not read."
                )

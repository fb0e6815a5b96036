"""What a file holds: entries, their names and numbers, and the layers that they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from doconv_core.kinds.base import ComposedKind, kind_named
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.layers import LinearSpec

Array = NDArray[Any]


KernelSizes: TypeAlias = Mapping[str, tuple[int, ...]]
Progress: TypeAlias = Callable[[int, int], None]

D = DO_CONV.names[1]  # the role of a DO-Conv layer's D
IDENTITY = "identity"  # the role of the one that the reference implementation stores
CONVOLUTION, LINEAR, BATCH_NORM, OTHER = "convolution", "linear", "batch norm", "other"


class CheckpointError(ValueError):
    """A file that is damaged, hostile, foreign, or in need of what it does not tell: one line.

    >>> with open("broken.safetensors", "wb") as file:
    ...     _ = file.write(b"no header")
    >>> open_checkpoint("broken.safetensors")
    Traceback (most recent call last):
        ...
    doconv_core.files.entries.CheckpointError: broken.safetensors ...
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Entry:
    """An array in a file, unread. name: unique in the file.

    dtype: NumPy's word, "bfloat16", or the format's for a type that NumPy lacks. It is of two words
    for what is no plain array, such as "quantized qint8": that is not read, and is carried over.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of the array's elements."""
        return prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain array, which can be read."""
        return " " not in self.dtype


@dataclass(frozen=True)
class Layer:
    """A layer, as far as the names and shapes of a file's entries tell.

    path: where it is in the model, dots between names where the format has them; without a
    `module.` that a wrapper put before all names, and without the part.
    kind: "convolution" (a transposed one looks the same), "linear" (or an embedding),
    "batch norm", "other".
    entries: the names of the entries by role, in the file's order. Roles: weight, the others of the
    kind that composes it, identity (the reference implementation's), bias; of a batch norm also
    running_mean, running_var, num_batches_tracked. The entries of an "other" bear their own names.
    origin: "doconv", of an "other" with a note too if it seems to be a layer of this package, and
    cannot be folded; "reference PyTorch", "reference TensorFlow" or "reference Gluon" for a layer
    of the reference implementation; "" where nothing tells.
    part: of a file with several copies of a model, such as "ema", which one; "" for the only one.
    over_parameterized: whether it has a D.
    spec: the sizes, where the file tells them all: of an ordinary convolution most files do not
    tell the groups. kernel_shape: of a convolution, `(O, I/g, *kernel_size)`, of a linear layer
    `(out, in)`; None where the kernel size is not in the file.
    layout: `doconv_core.maths.layout`'s word for the axes of a convolution's weight in the file.
    note: what a reader should know: an assumption made, or why the layer cannot be folded.
    composed: of an over-parameterized layer, the kind that composes its kernel.
    """

    path: str
    kind: str
    entries: Mapping[str, str]
    origin: str = ""
    part: str = ""
    over_parameterized: bool = False
    spec: ConvSpec | LinearSpec | None = None
    kernel_shape: tuple[int, ...] | None = None
    layout: str = "OI*"
    note: str = ""
    composed: str = DO_CONV.name

    @property
    def composition(self) -> ComposedKind:
        """The kind that composes the kernel of an over-parameterized layer."""
        kind = kind_named(self.composed)
        assert isinstance(kind, ComposedKind)  # as files are recognised by such alone
        return kind

    @property
    def gone(self) -> tuple[str, ...]:
        """The roles of the entries that a folded layer has no more."""
        return tuple(r for r in (*self.composition.names[1:], IDENTITY) if r in self.entries)

    @property
    def name(self) -> str:
        """The path, with the part before it where there are several."""
        return f"{self.part}/{self.path}" if self.part else self.path


WRAPPERS = ("module.", "_orig_mod.")
OUTSIDE = r"(?:[A-Za-z]:)?/|(?:.*/)?\.\.(?:/|$)"
# What keys tell of dicts in a training checkpoint: that it is no model, or an average of one.
NO_MODEL = re.compile("optim|sched|scaler")
AVERAGED = re.compile("(^|[^a-z])(ema|swa|averaged?|shadow)([^a-z]|$)")
OF_WRAPPERS = ("n_averaged",)  # what a wrapper keeps beside the model


def without_wrappers(names: Sequence[str]) -> dict[str, str]:
    """Return names by what is left without a wrapper's prefix, where all of them have it.

    The prefixes are those of data parallelism, averaging and compilation.
    """
    keys = {name: name for name in names}
    while True:
        own = [key for key in keys if key not in OF_WRAPPERS]
        wrapper = next((w for w in WRAPPERS if own and all(k.startswith(w) for k in own)), None)
        if wrapper is None:
            return keys
        keys = {key.removeprefix(wrapper): name for key, name in keys.items()}


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a name twice, no text, or that leads out of where it is written.

    Nothing here writes files by such names, but what unpacks or converts the file might.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"{path} has the name {shown(name)} twice.")
        seen.add(name)
        if not _is_text(name):
            raise CheckpointError(f"{path} has an entry named {shown(name)}, which is no text.")
        if "\0" in name or re.match(OUTSIDE, name.replace("\\", "/")):
            raise CheckpointError(
                f"{path} has an entry named {shown(name)}, a path out of the file; it is not read."
            )


def _is_text(name: str) -> bool:
    """Return whether files can hold the name: a string may have halves of characters."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in name)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of pairs, for `json.loads`; CheckpointError for a name that is twice."""
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise CheckpointError(f"the name {shown(name)} occurs twice.")
        names.add(name)
    return dict(pairs)


def shown(name: str) -> str:
    """Return a name for a message: quoted, escaped, and not too long."""
    quoted = ascii(name)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}…'"


BFLOAT16 = "bfloat16"
COPIED_AT_ONCE = 1 << 20
COMPUTED_AT_ONCE = 1 << 18  # elements
FLOATS = ("float16", "float32", "float64", BFLOAT16)


# How arrays hold bfloat16 as it is stored: numbers that NumPy moves about and cannot compute with.
BITS = np.dtype([(BFLOAT16, "<u2")])
INFINITE = 0x7F80  # bfloat16's exponent, all ones where a number is not finite


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the little-endian NumPy dtype in which values of type `dtype` are stored."""
    return BITS if dtype == BFLOAT16 else np.dtype(dtype).newbyteorder("<")


def computing_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of `from_storage`'s arrays for stored values of type `stored`."""
    return np.dtype(np.float32) if stored == BITS else stored.newbyteorder("=")


def from_storage(stored: Array) -> Array:
    """Return stored values to compute with; bfloat16 as float32, which loses nothing."""
    if stored.dtype != BITS:
        return stored.astype(computing_dtype(stored.dtype), copy=False)
    return (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_storage(values: Array, dtype: str) -> Array:
    """Return values as `dtype` stores them; rounded to the nearest, ties to even, for bfloat16."""
    if dtype != BFLOAT16:
        return np.ascontiguousarray(values, storage_dtype(dtype))
    if values.dtype == BITS:
        return np.ascontiguousarray(values)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN's fraction could round over into the sign; keep it a NaN.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").view(BITS)


def all_finite(stored: Array) -> bool:
    """Return whether no entry is infinite or not a number; little memory is used."""
    is_bits = stored.dtype == BITS
    numbers = stored.view("<u2") if is_bits else stored
    blocks = np.nditer(
        numbers, ["external_loop", "buffered", "zerosize_ok"], buffersize=COMPUTED_AT_ONCE
    )
    for block in cast(Iterable[Array], blocks):
        finite = (block & INFINITE) != INFINITE if is_bits else np.isfinite(block)
        if not np.all(finite):
            return False
    return True


def read_array(file: BinaryIO, path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """Return an array, as stored, that lies in `file`, the file at `path`, from where it stands."""
    # np.fromfile would turn a signal's SystemExit into a TypeError.
    stored = np.empty(prod(shape), storage_dtype(dtype))
    if cast(BufferedReader, file).readinto(stored.view(np.uint8).data) != stored.nbytes:
        raise CheckpointError(f"{path} was truncated while it was read.")
    try:
        return stored.reshape(shape)
    except ValueError as error:  # of too many axes, or of none times too many
        problem = str(error).rstrip(".")
        raise CheckpointError(f"{path}: no array here can be {shape}: {problem}.") from error


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int, path: Path) -> None:
    """Copy `size` bytes from where `source`, the file at `path`, stands; little memory is used."""
    while size:
        block = source.read(min(size, COPIED_AT_ONCE))
        if not block:
            raise CheckpointError(f"{path} was truncated while it was read.")
        target.write(block)
        size -= len(block)

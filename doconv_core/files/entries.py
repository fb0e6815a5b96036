"""What every format reads alike of files from strangers: names, numbers, zip archives."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias, cast

import numpy as np

from doconv_core.kinds.do_conv import compose
from doconv_core.maths.numeric import Array as Array
from doconv_core.maths.numeric import widened
from doconv_core.maths.spec import ConvSpec

KernelSizes: TypeAlias = Mapping[str, tuple[int, ...]]
Progress: TypeAlias = Callable[[int, int], None]
Allowed: TypeAlias = Sequence["str | type[Any]"]


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


class AllowError(ValueError):
    """What is to be allowed is no class."""


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


class Lazy(Mapping[str, Array]):
    """Arrays by name, each made when it is asked for: a large file needs little memory."""

    def __init__(self, make: Mapping[str, Callable[[], Array]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Array:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


# Whose names and layouts a file has.
PYTORCH, TENSORFLOW, KERAS, GLUON = "PyTorch", "TensorFlow", "Keras", "Gluon"
STATE = "doconv state"  # which has this package's own

WRAPPERS = ("module.", "_orig_mod.")
# What compilation, sharding and activation checkpoints put between the names of modules, and nobody
# else does.
BETWEEN = frozenset((
    "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
    "_forward_module",
))  # fmt: skip
OUTSIDE = re.compile(r"(?:[A-Za-z]:)?/|(?:.*/)?\.\.(?:/|\Z)", re.DOTALL)
# What keys tell of dicts in a training checkpoint: that they hold what trains a model, or an
# average of one. Whole words alone do: an "upscaler" is a model.
NO_MODEL = re.compile("(^|[^a-z])(optim|optimi[sz]ers?|sched|schedulers?|scalers?)([^a-z]|$)")
AVERAGED = re.compile("(^|[^a-z])(ema|swa|averaged?|shadow)([^a-z]|$)")
OF_WRAPPERS = ("n_averaged",)  # what a wrapper keeps beside the model


def without_wrappers(names: Sequence[str]) -> dict[str, str]:
    """Return names by what is left without a wrapper's prefix, where all of them have it.

    The prefixes are those of data parallelism, averaging and compilation. What only wrappers are
    called goes wherever it is, unless two names would be one; so does what a wrapper keeps beside
    the model, which is no part of that.
    """
    keys = {_without_between(name): name for name in names}
    if len(keys) < len(names):
        keys = {name: name for name in names}
    while True:
        own = [key for key in keys if key not in OF_WRAPPERS]
        wrapper = next((w for w in WRAPPERS if own and all(k.startswith(w) for k in own)), None)
        if wrapper is None:
            return keys
        keys = {key.removeprefix(wrapper): keys[key] for key in own}


def _without_between(name: str) -> str:
    if "._" not in name and name[:1] != "_":
        return name
    *modules, own = name.split(".")
    return ".".join([*(module for module in modules if module not in BETWEEN), own])


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
        if "\0" in name or OUTSIDE.match(name.replace("\\", "/")):
            raise CheckpointError(
                f"{path} has an entry named {shown(name)}, a path out of the file; it is not read."
            )


_HALF = re.compile("[\ud800-\udfff]")


def _is_text(name: str) -> bool:
    """Return whether files can hold the name: a string may have halves of characters."""
    return _HALF.search(name) is None


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


def groups_of(in_channels: int, out_channels: int, per_group: int) -> int:
    """Return the groups of a layer with `I`, `O` and `I/g` channels; 0 where there is no such."""
    if min(in_channels, out_channels, per_group) < 1 or in_channels % per_group:
        return 0
    groups = in_channels // per_group
    return 0 if out_channels % groups else groups


BLOCK = COMPUTED_AT_ONCE  # of W, so that a large layer needs little more memory


def compose_blocks(weight: Array, depthwise: Array, *, as_stored: bool = False) -> Array:
    """Return the kernel of `(W, D)` as `compose` does, `(O, I/g, M)`, a block of W at a time.

    weight: `(O, I/g, S)`. depthwise: `(I, M, S)`. `S` may be less than `M`, where the identity is
    zero. Both may be as they are stored, bfloat16 too. Where D's type is the larger one, computed
    in that. as_stored: whether a kernel of bfloat16 is rounded to that, once; else it is float32.
    In weight's dtype otherwise, and with its order of axes in memory.
    """
    (outputs, channels, multiplier), (inputs, taps, _) = weight.shape, depthwise.shape
    groups = inputs // channels
    each = outputs // groups
    dtype = weight.dtype if as_stored else computing_dtype(weight.dtype)
    kernel = np.empty_like(weight, dtype, shape=(outputs, channels, taps))
    w = weight.reshape(groups, each, channels, multiplier)
    d = depthwise.reshape(groups, channels, taps, multiplier)
    k = kernel.reshape(groups, each, channels, taps)
    row = channels * max(multiplier, taps)
    outputs_at_once = max(1, min(each, BLOCK // row))
    groups_at_once = max(1, BLOCK // (row * max(taps, outputs_at_once)))
    for q in range(0, groups, groups_at_once):
        for o in range(0, each, outputs_at_once):
            part = np.s_[q : q + groups_at_once, o : o + outputs_at_once]
            block = _compose_block(from_storage(w[part]), from_storage(d[q : q + groups_at_once]))
            k[part] = to_storage(block, BFLOAT16) if dtype == BITS else block
    return kernel


def _compose_block(w: Array, d: Array) -> Array:
    """Return `gois,gims -> goim` of this block, with the identity."""
    (groups, each, channels, multiplier), taps = w.shape, d.shape[2]
    dtype = np.result_type(w, d)
    if multiplier < taps:
        composed: Array = np.einsum(
            "gois,gims->goim", widened(w.astype(dtype)), widened(d.astype(dtype))
        )
        return composed
    spec = ConvSpec(groups * channels, groups * each, (taps,), groups, multiplier)
    weight, depthwise = w.reshape(spec.weight_shape), d.reshape(groups * channels, taps, multiplier)
    kernel = compose(weight.astype(dtype), depthwise.astype(dtype), spec)
    return kernel.reshape(groups, each, channels, taps)


# What zipfile raises where a member is not what the archive says.
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError)
SMALL = 1 << 20  # what may be inflated whatever the ratio
MAX_RATIO = 100  # deflated weights hardly shrink; even zeros seldom make most of a file


def opened(path: Path) -> zipfile.ZipFile:
    """Return the zip archive at `path`, open and unchecked; CheckpointError where it is none."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole zip archive: {error}.") from error


def open_archive(path: Path) -> zipfile.ZipFile:
    """Return the zip archive at `path`, open.

    Raises CheckpointError where it is damaged, has a name twice or one that leads out of it, is
    encrypted, or says that it holds more than its size can give.
    """
    archive = opened(path)
    try:
        _check(path, archive)
    except BaseException:
        archive.close()
        raise
    return archive


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    check_names(path, (member.filename for member in members))
    size = path.stat().st_size
    if sum(member.compress_size for member in members) > size:
        raise CheckpointError(f"{path} is a zip bomb: its members overlap, or exceed the file.")
    for member in members:
        name = shown(member.filename)
        if member.flag_bits & 1:
            raise CheckpointError(f"{path}: member {name} is encrypted, which no checkpoint is.")
        stored = member.compress_type == zipfile.ZIP_STORED
        if stored and member.file_size != member.compress_size:
            raise CheckpointError(f"{path}: the sizes of member {name} disagree.")
        if member.file_size > max(SMALL, MAX_RATIO * member.compress_size):
            raise CheckpointError(
                f"{path} is a zip bomb: member {name} is to become {member.file_size} bytes, of "
                f"{member.compress_size}."
            )
    whole = sum(member.file_size for member in members)
    if whole > max(SMALL, MAX_RATIO * size):
        raise CheckpointError(
            f"{path} is a zip bomb: its members are to become {whole} bytes, of {size}; at most "
            f"{MAX_RATIO} times as many are read."
        )


def read_member(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Return a member's bytes; CheckpointError where there are more than `limit`, or damaged."""
    size = archive.getinfo(name).file_size
    if size > limit:
        raise CheckpointError(
            f"{path}: member {shown(name)} has {size} bytes; at most {limit} are read."
        )
    data = io.BytesIO()
    copy_member(path, archive, name, data)
    if data.tell() != size:
        raise CheckpointError(f"{path}: member {shown(name)} is damaged: it is of another size.")
    return data.getvalue()


def copy_member(
    path: Path, archive: zipfile.ZipFile, name: str, target: IO[bytes] | None = None
) -> None:
    """Copy a member's bytes to `target`, or only compare them with their check sum.

    Raises CheckpointError where the member is damaged, OSError where `target` cannot be written.
    """
    left = archive.getinfo(name).file_size
    for block in _blocks(path, archive, name):
        left -= len(block)
        if target is not None and left >= 0:
            target.write(block)


def _blocks(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    try:
        with archive.open(name) as member:
            while block := member.read(COPIED_AT_ONCE):
                yield block
    except DAMAGE as error:
        raise CheckpointError(f"{path}: member {shown(name)} is damaged: {error}.") from error

"""safetensors files: a plain state dict, or this package's canonical state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from doconv_core.files.blocks import Block
from doconv_core.files.checkpoint import Beginning, Checkpoint
from doconv_core.files.entries import (
    PYTORCH,
    STATE,
    CheckpointError,
    Entry,
    KernelSizes,
    check_names,
    copy_bytes,
    once,
    read_array,
    storage_dtype,
    to_storage,
    without_wrappers,
)
from doconv_core.files.folding import Output, folded_kernel, outputs
from doconv_core.files.layers import (
    BATCH_NORM,
    CONVOLUTION,
    DYNAMIC,
    LINEAR,
    NORM,
    OTHER,
    TRANSPOSED,
    D,
    Layer,
    Sizes,
    find_layers,
)
from doconv_core.files.paths import check_whole
from doconv_core.maths.numeric import Array
from doconv_core.state.file import FORMAT, StateError, header_of, read_header
from doconv_core.state.file import entry as entry_name
from doconv_core.state.layers import LayerForm

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


NAME, SUFFIXES, FRAMEWORK = "safetensors", (".safetensors",), PYTORCH
TYPES = frozenset(DTYPES.values())
# The kinds of a state's layers, of which convolutions are told apart, by their names there.
KINDS = {
    "transposed_convolution": TRANSPOSED, "linear": LINEAR, "embedding": LINEAR,
    "batch_norm": BATCH_NORM, "layer_norm": NORM, "group_norm": NORM, "dynamic_heads": DYNAMIC,
}  # fmt: skip


def sniff(begin: Beginning) -> bool:
    """Return whether a JSON object follows a length, which is no text."""
    length = begin.head[:8]
    text = length.isascii() and length.decode("ascii").isprintable()
    return begin.head[8:9] == b"{" and not text


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write a plain safetensors file, one array in memory at a time; the metadata are `like`'s."""
    write_with(path, entries, arrays, getattr(like, "metadata", {}))


def write_with(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str],
) -> None:
    """Write a plain safetensors file with these metadata."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    sizes = (each.size * storage_dtype(each.dtype).itemsize for each in entries)
    told = [(e.name, codes[e.dtype], e.shape, n) for e, n in zip(entries, sizes, strict=True)]
    with path.open("wb") as file:
        _write_header(file, {"__metadata__": dict(metadata)} if metadata else {}, told)
        for entry in entries:
            file.write(to_storage(arrays[entry.name], entry.dtype).data)


def _write_header(
    file: BinaryIO, header: dict[str, Any], told: Iterable[tuple[str, str, Sequence[int], int]]
) -> None:
    """Write what is before the data. told: name, type, shape and bytes of each entry."""
    position = 0
    for name, code, shape, size in told:
        offsets = [position, position + size]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
        position += size
    file.write(header_of(header))


class SafetensorsCheckpoint(Checkpoint):
    """An open safetensors file. Raises CheckpointError where it is damaged or hostile.

    metadata: what its header has beside the entries.
    """

    def __init__(self, path: Path, kernel_sizes: KernelSizes) -> None:
        self.path = path
        self._stored, self._start = _read_file_header(path)
        self.metadata: dict[str, str] = self._stored.pop("__metadata__", None) or {}
        check_names(path, self._stored)
        # The order of the data, which writers give, not that of the header, which some sort.
        names = sorted(self._stored, key=lambda name: self._stored[name]["data_offsets"])
        self.entries = {name: self._entry(name) for name in names}
        self._is_state = self.metadata.get("format") == FORMAT
        sizes = Sizes(kernel_sizes)
        self.framework = STATE if self._is_state else FRAMEWORK
        self.ordered = self._is_state  # the libraries that write the others sort
        if self._is_state:
            self.format = "doconv state (safetensors)"
            self.layers = self._state_layers(sizes)
        else:
            self.format = "safetensors"
            keys = without_wrappers(list(self.entries))
            self.layers = find_layers(self.entries, keys, sizes)
        sizes.check_used()
        self._file = path.open("rb")

    def _entry(self, name: str) -> Entry:
        stored = self._stored[name]
        dtype = DTYPES.get(stored["dtype"], stored["dtype"].lower())
        return Entry(name, tuple(stored["shape"]), dtype)

    def _state_layers(self, sizes: Sizes) -> tuple[Layer, ...]:
        try:
            forms, self.origin = read_header(str(self.path), self.metadata)
        except StateError as error:
            raise CheckpointError(str(error)) from error
        self.forms, layers = forms, []
        for path, form in forms.items():
            roles = {name: entry_name(path, name) for name in form.shapes}
            for name, shape in form.shapes.items():
                found = self.entries.get(roles[name])
                if found is None or found.shape != shape:
                    what = "is missing" if found is None else f"has shape {found.shape}"
                    raise CheckpointError(
                        f"{self.path}: entry {roles[name]!r} {what}; its header describes {shape}."
                    )
            layers.append(_state_layer(path, form, roles, sizes))
        return tuple(layers)

    def read_stored(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read_stored` says."""
        found = self.entries[name]
        if found.dtype not in DTYPES.values():
            raise CheckpointError(f"{self.path}: entry {name!r} is {found.dtype}, not read here.")
        self._file.seek(self._start + self._stored[name]["data_offsets"][0])
        return read_array(self._file, self.path, found.shape, found.dtype)

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        planned = outputs(self)
        if self._is_state:
            planned = [
                Output(o.name, o.source, (*o.shape[:2], prod(o.shape[2:])), o.layer)
                if o.layer and len(o.shape) > 1 else o
                for o in planned
            ]  # fmt: skip
        told = []
        for output in planned:
            begin, end = self._stored[output.source]["data_offsets"]
            size = end - begin
            if output.layer is not None:
                dtype = self.entries[output.source].dtype
                size = prod(output.shape) * storage_dtype(dtype).itemsize
            told.append((output.name, self._stored[output.source]["dtype"], output.shape, size))
        metadata = {"__metadata__": self._folded_metadata()} if self.metadata else {}
        with target.open("wb") as file:
            _write_header(file, metadata, told)
            for output in planned:
                if output.layer is None:
                    self._copy(output.source, file)
                    continue
                kernel = folded_kernel(self, output.layer, output.shape)
                file.write(to_storage(kernel, self.entries[output.source].dtype).data)
                report()

    def _copy(self, name: str, file: BinaryIO) -> None:
        begin, end = self._stored[name]["data_offsets"]
        self._file.seek(self._start + begin)
        copy_bytes(self._file, file, end - begin, self.path)

    def _folded_metadata(self) -> dict[str, str]:
        if not self._is_state:
            return self.metadata
        layers = json.loads(self.metadata["layers"])
        for path, form in (self.forms or {}).items():
            layers[path]["over_parameterized"] = False
            if form.composed is not None:
                layers[path]["spec"] = dataclasses.asdict(form.composed.conv(form.spec))
        for block in self.with_blocks(self.layers):
            if isinstance(block, Block):  # in the place of its first convolution
                first = block.sources[0].removesuffix(".weight")
                others = {layer.path for layer in block.layers} - {first}
                layers = {block.path if path == first else path: each
                          for path, each in layers.items() if path not in others}  # fmt: skip
                layers[block.path]["bias"] = True
        return {**self.metadata, "layers": json.dumps(layers)}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path, kernel_sizes: KernelSizes) -> SafetensorsCheckpoint:
    """Return the open file; CheckpointError for one of several that a model is in."""
    check_whole(path)
    return SafetensorsCheckpoint(path, kernel_sizes)


def _read_file_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header, as its library has accepted it, and where the data begins."""
    try:
        with safe_open(path, framework="np") as stored:  # which checks offsets, shapes and lengths
            stored.keys()
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}.") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    try:
        return json.loads(text, object_pairs_hook=once), 8 + length
    except CheckpointError as error:
        raise CheckpointError(f"{path}: in the header, {error}") from error


def _state_layer(path: str, form: LayerForm, roles: dict[str, str], sizes: Sizes) -> Layer:
    spec: Any = form.spec
    d_shape: Any = form.shapes.get(D)
    if form.kind == "convolution":
        conv = spec if form.composed is None else form.composed.conv(spec)
        if form.composed is not None:
            sizes.given((path,), conv.taps)
        return Layer(
            path, CONVOLUTION, roles, "doconv", composed=form.composed, spec=spec,
            kernel_shape=conv.kernel_shape, d_shape=d_shape,
        )  # fmt: skip
    roles = {{"gamma": "weight", "beta": "bias"}.get(role, role): n for role, n in roles.items()}
    kernel_shape = None
    if form.kind in ("transposed_convolution", "dynamic_heads"):
        kernel_shape = spec.kernel_shape
    elif KINDS.get(form.kind) == LINEAR:
        kernel_shape = form.shapes["weight"]
    known = spec if form.kind == "linear" else None
    kind = KINDS.get(form.kind, OTHER)
    return Layer(path, kind, roles, "doconv", kernel_shape=kernel_shape, spec=known)

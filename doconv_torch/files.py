"""PyTorch's files, read and written: archives and legacy pickles; `weights_only=True` always."""

from __future__ import annotations

import copy
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from doconv_core.files.checkpoint import Checkpoint, Output, folded_kernel, outputs
from doconv_core.files.entries import (
    AVERAGED,
    BITS,
    CheckpointError,
    Entry,
    check_names,
    open_archive,
    without_wrappers,
)
from doconv_core.files.layers import Layer, Sizes, find_layers
from doconv_core.files.pytorch import MAX_DEPTH, StateDicts, is_container, items_of, joined

# What PyTorch's writer says, in RuntimeErrors, where the system has refused to take more bytes.
_REFUSED = re.compile(
    r"iostream error|inline_container|PytorchStreamWriter|write\(\): fd \d+ failed"
)
Array: TypeAlias = "NDArray[Any]"
MAX_NDIM = 32  # of NumPy's arrays
EXPANDED = 1 << 26  # bytes; a tensor that repeats its few stored numbers may have no more


class PyTorchCheckpoint(Checkpoint):
    """An open PyTorch file. What is there beside its state dicts, is carried over.

    Raises CheckpointError where the file is damaged or hostile, or holds anything but tensors and
    plain containers, or no state dict.
    """

    framework = "PyTorch"

    def __init__(
        self, path: Path, kernel_sizes: Mapping[str, tuple[int, ...]], *, zipped: bool
    ) -> None:
        self.path, self._zipped = path, zipped
        self.format = "PyTorch" if zipped else "PyTorch (legacy)"
        stored, mapped = path.stat().st_size, False
        if self._zipped:
            stored, mapped = _stored_bytes(path)
        self._content = _load(path, mapped)
        self._states = StateDicts(self._content, _is_tensor)
        self._dicts, self.others = self._states.found, tuple(self._states.others)
        if not self._dicts:
            raise CheckpointError(
                f"{path} holds no state dict: no dict of tensors by name, at most {MAX_DEPTH} deep."
            )
        named = [
            (joined(part, key), value)
            for part, state in self._dicts.items()
            for key, value in self._states.tensors_of(state).items()
        ]
        check_names(path, (name for name, _ in named))
        self._tensors: dict[str, Tensor] = dict(named)
        self._check_storages(stored)
        self.entries = {
            name: Entry(name, tuple(tensor.shape), _dtype_of(tensor))
            for name, tensor in self._tensors.items()
        }
        self.layers = self._find_layers(Sizes(kernel_sizes))
        self.unfolded = self._find_unfolded()

    def _check_storages(self, stored: int) -> None:
        """Raise CheckpointError where tensors have more bytes than the file; PyTorch does not."""
        tensors = [t for t in self._tensors.values() if t.layout == torch.strided and not t.is_meta]
        storages = (tensor.untyped_storage() for tensor in tensors)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        if sum(sizes.values()) > stored:
            raise CheckpointError(
                f"{self.path} is no whole PyTorch file: its tensors are said to have "
                f"{sum(sizes.values())} bytes, and {stored} are there."
            )

    def _find_layers(self, sizes: Sizes) -> tuple[Layer, ...]:
        models = [part for part in self._dicts if not AVERAGED.search(part.lower())]
        only = (models or list(self._dicts))[0] if len(models) <= 1 else None
        layers: list[Layer] = []
        for part in sorted(self._dicts, key=lambda part: part not in models):
            state = self._dicts[part]
            names = without_wrappers(list(self._states.tensors_of(state)))
            keys = {key: joined(part, name) for key, name in names.items()}
            label = "" if part == only else part
            layers += find_layers(self.entries, keys, sizes, part=label, framework="PyTorch")
        sizes.check_used()
        return tuple(layers)

    def _find_unfolded(self) -> tuple[tuple[str, str], ...]:
        """Return where else a copy of the model may lie, and what to do about it."""
        layers = [layer for layer in self.layers if layer.over_parameterized]
        shapes = {self.entries[x.entries[role]].shape for x in layers for role in x.gone}
        reason = (
            "{} in no state dict, as in an average that is kept as a list; a copy of the model "
            "among them stays over-parameterized: load it into the model, and fold that"
        )
        found = self._states.nameless(shapes)
        return tuple((path, reason.format(count)) for path, count in found.items())

    def read(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read` says."""
        tensor = self._readable(name)
        if tensor.dtype.is_floating_point and tensor.element_size() < 4:
            tensor = tensor if tensor.dtype == torch.float16 else tensor.float()
        return tensor.numpy()

    def read_stored(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read_stored` says."""
        if self._tensors[name].dtype != torch.bfloat16:
            return self.read(name)
        return self._readable(name).view(torch.int16).numpy().astype("<i2", copy=False).view(BITS)

    def _readable(self, name: str) -> Tensor:
        """Return a tensor that NumPy can look into, but for its type."""
        tensor, entry = self._tensors[name].detach(), self.entries[name]
        if not entry.is_plain:
            raise CheckpointError(f"{self.path}: entry {name!r} is {entry.dtype}, not read here.")
        size = tensor.numel() * tensor.element_size()
        if tensor.is_meta:
            raise CheckpointError(f"{self.path}: entry {name!r} is a meta tensor: no values.")
        if tensor.dim() > MAX_NDIM or size > max(EXPANDED, tensor.untyped_storage().nbytes()):
            raise CheckpointError(
                f"{self.path}: entry {name!r} has the shape {tuple(tensor.shape)}, and "
                f"{tensor.untyped_storage().nbytes()} bytes."
            )
        return tensor.resolve_conj().resolve_neg()

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        planned = {output.source: output for output in outputs(self)}
        done: dict[Any, Tensor] = {}
        parts = {id(state): part for part, state in self._dicts.items()}
        copies: dict[int, Any] = {}

        def rebuilt(value: Any) -> Any:
            if not self._states.holds(value) or id(value) in copies:
                return copies.get(id(value), value)
            if isinstance(value, tuple):
                copies[id(value)] = tuple(map(rebuilt, value))
                return copies[id(value)]
            if id(value) in parts:
                new = self._folded_state(parts[id(value)], planned, done, report)
            else:
                new = copy.copy(value)
            copies[id(value)] = new  # before what is in it, which may lead back here
            for key, inner in items_of(new):
                if is_container(inner):
                    new[key] = rebuilt(inner)
            return new

        try:
            save(rebuilt(self._content), target, _use_new_zipfile_serialization=self._zipped)
        except RecursionError as error:
            raise CheckpointError(f"{self.path} is nested too deeply to be written.") from error

    def _folded_state(
        self, part: str, planned: Mapping[str, Output], done: dict[Any, Tensor],
        report: Callable[[], None],
    ) -> Any:  # fmt: skip
        state = self._dicts[part]
        folded = copy.copy(state)  # with what PyTorch keeps beside the entries of a state dict
        folded.clear()
        for key, value in state.items():
            name = joined(part, str(key))
            output = planned.get(name)
            if not (isinstance(key, str) and name in self._tensors) or (
                output is not None and output.layer is None
            ):
                folded[key] = value
            elif output is not None:
                new_key = output.name.removeprefix(joined(part, "")) if part else output.name
                folded[new_key] = self._folded_tensor(output, done)
                report()
        return folded

    def _folded_tensor(self, output: Output, done: dict[Any, Tensor]) -> Tensor:
        """Return the kernel as a tensor, the same one for layers that share W and D."""
        assert output.layer is not None  # as the caller has checked
        sources = [self._tensors[name] for role, name in output.layer.entries.items()
                   if role in ("weight", *output.layer.gone)]  # fmt: skip
        shared = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in sources)
        if shared not in done:
            old = self._tensors[output.source]
            kernel = folded_kernel(self, output.layer, output.shape)
            last = kernel.ndim == 4 and old.ndim == 4 and _is_channels_last(old)
            tensor = _as_tensor(kernel).contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )
            if isinstance(old, nn.Parameter):
                tensor = nn.Parameter(tensor, old.requires_grad)
            done[shared] = tensor
        return done[shared]

    def close(self) -> None:
        """Release what was read."""
        self._content, self._states = None, StateDicts(None, _is_tensor)
        self._dicts, self._tensors = {}, {}


def _as_tensor(stored: Array) -> Tensor:
    if stored.dtype != BITS:
        return torch.from_numpy(stored)
    return torch.from_numpy(stored.view("<i2").astype(np.int16, copy=False)).view(torch.bfloat16)


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested  # which would have no one shape


def _dtype_of(tensor: Tensor) -> str:
    """Return a tensor's type as `Entry` has it: two words where it is no plain array."""
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized:
        return f"quantized {name}"
    if tensor.layout != torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')} {name}"
    return name


def _stored_bytes(path: Path) -> tuple[int, bool]:
    """Return how many bytes of tensors an archive has, and whether they lie in it as they are.

    Raises CheckpointError for an archive of another kind.
    """
    with open_archive(path) as archive:
        members = archive.infolist()
    if any(member.filename.rpartition("/")[2] == "constants.pkl" for member in members):
        raise CheckpointError(
            f"{path} is a TorchScript archive, whose layers are code; fold the model and save "
            "model.state_dict() before scripting it."
        )
    tensors = [member for member in members if "/data/" in member.filename]
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in tensors)
    return sum(member.file_size for member in tensors), stored


def _load(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            # What PyTorch cannot read of another pickle protocol is an error all the same.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            # What it tells of quantized tensors, which a file may have all the same.
            told = "torch.quantize_per_tensor|TypedStorage is deprecated"
            warnings.filterwarnings("ignore", told, UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a hostile pickle makes the unpickler stumble over
        raise CheckpointError(f"{path} {_problem(error)[:300]}.") from error


def _problem(error: Exception) -> str:
    """Return what is wrong with a file that PyTorch has refused, of all that it says."""
    text = str(error)
    named = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.[\w.]+)", text)
    if named:
        return (
            f"needs {named[1]} to be read; only tensors and plain containers are, by "
            "weights_only=True: save model.state_dict()"
        )
    if "Unsupported operand" in text:
        return (
            "is pickled in another way than torch.save does by default, which weights_only=True "
            "does not read; save it again, without pickle_protocol="
        )
    said = (text.partition("WeightsUnpickler error:")[2] or text).strip().partition("\n")[0]
    return f"is no whole PyTorch file: {said.strip().rstrip('.') or type(error).__name__}"


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Any],
    like: Checkpoint | None = None,
) -> None:
    """Write arrays as a state dict that `torch.load(path, weights_only=True)` reads.

    Of bfloat16, which NumPy lacks, the array is float32. Raises OSError where the file cannot be
    written whole.
    """
    tensors = {
        entry.name: torch.from_numpy(np.array(arrays[entry.name])).to(getattr(torch, entry.dtype))
        for entry in entries
    }
    save(tensors, path)


def save(content: Any, path: Path, **options: Any) -> None:
    """Write as `torch.save` does, which has the options; OSError where the disk takes no more."""
    try:
        torch.save(content, path, **options)
    except RuntimeError as error:
        if not _REFUSED.search(str(error)):
            raise
        raise OSError("the disk takes no more bytes") from error

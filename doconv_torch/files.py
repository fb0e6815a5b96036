"""PyTorch's files, read and written: archives and legacy pickles; `weights_only=True` always."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from doconv_core.files.branched import with_blocks
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import (
    AVERAGED,
    BITS,
    Allowed,
    CheckpointError,
    Entry,
    check_names,
    open_archive,
    read_member,
    shown,
    without_wrappers,
)
from doconv_core.files.folding import Output, folded_kernel, outputs, seems_over_parameterized
from doconv_core.files.inert import Inert, NotReadError
from doconv_core.files.layers import Layer, Sizes, find_layers
from doconv_core.files.pickles import SUSPECT, check_calls
from doconv_core.files.pytorch import (
    MAX_DEPTH,
    StateDicts,
    check_attributes,
    inner_items,
    is_array,
    is_average,
    is_container,
    is_optimizer,
    items_of,
    joined,
)

# What PyTorch's writer says, in RuntimeErrors, where the system has refused to take more bytes.
_REFUSED = re.compile(
    r"iostream error|inline_container|PytorchStreamWriter|write\(\): fd \d+ failed"
)
Array: TypeAlias = "NDArray[Any]"
MAX_PICKLE = 1 << 28  # bytes of what an archive tells of its tensors
LEGACY = 5  # pickles in an older file: numbers, what is told of the system, the content, keys
MAX_NDIM = 32  # of NumPy's arrays
DISTRIBUTED = "torch.distributed"
SHARDS = (
    "holds the shards of a distributed model, no whole tensors: gather them before saving, with "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)), or with tensor.full_tensor() of each"
)
EXPANDED = 1 << 26  # bytes; a tensor that repeats its few stored numbers may have no more


class PyTorchCheckpoint(Checkpoint):
    """An open PyTorch file. What is there beside its state dicts, is carried over.

    Raises CheckpointError where the file is damaged or hostile, or holds anything but tensors and
    plain containers, or no state dict.
    """

    framework = "PyTorch"

    def __init__(
        self, path: Path, kernel_sizes: Mapping[str, tuple[int, ...]], *, zipped: bool,
        allow: Allowed = (),
    ) -> None:  # fmt: skip
        self.path, self._zipped = path, zipped
        self.format = "PyTorch" if zipped else "PyTorch (legacy)"
        stored = path.stat().st_size
        if zipped:
            stored = _stored_bytes(path)
        else:
            _check_legacy(path)
        self._content = _load(path, allow)
        check_attributes(path, self._content)
        self._states = StateDicts(self._content, _is_tensor)
        if self._states.twice is not None:
            raise CheckpointError(f"{path} has the name {shown(self._states.twice)} twice.")
        self._dicts, self.others = self._states.found, tuple(self._states.others)
        if not self._dicts:
            raise CheckpointError(
                f"{path} holds no state dict: no dict of tensors by name, at most {MAX_DEPTH} deep"
                f"{self._elsewhere()}."
            )
        named = [
            (joined(part, key), value)
            for part, state in self._dicts.items()
            for key, value in self._states.tensors_of(state).items()
        ]
        check_names(path, (name for name, _ in named))
        self._tensors: dict[str, Tensor] = dict(named)
        if any(type(tensor).__module__.startswith(DISTRIBUTED) for _, tensor in named):
            raise CheckpointError(f"{path} {SHARDS}.")
        self._check_storages(stored)
        self.entries = {
            name: Entry(name, tuple(tensor.shape), _dtype_of(tensor))
            for name, tensor in self._tensors.items()
        }
        self.layers = self._find_layers(Sizes(kernel_sizes))
        self.unfolded = self._find_unfolded()

    def _elsewhere(self) -> str:
        """Return where there are tensors or arrays in a file without a state dict."""
        for path, arrays, _ in self._states.outside():
            if any(len(array.shape) > 1 for _, array in arrays):
                where = f" in {shown(path)}" if path else ""
                return (
                    f" and in nothing that is named as what trains a model; there are arrays{where}"
                )
        return ""

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
        found: dict[str, int] = {}
        for path, arrays, in_optimizer in self._states.outside():
            named = {k: _entry_of(k, v) for k, v in arrays if isinstance(k, str)}
            layers_ = with_blocks(find_layers(named, without_wrappers([*named]), Sizes({})), named)
            told = {tuple(v.shape) for k, v in arrays if not in_optimizer or is_average(k)}
            if any(map(seems_over_parameterized, layers_)) or not told.isdisjoint(shapes):
                where = path.rpartition("/")[0] if in_optimizer else path
                found[where] = found.get(where, 0) + len(arrays)
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

        self._save(lambda: rebuilt(self._content), target)

    def _save(self, content: Callable[[], Any], target: Path) -> None:
        try:
            made = content()
            try:
                save(made, target, _use_new_zipfile_serialization=self._zipped)
            except (AttributeError, TypeError, ValueError, pickle.PicklingError) as error:
                raise CheckpointError(
                    f"{self.path} has what torch.save cannot write again: {str(error)[:200]}."
                ) from error
        except RecursionError as error:
            raise CheckpointError(f"{self.path} is nested too deeply to be written.") from error

    @property
    def beside(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a file of this one's form has beside the main copy, and what not."""
        rest = _Rest(self._states.found[self._main], self._content)
        rest.without_tensors(self._content, lambda key, value: value)
        return tuple(rest.kept), tuple(rest.left)

    @property
    def _main(self) -> str:
        """The keys to the main copy of the model."""
        models = [part for part in self._dicts if not AVERAGED.search(part.lower())]
        return (models or list(self._dicts))[0]

    def write_like(
        self, target: Path, entries: Sequence[Entry], arrays: Mapping[str, Array]
    ) -> None:
        """Write a file of this one's form whose main copy of the model has these arrays.

        What holds no tensors stays; optimizers and other copies, which are of another model, go.
        """
        shared: dict[Any, tuple[Array, Tensor]] = {}
        new = {entry.name: self._like(entry, arrays[entry.name], shared) for entry in entries}
        main = self._dicts[self._main]

        def filled(key: str, value: Any) -> Any:
            return new.get(joined(self._main, key), value)

        rest = _Rest(main, self._content)
        self._save(lambda: rest.without_tensors(self._content, filled), target)

    def _like(self, entry: Entry, array: Array, shared: dict[Any, tuple[Array, Tensor]]) -> Tensor:
        """Return an array as the tensor of this name is; the same one where that is, too."""
        old = self._tensors[entry.name]
        place = (old.untyped_storage().data_ptr(), old.storage_offset(), old.shape, old.stride())
        known = shared.get(place)
        if known is not None and np.array_equal(known[0], array):
            return known[1]
        tensor = torch.from_numpy(np.array(array)).to(old.dtype)
        if old.ndim == 4 and _is_channels_last(old):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, old.requires_grad)
        if old.numel():
            shared[place] = array, tensor
        return tensor

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
        places = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in sources)
        shared = (output.shape, *places)
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


class _Rest:
    """What is beside the main copy of a model, in a file from which one of its form is made.

    kept, left: the keys to what the new file has, and has not.
    """

    def __init__(self, main: Any, content: Any) -> None:
        self._main = main
        self._above = _above(main, content)
        self._copies: dict[int, Any] = {}
        self.kept: list[str] = []
        self.left: list[str] = []

    def without_tensors(self, value: Any, filled: Callable[[str, Any], Any], path: str = "") -> Any:
        """Return a container above the main copy, or that, without what holds other tensors.

        filled: gives a tensor of the main copy by its name and what was there.
        """
        if id(value) in self._copies:
            return self._copies[id(value)]
        new: Any = [] if isinstance(value, (list, tuple)) else copy.copy(value)
        if not isinstance(value, tuple):
            self._copies[id(value)] = new
        for key, inner in items_of(value):
            name = joined(path, str(key))
            if value is self._main and isinstance(key, str) and _is_tensor(inner):
                made = filled(key, inner)
            elif id(inner) in self._above:
                made = self.without_tensors(inner, filled, name)
            elif has_tensors(inner):
                self.left.append(name)
                made = None
                if isinstance(value, Mapping):
                    del new[key]
                    continue
            else:
                self.kept.append(name)
                made = inner
            if isinstance(value, Mapping):
                new[key] = made
            else:
                new.append(made)  # of a list, what is left out leaves its place empty
        if isinstance(value, tuple):
            new = self._copies[id(value)] = tuple(new)
        return new


def _above(main: Any, content: Any) -> set[int]:
    """Return a state dict, and the containers that lead to it."""
    parents: dict[int, list[int]] = {}
    waiting, seen = [content], {id(content)}
    while waiting:
        value = waiting.pop()
        for _, inner in items_of(value):
            if is_container(inner):
                parents.setdefault(id(inner), []).append(id(value))
                if id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append(inner)
    above, at = {id(main)}, [id(main)]
    while at:
        new = [parent for parent in parents.get(at.pop(), []) if parent not in above]
        above.update(new)
        at += new
    return above


def has_tensors(value: Any) -> bool:
    """Return whether there are tensors in `value`, or it is an optimizer's state."""
    waiting, seen = [value], set()
    while waiting:
        at = waiting.pop()
        if isinstance(at, Tensor) or is_optimizer(at):
            return True
        if id(at) not in seen and not is_array(at) and not isinstance(at, type):
            seen.add(id(at))
            waiting += [inner for _, inner in inner_items(at)]
    return False


def _as_tensor(stored: Array) -> Tensor:
    if stored.dtype != BITS:
        return torch.from_numpy(stored)
    return torch.from_numpy(stored.view("<i2").astype(np.int16, copy=False)).view(torch.bfloat16)


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _entry_of(name: str, array: Any) -> Entry:
    """Return a tensor, or an array of NumPy's, as an entry."""
    dtype = _dtype_of(array) if isinstance(array, Tensor) else str(array.dtype)
    return Entry(name, tuple(array.shape), dtype)


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


def _stored_bytes(path: Path) -> int:
    """Return how many bytes of tensors an archive has; its pickle must call nothing odd.

    Raises CheckpointError for an archive of another kind.
    """
    with open_archive(path) as archive:
        members = archive.infolist()
        if any(member.filename.rpartition("/")[2] == "constants.pkl" for member in members):
            raise CheckpointError(
                f"{path} is a TorchScript archive, whose layers are code; fold the model and save "
                "model.state_dict() before scripting it."
            )
        for member in members:
            if member.filename.rpartition("/")[2] == "data.pkl":
                pickled = read_member(path, archive, member.filename, MAX_PICKLE)
                if SUSPECT.search(pickled):
                    check_calls(path, io.BytesIO(pickled), len(pickled))
    return sum(member.file_size for member in members if "/data/" in member.filename)


def _check_legacy(path: Path) -> None:
    """Raise CheckpointError where a pickle of an older file calls what it should not."""
    with path.open("rb") as file:
        for _ in range(LEGACY):
            check_calls(path, file, path.stat().st_size)


def _load(path: Path, allow: Allowed) -> Any:
    """Return what a file holds. allow: as in `Inert`, which is asked where PyTorch refuses."""
    inert = Inert(allow) if allow else None
    try:
        if inert is None:
            try:
                return _loaded(path, [])
            except pickle.UnpicklingError:  # it names more than tensors, perhaps
                inert = Inert()
        known = torch.serialization.get_safe_globals()
        names = [pair for pair in inert.names() if pair not in known]  # not ours to remove
        return inert.settled(_loaded(path, names))
    except Exception as error:  # whatever a hostile pickle makes the unpickler stumble over
        raise CheckpointError(f"{path} {_problem(error)[:300]}.") from error


def _loaded(path: Path, names: list[Any]) -> Any:
    """Return what PyTorch reads. names: what a pickle may name beside tensors.

    The file is not mapped: one that is cut while it is read, as by a training that saves again,
    would end this process.
    """
    with warnings.catch_warnings(), torch.serialization.safe_globals(names):
        # What PyTorch cannot read of another pickle protocol is an error all the same.
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        # What it tells of quantized tensors, which a file may have all the same.
        told = "torch.quantize_per_tensor|TypedStorage is deprecated"
        warnings.filterwarnings("ignore", told, UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _problem(error: Exception) -> str:
    """Return what is wrong with a file that PyTorch has refused, of all that it says."""
    text = str(error)
    if DISTRIBUTED in text:
        return SHARDS
    named = re.search(r"GLOBAL (\S+) (?:was not|whose)|(?:GLOBAL|global:?) ([\w.]+\.[\w.]+)", text)
    if named:
        name = named[1] or named[2]
        return (
            f"needs {name if '.' in name else f'builtins.{name}'} to be read; only tensors and "
            "plain containers are, by weights_only=True: save model.state_dict(), or allow a class "
            "of which you know that it is only data, with allow= or --allow"
        )
    if "Unsupported operand" in text:
        return (
            "is pickled in another way than torch.save does by default, which weights_only=True "
            "does not read; save it again, without pickle_protocol="
        )
    if isinstance(error, NotReadError):
        return f"has what is not read: {text}; save model.state_dict()"
    said = (text.partition("WeightsUnpickler error:")[2] or text).strip().partition("\n")[0]
    return f"is no whole PyTorch file: {said.strip().rstrip('.') or type(error).__name__}"


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Any],
    like: Checkpoint | None = None,
) -> None:
    """Write arrays as a state dict that `torch.load(path, weights_only=True)` reads.

    like: an open file whose form it is to have, dicts around the state dict and all. Of bfloat16,
    which NumPy lacks, the array is float32. Raises OSError where the file cannot be written whole.
    """
    if isinstance(like, PyTorchCheckpoint):
        like.write_like(path, entries, arrays)
        return
    tensors = {
        entry.name: torch.from_numpy(np.array(arrays[entry.name])).to(getattr(torch, entry.dtype))
        for entry in entries
    }
    save(tensors, path)


def save(content: Any, path: Path, **options: Any) -> None:
    """Write as `torch.save` does, which has the options; OSError where the disk takes no more."""
    # PyTorch takes no name that is a suffix alone, such as ".pt".
    given = path.with_name("archive.pt") if path.name.rfind(".") == 0 else path
    try:
        torch.save(content, given, **options)
    except RuntimeError as error:
        if not _REFUSED.search(str(error)):
            raise
        raise OSError("the disk takes no more bytes") from error
    given.replace(path)

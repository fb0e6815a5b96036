"""Writing a converted file: what each format needs beside names and arrays."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from doconv_core.cli.checkpoints import literal
from doconv_core.cli.errors import IMPOSSIBLE, MISSING, Failure
from doconv_core.cli.plan import Plan
from doconv_core.files.arrays import BFLOAT16, storage_dtype, to_storage
from doconv_core.files.gluon import DTYPES as GLUON_DTYPES
from doconv_core.files.gluon import write_params
from doconv_core.files.hdf5_files import Written
from doconv_core.files.safetensors import DTYPES
from doconv_core.state.file import State, write_state
from doconv_core.state.layers import LayerForm

# What writes a PyTorch file is found here, so that this package knows no framework.
GROUP = "doconv.writers"
WEIGHTS = "model.weights.h5"
Step = Callable[[int, int], None]


def _check_types(plan: Plan, types: Container[str], files: str) -> None:
    """Raise Failure for an entry of a type that these files lack, or that is not written here."""
    for entry in plan.entries:
        if entry.dtype not in types:
            name = entry.sources[0] if entry.sources else entry.name
            raise Failure(
                f"the entry {name!r} is {entry.dtype}, which is not written to {files} files; "
                f"--drop '{literal(name)}' leaves it out.",
                IMPOSSIBLE,
            )


def write_safetensors(path: Path, plan: Plan, step: Step) -> None:
    """Write a plain safetensors file, one array in memory at a time."""
    _check_types(plan, DTYPES.values(), "safetensors")
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    position = 0
    for entry in plan.entries:
        end = position + prod(entry.shape) * storage_dtype(entry.dtype).itemsize
        header[entry.name] = {
            "dtype": codes[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    arrays = plan.arrays(step)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in plan.entries:
            file.write(to_storage(arrays[entry.name], entry.dtype).tobytes())


class _Cast(Mapping[str, Any]):
    """A plan's arrays, each in the type in which it is to be stored."""

    def __init__(self, plan: Plan, step: Step) -> None:
        self._arrays = plan.arrays(step)
        self._dtypes = {entry.name: entry.dtype for entry in plan.entries}

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name].astype(self._dtypes[name], copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def write_gluon(path: Path, plan: Plan, step: Step) -> None:
    """Write Gluon parameters, as `save_parameters` does."""
    _check_types(plan, set(GLUON_DTYPES) - {BFLOAT16}, "Gluon's")
    write_params(path, _Cast(plan, step))


def write_pytorch(path: Path, plan: Plan, step: Step) -> None:
    """Write a PyTorch state dict. Raises Failure where PyTorch is not installed."""
    for found in metadata.entry_points(group=GROUP, name="pytorch"):
        try:
            write = found.load()
        except ImportError as error:
            raise Failure(f"a PyTorch file cannot be written: {error}", MISSING) from error
        write(path, plan.arrays(step), {entry.name: entry.dtype for entry in plan.entries})
        return
    raise Failure(f"no installed package writes PyTorch files, in the group {GROUP}.", MISSING)


def write_state_like(
    path: Path,
    plan: Plan,
    step: Step,
    forms: Mapping[str, LayerForm],
    origin: Mapping[str, str],
) -> None:
    """Write a canonical state of these layers. origin: who has trained it, if that is known."""
    dtypes = {entry.name: entry.dtype for entry in plan.entries}
    arrays = {name: array.astype(dtypes[name]) for name, array in plan.arrays(step).items()}
    write_state(State(forms, arrays, origin), path)


def write_keras_like(path: Path, plan: Plan, step: Step, template: Path) -> None:
    """Write a copy of a Keras file in which the arrays are others.

    The template has been opened as a checkpoint, so that all of it has been checked.
    """
    _check_types(plan, DTYPES.values(), "Keras'")
    if not zipfile.is_zipfile(template):
        shutil.copyfile(template, path)
        _fill(path, plan, step)
        return
    weights = path.with_name(f"{path.name}.weights")
    with zipfile.ZipFile(template) as source, zipfile.ZipFile(path, "w") as target:
        with source.open(WEIGHTS) as stored, weights.open("wb") as file:
            shutil.copyfileobj(stored, file)
        _fill(weights, plan, step)
        for member in source.infolist():
            kept = weights.open("rb") if member.filename == WEIGHTS else source.open(member)
            named = zipfile.ZipInfo(member.filename, member.date_time)
            with kept, target.open(named, "w", force_zip64=True) as written:
                shutil.copyfileobj(kept, written)
    weights.unlink()


def _fill(path: Path, plan: Plan, step: Step) -> None:
    import h5py  # which has read the template

    arrays = plan.arrays(step)
    with Written(path, "r+b") as written, h5py.File(written, "r+") as file:
        for entry in plan.entries:
            written.check()
            values = to_storage(arrays[entry.name], entry.dtype)
            dataset = file[entry.name]
            dataset[...] = values.view(dataset.dtype) if dataset.dtype.kind == "V" else values

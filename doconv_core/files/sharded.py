"""Sharded safetensors: an index in JSON, and the files that it says each entry is in.

So large models are shipped. Named as Hugging Face names them: `model.safetensors.index.json` beside
`model-00001-of-00002.safetensors` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from doconv_core.files.checkpoint import Beginning, Checkpoint
from doconv_core.files.entries import (
    PYTORCH,
    Array,
    CheckpointError,
    Entry,
    KernelSizes,
    Lazy,
    check_names,
    once,
    shown,
    storage_dtype,
    without_wrappers,
)
from doconv_core.files.folding import Output, folded_kernel, outputs
from doconv_core.files.layers import Sizes, find_layers
from doconv_core.files.paths import MAX_INDEX
from doconv_core.files.safetensors import TYPES as TYPES
from doconv_core.files.safetensors import SafetensorsCheckpoint, write_with

NAME, SUFFIXES, FRAMEWORK = "sharded safetensors", (".safetensors.index.json",), PYTORCH
MAX_SHARDS = 10_000
SHARD = 5_000_000_000  # bytes of arrays in a shard that is written anew


def sniff(begin: Beginning) -> bool:
    """Return whether this may be an index: a JSON object, as its suffix says, or its map."""
    told = begin.path.name.lower().endswith(".json") or b'"weight_map"' in begin.head
    return begin.head[:1] == b"{" and told


def write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    like: Checkpoint | None = None,
) -> None:
    """Write shards beside `path`, and the index to it.

    Of `like`, with the same entries in each; those that it has not go into the last one.
    """
    if isinstance(like, ShardedCheckpoint):
        last = len(like.shards) - 1
        numbers = [like.shard_of.get(entry.name, last) for entry in entries]
        _write(path, entries, arrays, numbers, like.headers, like.metadata)
        return
    numbers, number, used = [], 0, 0
    for entry in entries:
        size = _bytes(entry)
        new = bool(numbers) and used + size > SHARD
        number += new
        numbers.append(number)
        used = size if new else used + size
    _write(path, entries, arrays, numbers, [{}] * (number + bool(numbers)), {})


def _write(
    path: Path,
    entries: Sequence[Entry],
    arrays: Mapping[str, Array],
    numbers: Sequence[int],
    headers: Sequence[Mapping[str, str]],
    metadata: Mapping[str, Any],
) -> None:
    """Write the entries to shards of these numbers. headers: the metadata of each."""
    count = len(headers)
    has_suffix = path.name.lower().endswith(SUFFIXES[0])
    stem = path.name[: -len(SUFFIXES[0])] if has_suffix else path.name
    names = [f"{stem}-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    shards: list[list[Entry]] = [[] for _ in names]
    for entry, number in zip(entries, numbers, strict=True):
        shards[number].append(entry)
    for name, own, header in zip(names, shards, headers, strict=True):
        write_with(path.with_name(name), own, arrays, header)
    index = {
        "metadata": {**metadata, "total_size": sum(map(_bytes, entries))},
        "weight_map": {e.name: names[n] for e, n in zip(entries, numbers, strict=True)},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(entry: Entry) -> int:
    return entry.size * storage_dtype(entry.dtype).itemsize


class ShardedCheckpoint(Checkpoint):
    """An open index with its shards. Raises CheckpointError where one is damaged or hostile.

    shards: their names, in their order. shard_of: the place of each entry's shard among them.
    """

    format, framework, ordered = "sharded safetensors", FRAMEWORK, False

    def __init__(self, path: Path, kernel_sizes: KernelSizes) -> None:
        self.path = path
        self.metadata, where = _read_index(path)
        self.shards = sorted(set(where.values()))
        place = {shard: number for number, shard in enumerate(self.shards)}
        self.shard_of = {name: place[shard] for name, shard in where.items()}
        told: dict[str, set[str]] = {shard: set() for shard in self.shards}
        for name, shard in where.items():
            told[shard].add(name)
        self._opened = ExitStack()
        try:
            self._files = [self._open(name, told[name], where) for name in self.shards]
            self.entries = {n: e for file in self._files for n, e in file.entries.items()}
            sizes = Sizes(kernel_sizes)
            self.layers = find_layers(self.entries, without_wrappers(list(self.entries)), sizes)
            sizes.check_used()
        except BaseException:
            self.close()
            raise

    @property
    def headers(self) -> list[dict[str, str]]:
        """The metadata of each shard."""
        return [file.metadata for file in self._files]

    def _open(self, name: str, told: set[str], where: Mapping[str, str]) -> SafetensorsCheckpoint:
        """Return a shard, open; CheckpointError where the index tells otherwise of its entries."""
        path = self.path.with_name(name)
        if not path.is_file():
            raise CheckpointError(f"{self.path} needs {path}, which is not there.")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{self.path} is the index of other files than safetensors, such as {name}; load "
                "the model and save it again in one file, or as safetensors."
            )
        file = SafetensorsCheckpoint(path, {})
        self._opened.callback(file.close)
        for entry in sorted(told ^ file.entries.keys()):
            other = f"in {where[entry]}" if entry in where and entry not in told else "in no shard"
            problem = "has not" if entry in told else f"has, where the index has it {other}"
            raise CheckpointError(
                f"{self.path} does not fit its shards: of {shown(entry)}, {path.name} {problem}."
            )
        return file

    def read_stored(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read_stored` says."""
        return self._files[self.shard_of[name]].read_stored(name)

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the files, folded, as `Checkpoint.write_folded` says, in as many shards."""
        planned = outputs(self)

        def made(output: Output) -> Array:
            if output.layer is None:
                return self.read_stored(output.source)
            kernel = folded_kernel(self, output.layer, output.shape)
            report()
            return kernel

        entries = [Entry(o.name, o.shape, self.entries[o.source].dtype) for o in planned]
        arrays = Lazy({output.name: partial(made, output) for output in planned})
        numbers = [self.shard_of[output.source] for output in planned]
        _write(target, entries, arrays, numbers, self.headers, self.metadata)

    def close(self) -> None:
        """Close the shards."""
        self._opened.close()


read = ShardedCheckpoint


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return an index's metadata, and the shard of each entry, each a plain name beside it."""
    size = path.stat().st_size
    if size > MAX_INDEX:
        raise CheckpointError(f"{path} has {size} bytes; at most {MAX_INDEX} are read.")
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=once)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from error
    where = index.get("weight_map") if isinstance(index, dict) else None
    metadata = index.get("metadata", {}) if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is no index of safetensors files: it has no weight_map.")
    check_names(path, where)
    shards = set(map(str, where.values()))
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{path} names {len(shards)} files; at most {MAX_SHARDS} are read.")
    for shard in where.values():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{path} names the file {shown(str(shard))}, which is not one beside it; it is not "
                "read."
            )
    return metadata, where

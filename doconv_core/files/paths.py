"""What a path to a checkpoint may be: a file that is whole, and neither a folder nor a part."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from doconv_core.files.entries import CheckpointError
from doconv_core.files.foreign import DEEPSPEED_PART, SPLIT, foreign_folder

GATHER = (
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save({!r}, 'model.pt') makes one file "
    "of it"
)


def check_ordinary(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise IsADirectoryError, or CheckpointError, for what is no file that can be read twice.

    suffixes: of the formats that are known.
    """
    distributed = ".distcp"  # of torch.distributed.checkpoint, which writes folders of them
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir())
        if ".metadata" in names or any(name.endswith(distributed) for name in names):
            raise IsADirectoryError(
                f"{path} is a folder of torch.distributed.checkpoint; {GATHER.format(str(path))}."
            )
        if what := foreign_folder(names):
            raise IsADirectoryError(f"{path} is {what}.")
        index = re.compile(r".+\.index(\.\w+)?\.json")  # which stands for its shards
        found = [name for name in names if name.lower().endswith(suffixes) or index.fullmatch(name)]
        found.sort(key=lambda name: index.fullmatch(name) is None)
        such = f", such as {path / found[0]}" if found else ""
        raise IsADirectoryError(f"{path} is a folder; name a checkpoint file{such}.")
    if path.exists() and not path.is_file():
        raise CheckpointError(
            f"{path} is a pipe or a device, which cannot be read twice; write what it gives to a "
            "file, and name that."
        )
    if SPLIT.fullmatch(path.name):
        raise CheckpointError(
            f"{path} is a part of a checkpoint, the folder {path.parent}, of {DEEPSPEED_PART}."
        )
    if path.name.endswith(distributed) or path.name == ".metadata":
        raise CheckpointError(
            f"{path} is a part of a checkpoint of torch.distributed.checkpoint, the folder "
            f"{path.parent}; {GATHER.format(str(path.parent))}."
        )


SHARD = re.compile(r"(.+)[-_.]\d+[-_]of[-_](\d+)(\.[a-z]+)", re.IGNORECASE)
MAX_INDEX = 1 << 28  # bytes of an index of several files


def check_whole(path: Path) -> None:
    """Raise CheckpointError for a shard, as its name or an index beside it tells."""
    index = next((each for each in sorted(path.parent.glob("*.index*.json"))
                  if path.name in _shards_of(each)), None)  # fmt: skip
    named = SHARD.fullmatch(path.name)
    if named and int(named[2]) > 1:
        index = index or path.with_name(f"{named[1]}{named[3]}.index.json")
    if index is None:
        return
    there = "" if index.is_file() else ", which is not beside it"
    raise CheckpointError(
        f"{path} is one of several files of a model, and layers may be in two of them; name their "
        f"index, {index}{there}."
    )


def _shards_of(index: Path) -> set[str]:
    """Return the files that an index names, if there are several."""
    try:
        content: Any = json.loads(index.read_bytes()) if index.stat().st_size <= MAX_INDEX else None
        names = {str(name) for name in content["weight_map"].values()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return set()  # whoever names the index is told
    return names if len(names) > 1 else set()

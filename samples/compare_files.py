"""The comparison's results in a file, for frameworks that live in separate environments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from compare_problem import Answer, Problem
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from doconv_core.files import replacing

FORMAT = "doconv-comparison"


class ComparisonError(Exception):
    """The comparison cannot go on; the message says why."""


class Recorded(NamedTuple):
    """A framework's answer. name: of the backend. title: with its version, as it is printed."""

    name: str
    title: str
    answer: Answer


def write(file: Path, problem: Problem, recorded: Sequence[Recorded]) -> None:
    """Write the answers to `file`, one safetensors file, atomically."""
    header = {
        "format": FORMAT,
        "problem": digest(problem),
        "frameworks": json.dumps({record.name: record.title for record in recorded}),
    }
    arrays = {
        f"{record.name}/{name}": np.ascontiguousarray(array)
        for record in recorded
        for name, array in _flat(record.answer).items()
    }
    with replacing(file) as temporary:
        temporary.write_bytes(save(arrays, metadata=header))


def read(file: Path, problem: Problem) -> list[Recorded]:
    """Return the answers in `file`.

    Raises ComparisonError for a file that is damaged, foreign, or of another problem.
    """
    try:
        with safe_open(file, framework="np") as stored:
            header = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ComparisonError(f"{file} is not a whole safetensors file: {error}.") from error
    if header.get("format") != FORMAT:
        raise ComparisonError(
            f"{file} is no comparison: its header's format is {header.get('format')!r}; expected "
            f"{FORMAT!r}, as compare.py --save writes it."
        )
    if header.get("problem") != digest(problem):
        raise ComparisonError(
            f"{file} holds the answers to another problem: it comes from another version of this "
            "package or of the data. Save it again with this one."
        )
    return [
        Recorded(name, f"{title} ({file.name})", _unflat(file, name, arrays))
        for name, title in json.loads(header["frameworks"]).items()
    ]


def digest(problem: Problem) -> str:
    """Return a fingerprint of everything that the frameworks are given."""
    digest = hashlib.sha256()
    for name, array in sorted(problem.state.arrays.items()):
        digest.update(name.encode() + array.tobytes())
    for array in (problem.images, problem.labels, problem.test_images):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _flat(answer: Answer) -> dict[str, np.ndarray]:
    flat = {}
    for field, value in answer._asdict().items():
        if isinstance(value, dict):
            flat |= {f"{field}/{name}": array for name, array in value.items()}
        else:
            flat[field] = value
    return flat


def _unflat(file: Path, framework: str, arrays: dict[str, np.ndarray]) -> Answer:
    fields: dict[str, object] = {}
    for name, array in arrays.items():
        owner, field, *entry = name.split("/")
        if owner != framework:
            continue
        if entry:
            fields.setdefault(field, {})[entry[0]] = array
        else:
            fields[field] = array
    missing = [field for field in Answer._fields if field not in fields]
    if missing:
        raise ComparisonError(f"{file} lacks {framework}'s {', '.join(missing)}.")
    return Answer(**fields)

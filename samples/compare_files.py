"""The comparison's results in a file, for frameworks that live in separate environments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from compare_problem import Answer, Problem, answer_shapes
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from doconv_core.atomic import replacing

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
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(save(arrays, metadata=header))


def read(file: Path, problem: Problem) -> list[Recorded]:
    """Return the answers in `file`.

    Raises ComparisonError for a file that is damaged, foreign, or of another problem.
    """
    if file.is_dir():
        raise ComparisonError(f"{file} is a folder; name a file that compare.py --save wrote.")
    try:
        with safe_open(file, framework="np") as stored:
            titles = _read_header(file, stored.metadata() or {}, problem)
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ComparisonError(f"{file} is not a whole safetensors file: {error}.") from error
    return [
        Recorded(name, f"{title} ({file.name})", _unflat(file, name, arrays, problem))
        for name, title in titles.items()
    ]


def _read_header(file: Path, header: dict[str, str], problem: Problem) -> dict[str, str]:
    """Return the titles of the frameworks in the file; ComparisonError where it is another's."""
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
    try:
        titles = json.loads(header.get("frameworks", ""))
    except ValueError as error:
        raise ComparisonError(f"{file}: the header's frameworks are no JSON: {error}.") from error
    if not isinstance(titles, dict):
        raise ComparisonError(f"{file}: the header's frameworks must be an object; found {titles}.")
    return titles


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


def _unflat(file: Path, framework: str, arrays: dict[str, np.ndarray], problem: Problem) -> Answer:
    fields: dict[str, Any] = {}
    for name, shape in answer_shapes(problem).items():
        array = arrays.get(f"{framework}/{name}")
        if array is None or array.shape != shape:
            found = "is missing" if array is None else f"has shape {array.shape}"
            raise ComparisonError(f"{file}: {framework}/{name} {found}; expected shape {shape}.")
        field, _, entry = name.partition("/")
        if entry:
            fields.setdefault(field, {})[entry] = array
        else:
            fields[field] = array
    return Answer(**fields)

"""A toy format: a JSON object of names and lists of numbers, as a format of another package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import CheckpointError, Entry, without_wrappers
from doconv_core.files.folding import folded_kernel, outputs
from doconv_core.files.layers import Sizes, find_layers

NAME, SUFFIXES, FRAMEWORK, TYPES = "toy", (".toy",), "PyTorch", frozenset(("float64",))


def sniff(begin):
    return begin.head.startswith(b'{"toy":')


def read(path, kernel_sizes):
    return ToyCheckpoint(path, kernel_sizes)


def write(path, entries, arrays, like=None):
    content = {entry.name: arrays[entry.name].tolist() for entry in entries}
    path.write_text(json.dumps({"toy": content}))


class ToyCheckpoint(Checkpoint):
    format, framework = "toy", FRAMEWORK

    def __init__(self, path, kernel_sizes):
        self.path = Path(path)
        try:
            content = json.loads(self.path.read_text())["toy"]
        except ValueError as error:
            raise CheckpointError(f"{path} is no whole toy file: {error}.") from error
        self._arrays = {name: np.array(values, np.float64) for name, values in content.items()}
        self.entries = {n: Entry(n, a.shape, "float64") for n, a in self._arrays.items()}
        keys, sizes = without_wrappers(list(self.entries)), Sizes(kernel_sizes)
        self.layers = find_layers(self.entries, keys, sizes)

    def read(self, name):
        return self._arrays[name]

    def write_folded(self, target, report):
        folded = {}
        for output in outputs(self):
            folded[output.name] = self._arrays[output.source]
            if output.layer is not None:
                folded[output.name] = folded_kernel(self, output.layer, output.shape)
                report()
        write(target, [Entry(n, a.shape, "float64") for n, a in folded.items()], folded)

    def close(self):
        self._arrays = {}

"""Folding a file takes less than two and a half times its size in memory."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import numpy as np
import pytest
from frameworks import need
from safetensors.numpy import save_file

from doconv_core import ConvSpec
from doconv_core.checkpoint import open_checkpoint
from doconv_core.checkpoints.gluon import write_params

# A single layer takes more than many of the same size, as W, D and the kernel are there at once.
ONE = {"large": ConvSpec(1536, 2560, (3, 3))}
MANY = {f"layer{number}": ConvSpec(512, 512, (3, 3)) for number in range(14)}
DEPTHWISE = {f"layer{number}": ConvSpec(1 << 17, 1 << 17, (3, 3), 1 << 17) for number in range(3)}
NETWORKS = {"one": ONE, "many": MANY, "depthwise": DEPTHWISE}

# Linux' ru_maxrss would be inherited from the process that starts this one; VmHWM is not.
MEASURE = """
import re, resource, sys
from pathlib import Path
from doconv_core.checkpoint import fold_checkpoint

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes

source, small, target = sys.argv[1:]
fold_checkpoint(small, target, overwrite=True)  # imports all that is needed
before = peak()
fold_checkpoint(source, target, overwrite=True)
print(peak() - before)
"""


def arrays(specs):
    """Return the entries of these layers, all with the same numbers: only their size matters."""
    for path, spec in specs.items():
        for name, shape in (("weight", spec.parameter_shape), ("bias", (spec.out_channels,)),
                            ("depthwise_weight", spec.depthwise_shape)):  # fmt: skip
            count = prod(shape)
            ramp = np.linspace(-1, 1, min(count, 1 << 16), dtype=np.float32)
            yield f"{path}.{name}", np.resize(ramp, count).reshape(shape)


def write(kind, path, specs):
    if kind == "safetensors":
        save_file(dict(arrays(specs)), path)
    elif kind == "gluon":
        write_params(path, dict(arrays(specs)))
    elif kind in ("pytorch", "pickle"):
        need("torch")
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in arrays(specs)}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pytorch")
    else:
        need("tf")
        write_hdf5(path, specs)
        if kind == "keras":
            in_archive(path)


def write_hdf5(path, specs):
    import h5py

    names = {"weight": "0", "bias": "1", "depthwise_weight": "depthwise_kernel"}
    with h5py.File(path, "w") as file:
        for name, array in arrays(specs):
            layer, _, own = name.rpartition(".")
            spec, number = specs[layer], [*specs].index(layer)
            if own == "weight":
                array = array.reshape(*spec.kernel_size, *spec.kernel_shape[1::-1])
            group = f"do_conv2d_{number}" if number else "do_conv2d"
            file[f"layers/{group}/vars/{names[own]}"] = array


def in_archive(path):
    import zipfile

    weights = path.with_suffix(".h5")
    path.rename(weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", '{"class_name": "Model", "config": {}}')
        archive.write(weights, "model.weights.h5")
    weights.unlink()


CASES = [
    ("safetensors", "one"), ("safetensors", "depthwise"), ("pytorch", "one"), ("pickle", "many"),
    ("gluon", "many"), ("hdf5", "one"), ("keras", "many"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "network"), CASES)
def test_peak_memory_is_under_two_and_a_half_times_the_file(kind, network, tmp_path):
    source, small = tmp_path / "source", tmp_path / "small"
    write(kind, source, NETWORKS[network])
    write(kind, small, {"a": ConvSpec(4, 4, (3, 3))})
    size = source.stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", MEASURE, source, small, tmp_path / "target"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5 * size
    with open_checkpoint(tmp_path / "target") as checkpoint:
        assert not any(layer.over_parameterized for layer in checkpoint.layers)
    for file in tmp_path.iterdir():  # pytest would keep them
        file.unlink()

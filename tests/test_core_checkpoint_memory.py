"""Folding a file takes less than two and a half times its size in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from frameworks import imported, need

from doconv_core import ConvSpec
from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.files.entries import to_storage
from doconv_core.files.gluon import write_params
from doconv_core.files.safetensors import DTYPES

# A single layer takes more than many of the same size, as W, D and the kernel are there at once.
WIDE = 1 << 16
NETWORKS = {
    "one": lambda twice: {"large": ConvSpec(twice * 1024, 1920, (3, 3))},
    "many": lambda twice: {f"layer{n}": ConvSpec(512, 512, (3, 3)) for n in range(7 * twice)},
    "depthwise": lambda twice: {
        f"layer{n}": ConvSpec(WIDE, WIDE, (3, 3), WIDE) for n in range(3 * twice)
    },
}

# Linux' ru_maxrss would be inherited from the process that starts this one; VmHWM is not.
MEASURE = """
import re, resource, sys
from pathlib import Path
from doconv_core.files.checkpoint import fold_checkpoint

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


def arrays(specs, dtype):
    """Return the entries of these layers, as they are stored; only their size matters."""
    ramp = to_storage(np.linspace(-1, 1, 1 << 16, dtype=np.float32), dtype)
    for path, spec in specs.items():
        for name, shape in (("weight", spec.parameter_shape), ("bias", (spec.out_channels,)),
                            ("depthwise_weight", spec.depthwise_shape)):  # fmt: skip
            yield f"{path}.{name}", np.resize(ramp, shape)


def write(kind, path, specs, dtype):
    if kind == "safetensors":
        codes = {name: code for code, name in DTYPES.items()}
        write_safetensors(path, dict(arrays(specs, dtype)), codes[dtype])
    elif kind == "gluon":
        write_params(path, dict(arrays(specs, dtype)))
    elif kind in ("pytorch", "channels last", "pickle"):
        torch = imported("torch")
        of = getattr(torch, dtype)
        plain = {name: array.view(f"i{array.itemsize}") for name, array in arrays(specs, dtype)}
        tensors = {name: torch.from_numpy(array).view(of) for name, array in plain.items()}
        if kind == "channels last":
            last = {"memory_format": torch.channels_last}
            tensors = {n: t.contiguous(**last) if t.ndim == 4 else t for n, t in tensors.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind != "pickle")
    else:
        need("tf")
        write_hdf5(path, specs, dtype)
        if kind == "keras":
            in_archive(path)


def write_safetensors(path, named, code):
    header, position = {}, 0
    for name, array in named.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in named.values():
            file.write(array.data)


def write_hdf5(path, specs, dtype):
    import h5py

    names = {"weight": "0", "bias": "1", "depthwise_weight": "depthwise_kernel"}
    with h5py.File(path, "w") as file:
        for name, array in arrays(specs, dtype):
            layer, _, own = name.rpartition(".")
            spec, number = specs[layer], [*specs].index(layer)
            if own == "weight":
                array = array.reshape(*spec.kernel_size, *spec.kernel_shape[1::-1])
            group = f"do_conv2d_{number}" if number else "do_conv2d"
            bits = array.view("V2") if dtype == "bfloat16" else array
            file[f"layers/{group}/vars/{names[own]}"] = bits


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
    ("safetensors", "one", "float32"), ("safetensors", "one", "bfloat16"),
    ("safetensors", "depthwise", "float32"), ("safetensors", "depthwise", "bfloat16"),
    ("pytorch", "one", "float32"), ("pytorch", "one", "float16"), ("pytorch", "many", "bfloat16"),
    ("channels last", "one", "float32"), ("pickle", "many", "float32"),
    ("pickle", "one", "bfloat16"), ("gluon", "one", "float16"), ("gluon", "many", "bfloat16"),
    ("hdf5", "one", "float32"), ("keras", "many", "bfloat16"), ("keras", "one", "float16"),
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "network", "dtype"), CASES)
def test_peak_memory_is_under_two_and_a_half_times_the_file(kind, network, dtype, tmp_path):
    source, small = tmp_path / "source", tmp_path / "small"
    write(kind, source, NETWORKS[network](1 if dtype == "float32" else 2), dtype)
    write(kind, small, {"a": ConvSpec(4, 4, (3, 3))}, dtype)
    size = source.stat().st_size
    assert size > 60e6
    command = [sys.executable, "-c", MEASURE, source, small, tmp_path / "target"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5 * size
    with open_checkpoint(tmp_path / "target") as checkpoint:
        assert not any(layer.over_parameterized for layer in checkpoint.layers)
    for file in tmp_path.iterdir():  # pytest would keep them
        file.unlink()

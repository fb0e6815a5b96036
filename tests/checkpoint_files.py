"""Checkpoint files for tests: layers with numbers by formula, and what they fold to."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from doconv_core import CheckpointError, ConvSpec, NotFoldable, compose, fold_checkpoint

SPECS = {
    "features.0": ConvSpec(3, 8, (3, 3)),
    "features.2": ConvSpec(8, 8, (3, 3), 4),
    "features.4": ConvSpec(8, 8, (2, 3), 8),
    "features.6": ConvSpec(8, 4, (3,)),
    "features.8": ConvSpec(4, 6, (1, 2, 3), 2),
}


def numbers(*shape, seed=0, dtype=np.float32):
    """Return numbers between -1 and 1, the same for the same arguments."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def pair(spec, seed=0, dtype=np.float32):
    """Return W, in the shape in which a layer keeps it, D and the kernel that they compose to."""
    weight = numbers(*spec.weight_shape, seed=seed, dtype=dtype)
    depthwise = numbers(*spec.depthwise_shape, seed=seed + 1, dtype=dtype)
    kernel = compose(weight, depthwise, spec)
    return weight.reshape(spec.parameter_shape), depthwise, kernel


def one_layer(spec):
    """Return the entries of one over-parameterized layer, `a`, and the kernel that it folds to."""
    weight, depthwise, kernel = pair(spec)
    return {"a.weight": weight, "a.depthwise_weight": depthwise}, kernel


def folded_arrays(arrays, file, **options):
    """Fold a file of safetensors with these arrays; return the report and the arrays of `out`."""
    save_file(arrays, file)
    out = file.with_name("out")
    return fold_checkpoint(file, out, **options), load_file(out)


def state_dict(specs=SPECS, dtype=np.float32):
    """Return a state dict with other layers among the over-parameterized, and the folded one."""
    arrays, folded = {}, {}
    for seed, (path, spec) in enumerate(specs.items()):
        weight, depthwise, kernel = pair(spec, seed, dtype)
        bias = {f"{path}.bias": numbers(spec.out_channels, seed=seed, dtype=dtype)}
        arrays |= {f"{path}.weight": weight, **bias, f"{path}.depthwise_weight": depthwise}
        folded |= {f"{path}.weight": kernel, **bias}
    others = {
        "norm.weight": numbers(4, dtype=dtype),
        "norm.bias": numbers(4, dtype=dtype),
        "norm.running_mean": numbers(4, dtype=dtype),
        "norm.running_var": numbers(4, dtype=dtype) + 2,
        "norm.num_batches_tracked": np.array(7),
        "plain.weight": numbers(4, 4, 3, 3, dtype=dtype),
        "head.weight": numbers(5, 4, dtype=dtype),
        "head.bias": numbers(5, dtype=dtype),
        "position": numbers(1, 7, 4, dtype=dtype),
    }
    return arrays | others, folded | others


def only_line(error):
    """Return an error's message, which must be one line that ends in a full stop."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def refused(file, message, error=NotFoldable, **options):
    """Assert that a file is not folded: one line says why, and nothing is written.

    Of a file that cannot be read, the line names it.
    """
    before = sorted(file.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        fold_checkpoint(file, file.with_name("out"), **options)
    line = only_line(caught)
    assert error is not CheckpointError or str(file) in line
    assert sorted(file.parent.iterdir()) == before

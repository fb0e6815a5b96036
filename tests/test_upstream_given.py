"""What one may give `read_upstream` in place of a file: what training code has in its hands."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import numbers, only_line
from frameworks import imported, need

from doconv_core.files.entries import CheckpointError
from doconv_core.files.upstream import read_upstream


def entries(dtype=np.float32):
    unit = np.tile(np.eye(9), (4, 1, 1)).astype(dtype)
    return {
        "conv.W": numbers(8, 4, 9, seed=1).astype(dtype),
        "conv.D": numbers(4, 9, 9, seed=2).astype(dtype),
        "conv.D_diag": unit,
        "bn.weight": numbers(8, seed=3).astype(dtype),
    }


def check(found, factor=1, dtype=np.float32):
    """Compare with the entries, as they are carried over."""
    assert found.carried == ("conv",)
    assert set(found.entries) == {"conv.weight", "conv.depthwise_weight", "bn.weight"}
    given = {name: array.astype(np.float32) for name, array in entries(dtype).items()}
    arrays = {name: array.astype(np.float32) for name, array in found.entries.items()}
    np.testing.assert_array_equal(arrays["conv.weight"].ravel(), factor * given["conv.W"].ravel())
    np.testing.assert_array_equal(arrays["conv.depthwise_weight"], given["conv.D"])
    np.testing.assert_array_equal(arrays["bn.weight"], given["bn.weight"])


def scaled(factor):
    return entries() | {"conv.W": factor * entries()["conv.W"]}


NESTED = {
    "state_dict": {"epoch": 3, "state_dict": entries()},
    "model": {"model": entries(), "optimizer": {"state": {0: numbers(3, 3)}}},
    "deeper": {"a": {"b": {"net": entries()}}, "args": {"lr": 0.1, "names": ["a"]}},
    "a list": {"models": [entries(), scaled(2)]},
    "an average first": {"model_ema": scaled(2), "model": entries()},
    "an average alone": {"ema": entries()},
    "wrapped": {"model": {f"module.{name}": array for name, array in entries().items()}},
    "with what is no array": {**entries(), "note": "text", "none": None, "version": 2, 1: 1},
    "other mappings": UserDict(state=OrderedDict(entries())),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_state_dict_is_found_as_in_files(case):
    check(read_upstream(NESTED[case]))
    check(read_upstream(NESTED[case], "PyTorch"))


def test_lists_of_numbers_are_arrays():
    check(read_upstream({name: array.tolist() for name, array in entries().items()}))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_types(dtype):
    found = read_upstream(entries(dtype))
    check(found, dtype=dtype)
    expected = np.float32 if dtype == ml_dtypes.bfloat16 else dtype
    assert {array.dtype for array in found.entries.values()} == {np.dtype(expected)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_tensors_of_pytorch(dtype):
    torch = imported("torch")
    given = {n: torch.from_numpy(a).to(getattr(torch, dtype)) for n, a in entries().items()}
    of = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    check(read_upstream({"state_dict": given}), dtype=of)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in given.items()}
    check(read_upstream(parameters), dtype=of)
    check(read_upstream({name: 1 * tensor for name, tensor in parameters.items()}), dtype=of)


def test_variables_of_keras():
    keras = imported("tf")
    check(read_upstream({n: keras.Variable(a) for n, a in entries().items()}, "PyTorch"))
    given = {n: keras.Variable(a, dtype="bfloat16") for n, a in entries().items()}
    check(read_upstream(given, "PyTorch"), dtype=ml_dtypes.bfloat16)


def test_arrays_of_mxnet():
    need("mx")
    import_module("doconv_mx")  # without which MXNet cannot be imported beside this NumPy
    array = import_module("mxnet").nd.array
    check(read_upstream({name: array(given) for name, given in entries().items()}, "PyTorch"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict: give a dict of arrays by name.*; received the keys none"),
        ({"epoch": 1, "args": {"lr": 2}}, "received the keys 'epoch', 'args'"),
        ({"optimizer": entries()}, "received the keys 'optimizer'"),
        ({**entries(), "x": np.array(["a"])}, "entry 'x' is no array of numbers: received a ndarr"),
        ({**entries(), "x": [[1], [1, 2]]}, "entry 'x' is no array of numbers: received a list"),
    ],
)
def test_what_is_none_is_told(content, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read_upstream(content)
    only_line(error)


def test_a_tensor_that_is_no_array_is_told():
    torch = imported("torch")
    with pytest.raises(
        CheckpointError, match=r"entry 'x' is no .* a Tensor torch\.float32; give it as a NumPy"
    ) as error:
        read_upstream({**entries(), "x": torch.eye(3).to_sparse()})
    only_line(error)

"""Each package alone brings no other framework along, and all of them together get on."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from frameworks import BACKENDS, fresh, imported, need

FRAMEWORKS = {"torch", "tensorflow", "keras", "mxnet", "jax", "gluoncv"}
BRINGS = {"torch": {"torch"}, "tf": {"tensorflow", "keras"}, "mx": {"mxnet"}}

STEPS = {
    "torch": """
import doconv_torch, torch
layer = doconv_torch.DOConv2d(4, 6, 3, groups=2)
print("torch", tuple(layer(torch.zeros(1, 4, 5, 5)).detach().numpy().shape))
""",
    "tf": """
import doconv_tf, numpy
layer = doconv_tf.DOConv2D(6, 3, groups=2)
print("tf", tuple(numpy.asarray(layer(numpy.zeros((1, 5, 5, 4), "float32"))).shape))
""",
    "mx": """
import doconv_mx, mxnet
layer = doconv_mx.DOConv2D(4, 6, 3, groups=2)
layer.initialize()
print("mx", layer(mxnet.nd.zeros((1, 4, 5, 5))).asnumpy().shape)
""",
}


# GluonCV, which looks for PyTorch, comes with MXNet.
GLUONCV = """
import sys
before = sys.modules.get("torch", 0)
assert doconv_mx.import_gluoncv() is doconv_mx.import_gluoncv()
assert sys.modules.get("torch", 0) is before
import gluoncv.model_zoo
"""
# In which each of two frameworks comes before the other, and MXNet at every place.
ORDERS = [("mx", "torch", "tf"), ("torch", "mx", "tf"), ("tf", "torch", "mx")]


def test_each_framework_comes_before_each_other_in_an_order():
    assert {first for first, *_ in ORDERS} == {*BRINGS}
    pairs = {pair for order in ORDERS for pair in itertools.combinations(order, 2)}
    assert pairs == set(itertools.permutations(BACKENDS, 2))


def first(backend):
    """Return code that imports a backend, after the core, and looks at what came along."""
    brings = BRINGS[backend]
    # TensorFlow Lite's converter imports it, where it finds it.
    may = brings | ({"jax"} if backend == "tf" else set())
    return f"""
import doconv_core, sys
assert not {FRAMEWORKS} & sys.modules.keys()
import doconv_{backend}
assert {brings} <= {FRAMEWORKS} & sys.modules.keys() <= {may}, sys.modules.keys()
"""


@pytest.mark.exhaustive  # test_floors reads which frameworks are imported
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_the_first_brings_no_other_and_they_get_on_in_every_order(order):
    for backend in order:
        need(backend)
    code = first(order[0])
    code += "".join(STEPS[name] + (GLUONCV if name == "mx" else "") for name in order)
    printed = "".join(fresh("-c", code).stdout.split())
    expected = {"torch": "(1,6,3,3)", "tf": "(1,3,3,6)", "mx": "(1,6,3,3)"}
    assert printed == "".join(backend + expected[backend] for backend in order)


@pytest.mark.exhaustive
def test_mxnets_and_gluoncvs_imports_raise_no_warning():
    need("mx")
    code = "import doconv_mx; print(doconv_mx.import_gluoncv().__name__)"
    assert fresh("-W", "error", "-c", code).stdout.split() == ["gluoncv"]


def test_numpy_has_the_name_that_mxnet_takes():
    mxnet = imported("mx")
    import doconv_mx

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.bool is np.bool_
    assert doconv_mx.frameworks.import_mxnet() is mxnet

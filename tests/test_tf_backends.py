"""Keras' other backends: each runs the whole contract and Keras' own tests, in a fresh process."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from contract import CASES
from frameworks import fresh, need

TESTS = Path(__file__).parent
BACKENDS = ["tensorflow", "jax", "torch"]
FILES = [
    "test_contract.py",
    "test_tf.py",
    "test_tf_models.py",
    "test_tf_state.py",
    "test_contract_dgc.py",
    "test_tf_dgc.py",
]


def run(backend, *arguments):
    """Run Python with Keras on `backend`, and return the finished process."""
    environment = {"KERAS_BACKEND": backend, "PYTEST_ADDOPTS": ""}
    if backend == "jax":
        # Most of JAX's time goes into optimizing operations that run once; without, it is half.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", flags)
    return fresh(*arguments, environment=environment, cwd=TESTS.parent)


def need_backend(backend):
    need("tf")
    if find_spec(backend) is None:
        message = f"Keras cannot run on {backend}, which is not installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_contract_and_layer_tests_pass(backend):
    need_backend(backend)
    files = [str(TESTS / name) for name in FILES]
    # JAX compiles each operation of each size: a twelfth of the cases takes long enough, and
    # with PyTorch a half.
    every = {"jax": 12, "torch": 2}[backend]
    chosen = ["-k", "tf and not saved_model", "--every", str(every)]
    done = run(backend, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *chosen, *files)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1]) > 2 * len(CASES) // every
    assert "skipped" not in done.stdout


LOAD = """
import sys, doconv_tf, keras, numpy
results = numpy.load(f"{sys.argv[1]}/results.npz")
model = keras.saving.load_model(f"{sys.argv[1]}/model.keras")
y = keras.ops.convert_to_numpy(model(results["x"]))
assert abs(y - results["y"]).max() <= 1e-5 * abs(results["y"]).max(), abs(y - results["y"]).max()
print(keras.backend.backend())
"""


@pytest.mark.exhaustive
def test_a_model_stored_on_one_backend_loads_on_the_others(tmp_path, keras):
    import doconv_tf

    for backend in BACKENDS:
        need_backend(backend)
    assert keras.backend.backend() == BACKENDS[0]
    keras.utils.set_random_seed(0)
    several = {"groups": 2, "depth_multiplier": 12, "depthwise_initializer": "normal"}
    twice = {"depth_multiplier": 2, "d_initializer": "normal"}
    layers = [doconv_tf.DOConv2D(6, 3, **several), doconv_tf.DODepthwiseConv2D(3, **twice)]
    model = keras.Sequential([keras.Input((7, 8, 4)), *layers])
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).standard_normal((2, 7, 8, 4)).astype("float32")
    np.savez(tmp_path / "results.npz", x=x, y=keras.ops.convert_to_numpy(model(x)))
    for backend in BACKENDS[1:]:
        loaded = run(backend, "-c", LOAD, tmp_path)
        assert loaded.stdout.split() == [backend]


WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
try:
    import doconv_tf
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_backend_is_named_with_what_to_install(backend):
    need("tf")
    told = run(backend, "-c", WITHOUT.format(missing=backend)).stdout
    assert f"Keras needs {backend}, which is not installed" in told
    assert 'python -m pip install "overconv[tf]"' in told

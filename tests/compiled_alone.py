"""Tries the compiled composition of the package that is installed, without PyTorch.

For wheels, which are built and tried in environments that have no framework: it is loaded beside
its package, which would import PyTorch. `python tests/compiled_alone.py` prints where it is.
"""

from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

import numpy as np

from doconv_core import ConvSpec, compose, difference

SPEC = ConvSpec(12, 10, (3, 3), groups=2)


def loaded():
    """Return the compiled module; ModuleNotFoundError where it is not there."""
    place = find_spec("doconv_torch").submodule_search_locations
    found = PathFinder.find_spec("doconv_torch._composition", place)
    if found is None:
        raise ModuleNotFoundError(f"there is no compiled composition in {', '.join(place)}")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def check():
    """Return the compiled module's file, having seen that its kernel is the core's."""
    random, module = np.random.default_rng(0), loaded()
    weight = random.standard_normal(SPEC.weight_shape, np.float32)
    depthwise = random.standard_normal(SPEC.depthwise_shape, np.float32)
    kernel = np.zeros_like(weight)
    addresses = (a.ctypes.data for a in (weight, depthwise, kernel))
    module.compose(0, *addresses, 0, 5, 6, 9, 2, 2)  # channels of a group, taps, groups, threads
    expected = compose(weight.astype(float), depthwise.astype(float), SPEC)
    assert difference(kernel.reshape(expected.shape), expected).relative < 1e-6
    return module.__file__


if __name__ == "__main__":
    print(check())

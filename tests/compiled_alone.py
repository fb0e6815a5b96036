"""Tries what is compiled of the package that is installed, without PyTorch.

For wheels, which are built and tried in environments that have no framework: it is loaded beside
its package, which would import PyTorch. `python tests/compiled_alone.py` prints where it is.
"""

from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

import numpy as np

from doconv_core import ConvSpec, compose, difference
from doconv_core.kinds.dgc import DGConvSpec, dynamic_heads

SPEC = ConvSpec(12, 10, (3, 3), groups=2)
HEADS = DGConvSpec(24, 36, (3, 3), 3)


def loaded(name):
    """Return a compiled module; ModuleNotFoundError where it is not there."""
    place = find_spec("doconv_torch").submodule_search_locations
    found = PathFinder.find_spec(f"doconv_torch.{name}", place)
    if found is None:
        raise ModuleNotFoundError(f"there is no compiled {name} in {', '.join(place)}")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def addresses(*arrays):
    return tuple(array.ctypes.data for array in arrays)


def check_composition():
    """Return the compiled module's file, having seen that its kernel is the core's."""
    random, module = np.random.default_rng(0), loaded("_composition")
    weight = random.standard_normal(SPEC.weight_shape, np.float32)
    depthwise = random.standard_normal(SPEC.depthwise_shape, np.float32)
    kernel = np.zeros_like(weight)
    # Channels of a group, taps, groups, threads.
    module.compose(0, *addresses(weight, depthwise, kernel), 0, 5, 6, 9, 2, 2)
    expected = compose(weight.astype(float), depthwise.astype(float), SPEC)
    assert difference(kernel.reshape(expected.shape), expected).relative < 1e-6
    return module.__file__


def check_skipping():
    """Return the compiled module's file, having seen that its output is the core's."""
    random, module = np.random.default_rng(0), loaded("_skipping")
    arrays = {n: random.standard_normal(s, np.float32) for n, s in HEADS.shapes.items()}
    arrays["inactive"] = np.float32(18)
    x = random.standard_normal((2, 24, 7, 9), np.float32)
    mean, variance = random.standard_normal(24, np.float32), random.random(24, np.float32)
    z = np.maximum((x - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5), 0)
    expected = dynamic_heads(z, arrays, HEADS, stride=2, padding=1).output
    y, kernel = np.zeros(expected.shape, "f4"), arrays["weight"].transpose(1, 2, 0).copy()
    selectors = (arrays[f"{n}"] for n in ("squeeze_weight", "saliency_weight", "saliency_bias"))
    given = addresses(x), addresses(mean, variance, kernel, *selectors, y)
    sizes = (12, 3, HEADS.squeezed, 18), (3, 3), (2, 2), (1, 1), (1, 1)
    module.skip((*given[0], 0, 0, *given[1]), 1e-5, x.shape, *sizes, 2)
    assert difference(y, expected).relative < 1e-5
    return module.__file__


CHECKS = (check_composition, check_skipping)

if __name__ == "__main__":
    for check in CHECKS:
        print(check())

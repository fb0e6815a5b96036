"""Arrays that somebody has loaded already, of whatever framework, as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import (
    AVERAGED,
    BFLOAT16,
    CheckpointError,
    Entry,
    KernelSizes,
    shown,
    without_wrappers,
)
from doconv_core.files.layers import find_layers
from doconv_core.files.shapes import Sizes
from doconv_core.files.state_dicts import MAX_DEPTH, StateDicts

Array = NDArray[Any]

NUMBERS = "biufc"  # what kinds of dtype a weight may have
PATH = Path("(in memory)")


class InMemory(Checkpoint):
    """Arrays by name, as a checkpoint that is only read.

    content: a state dict, or what holds one, as training writes it; of several the first that is no
    average. Raises CheckpointError where there is none, and for what is no array of numbers.
    """

    def __init__(
        self, content: Mapping[str, Any], framework: str, kernel_sizes: KernelSizes
    ) -> None:
        self.path, self.format = PATH, "arrays"
        self._values = {
            name: _values(name, value)
            for name, value in _main_state(content).items()
            if isinstance(name, str) and _is_array(value)
        }
        self.entries = {
            name: Entry(name, values.array.shape, values.dtype)
            for name, values in self._values.items()
        }
        sizes = Sizes(kernel_sizes)
        keys = without_wrappers([*self.entries])
        self.layers = find_layers(self.entries, keys, sizes, separators="._/", framework=framework)
        sizes.check_used()

    def read(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read` says."""
        return self._values[name].array

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Refuse: there is no file of which another could be made."""
        raise NotImplementedError("arrays in memory are only read")

    def close(self) -> None:
        """Do nothing: the arrays are the caller's."""


class _Values(NamedTuple):
    """An array to compute with. dtype: of the values that were given."""

    array: Array
    dtype: str


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_array(value: Any) -> bool:
    """Return whether `value` is an array or a tensor, or a list of numbers or of such lists."""
    if isinstance(value, (list, tuple)):
        return bool(value) and (isinstance(value[0], (int, float)) or _is_array(value[0]))
    return _is_tensor(value)


def _main_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = StateDicts(content, _is_tensor).found
    models = [path for path in found if not AVERAGED.search(path.lower())]
    for path in models or found:
        state: Mapping[str, Any] = found[path]
        return state
    if any(_is_array(value) for value in content.values()):
        return content
    keys = ", ".join(shown(str(key)) for key in list(content)[:3]) or "none"
    raise CheckpointError(
        f"{PATH} holds no state dict: give a dict of arrays by name, or one in at most {MAX_DEPTH} "
        f"others; received the keys {keys}."
    )


def _values(name: str, value: Any) -> _Values:
    try:
        found = _as_numpy(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _no_array(name, value) from error
    if found.array.dtype.kind not in NUMBERS:
        raise _no_array(name, value)
    return found


def _as_numpy(value: Any) -> _Values:
    if hasattr(value, "asnumpy"):  # of MXNet
        value = value.asnumpy()
    elif hasattr(value, "detach"):  # of PyTorch; it may be on a device, and require grad
        value = value.detach().cpu()
        if str(value.dtype) == f"torch.{BFLOAT16}":
            return _Values(value.float().numpy(), BFLOAT16)
    array = np.asarray(value)
    if array.dtype.name == BFLOAT16:  # of ml_dtypes, as TensorFlow and JAX give it
        return _Values(array.astype(np.float32), BFLOAT16)
    return _Values(array, array.dtype.name)


def _no_array(name: str, value: Any) -> CheckpointError:
    dtype = getattr(value, "dtype", "")
    described = f"{type(value).__name__} {dtype}".strip()
    return CheckpointError(
        f"{PATH}: entry {shown(name)} is no array of numbers: received a {described}; give it as a "
        "NumPy array, or leave it out."
    )

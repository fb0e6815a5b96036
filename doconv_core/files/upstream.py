"""The reference implementations' checkpoints: carried over where that is exact, else folded.

DO-Conv's is yangyanli/DO-Conv, whose three frameworks have three layouts; `docs/checkpoints.md` has
them in a table. That of dynamic group convolutions is in PyTorch alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.files.checkpoint import Checkpoint, open_checkpoint
from doconv_core.files.dynamic import NAMES
from doconv_core.files.dynamic_state import state_of
from doconv_core.files.entries import (
    AVERAGED,
    BFLOAT16,
    CheckpointError,
    Entry,
    KernelSizes,
    shown,
    without_wrappers,
)
from doconv_core.files.folding import check_heads
from doconv_core.files.layers import DYNAMIC, D, Layer, Sizes, find_layers
from doconv_core.files.pytorch import MAX_DEPTH, StateDicts
from doconv_core.files.reference import FRAMEWORKS, ORIGIN, canonical_upstream, compose_upstream
from doconv_core.kinds.dgc import GATE_FACTOR, SQUEEZE_RATE
from doconv_core.kinds.do_conv import from_kernel
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.numeric import Array
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.file import State, entry
from doconv_core.state.layers import LayerForm

__all__ = ["FRAMEWORKS", "Upstream", "canonical_upstream", "compose_upstream", "read_upstream"]


class Upstream(NamedTuple):
    """A checkpoint of a reference implementation, in this package's terms.

    entries: every array of the model under its name here: of the reference's layers `weight`,
    `depthwise_weight` and `bias`, in the shapes that a DO-Conv layer's parameters have; the others
    as they were. state: the over-parameterized layers alone, canonical, each as it was trained or,
    where it is in `folded`, as an ordinary convolution; a DO-Conv layer takes either. carried: the
    paths of the layers whose W and D are as they were trained. folded: by path, why a layer's
    kernel alone could be kept; in `entries` its W is that kernel, and its D is zero.
    Of dynamic group convolutions, `entries` has the arrays of all heads as those of `….heads`,
    `carried` these paths, and `state` every layer of a kind that the source's networks have.

    >>> arrays = {"conv.W": np.ones((4, 3, 9)), "conv.D": np.zeros((3, 9, 9))}
    >>> read_upstream(arrays).carried
    ('conv',)
    """

    entries: Mapping[str, Array]
    state: State
    carried: tuple[str, ...]
    folded: Mapping[str, str]


def read_upstream(
    source: str | os.PathLike[str] | Mapping[str, ArrayLike],
    framework: str | None = None,
    *,
    kernel_sizes: KernelSizes | None = None,
    squeeze_rate: int = SQUEEZE_RATE,
    gate_factor: float = GATE_FACTOR,
) -> Upstream:
    """Return what a checkpoint of a reference implementation holds.

    source: a file of any format that `open_checkpoint` reads, of which the main copy of the model
    is read, or arrays by name: a state dict, also one in dicts as training writes them; tensors of
    any framework will do. framework: "PyTorch", "TensorFlow" or "Gluon", or None for what the
    names, shapes and format tell. kernel_sizes: as in `open_checkpoint`; a square number of taps is
    taken to be a square kernel. squeeze_rate, gate_factor: of dynamic group convolutions, whose
    files do not tell them.
    Raises CheckpointError where there is no layer of a reference implementation, a kernel size is
    not known or those options cannot be the network's, ValueError for another framework, and what
    `open_checkpoint` raises.

    >>> arrays = {"conv.W": np.ones((4, 3, 9)), "conv.D": np.zeros((3, 9, 9))}
    >>> list(read_upstream(arrays, "PyTorch").entries)
    ['conv.weight', 'conv.depthwise_weight']
    """
    if framework not in (None, *FRAMEWORKS):
        raise ValueError(
            f"framework must be one of {', '.join(FRAMEWORKS)}, or None; received {framework!r}."
        )
    with _opened(source, framework, kernel_sizes) as checkpoint:
        part = checkpoint.parts[0] if checkpoint.parts else ""
        layers = [layer for layer in checkpoint.layers if layer.part == part]
        check_heads(checkpoint.path, layers)
        if not any(layer.origin.startswith(ORIGIN) for layer in layers):
            raise CheckpointError(
                f"{checkpoint.path} has no layer of the reference implementation: no W (or weight) "
                "and D whose shapes agree, and no heads of dynamic group convolutions."
            )
        found = _converted(checkpoint, layers)
        heads = tuple(layer.path for layer in layers if layer.kind == DYNAMIC)
        if not heads:
            return found
        state = state_of(checkpoint, layers, squeeze_rate, gate_factor)
        return found._replace(state=state, carried=heads)


@contextmanager
def _opened(
    source: str | os.PathLike[str] | Mapping[str, ArrayLike],
    framework: str | None,
    kernel_sizes: KernelSizes | None,
) -> Iterator[Checkpoint]:
    sizes = kernel_sizes or {}
    if isinstance(source, Mapping):
        yield InMemory(source, framework or "", sizes)
        return
    if framework is None:
        with open_checkpoint(source, kernel_sizes=sizes) as checkpoint:
            yield checkpoint
        return
    with open_checkpoint(source) as checkpoint:
        part = checkpoint.parts[0] if checkpoint.parts else ""
        arrays = {
            key: checkpoint.read(name)
            for layer in checkpoint.layers
            if layer.part == part
            for key, name in _own_names(layer).items()
        }
    yield InMemory(arrays, framework, sizes)


def _own_names(layer: Layer) -> dict[str, str]:
    """Return the entries of a layer by its path and what follows that in their names.

    The source's dynamic group convolutions have their heads' entries beside the norm's.
    """
    if layer.kind == DYNAMIC and layer.origin.startswith(ORIGIN):
        below = layer.path.removesuffix("heads")
        return {below + role: name for role, name in layer.entries.items()}
    own = {}
    for name in layer.entries.values():
        end = max(name.rfind(layer.path), 0) + len(layer.path)
        own[entry(layer.path, name[end:].lstrip("./_").split(":")[0])] = name
    return own


def _converted(checkpoint: Checkpoint, layers: list[Layer]) -> Upstream:
    entries: dict[str, Array] = {}
    forms: dict[str, LayerForm] = {}
    arrays: dict[str, Array] = {}
    carried: list[str] = []
    folded: dict[str, str] = {}
    for layer in layers:
        if layer.kind == DYNAMIC:
            entries |= _named(layer.path, {name: checkpoint.heads(layer, name) for name in NAMES})
            continue
        if not layer.origin.startswith(ORIGIN):
            entries |= {key: checkpoint.read(name) for key, name in _own_names(layer).items()}
            continue
        bias = layer.entries.get("bias")
        own: dict[str, Any] = {} if bias is None else {"bias": checkpoint.read(bias)}
        if not layer.over_parameterized:
            entries |= _named(layer.path, {"weight": checkpoint.kernel(layer), **own})
            continue
        kernel = checkpoint.kernel(layer)
        assert layer.d_shape is not None  # as the layer has a D
        inputs, taps, multiplier = layer.d_shape
        ordinary = ConvSpec(inputs, kernel.shape[0], kernel.shape[2:], inputs // kernel.shape[1])
        spec = replace(ordinary, depth_multiplier=max(multiplier, taps))
        form = LayerForm(spec, True, bias is not None)
        try:
            weight, depthwise = checkpoint.pair(layer)
        except NotFoldable as error:
            folded[layer.path] = str(error).partition(": ")[2]
            weight, depthwise = from_kernel(kernel, spec)
            form = LayerForm(ordinary, False, bias is not None)
        else:
            carried.append(layer.path)
        kept: dict[str, Any] = {"weight": weight.reshape(spec.parameter_shape), D: depthwise}
        entries |= _named(layer.path, {**kept, **own})
        forms[layer.path] = form
        own |= {"weight": weight, D: depthwise} if form.composed else {"weight": weight[..., :taps]}
        arrays |= _named(layer.path, {name: own[name] for name in form.shapes})
    return Upstream(entries, State(forms, arrays), tuple(carried), folded)


def _named(path: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {entry(path, name): array for name, array in arrays.items()}


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
        given = {
            name: _values(name, value)
            for name, value in _main_state(content).items()
            if isinstance(name, str) and _is_array(value)
        }
        self._arrays = {name: array for name, (array, _) in given.items()}
        self.entries = {n: Entry(n, array.shape, dtype) for n, (array, dtype) in given.items()}
        sizes = Sizes(kernel_sizes)
        keys = without_wrappers([*self.entries])
        self.layers = find_layers(self.entries, keys, sizes, separators="._/", framework=framework)
        sizes.check_used()

    def read(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read` says."""
        return self._arrays[name]

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Refuse: there is no file of which another could be made."""
        raise NotImplementedError("arrays in memory are only read")

    def close(self) -> None:
        """Do nothing: the arrays are the caller's."""


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


def _values(name: str, value: Any) -> tuple[Array, str]:
    """Return an array to compute with, and the dtype of the values that were given."""
    described = f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip()
    problem = CheckpointError(
        f"{PATH}: entry {shown(name)} is no array of numbers: received a {described}; give it as a "
        "NumPy array, or leave it out."
    )
    try:
        if hasattr(value, "asnumpy"):  # of MXNet
            value = value.asnumpy()
        elif hasattr(value, "detach"):  # of PyTorch; it may be on a device, and require grad
            value = value.detach().cpu()
            if str(value.dtype) == f"torch.{BFLOAT16}":
                return value.float().numpy(), BFLOAT16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise problem from error
    if array.dtype.name == BFLOAT16:  # of ml_dtypes, as TensorFlow and JAX give it
        return array.astype(np.float32), BFLOAT16
    if array.dtype.kind not in NUMBERS:
        raise problem
    return array, array.dtype.name

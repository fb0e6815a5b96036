"""The reference implementation's checkpoints: carried over where that is exact, else folded.

It is yangyanli/DO-Conv, whose three frameworks have three layouts; `docs/checkpoints.md` has them
in a table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from numpy.typing import ArrayLike, NDArray

from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import CheckpointError, D, KernelSizes, Layer
from doconv_core.files.formats import open_checkpoint
from doconv_core.files.in_memory import InMemory
from doconv_core.files.reference import FRAMEWORKS, ORIGIN, canonical_upstream, compose_upstream
from doconv_core.kinds.do_conv import from_kernel
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.file import State, entry
from doconv_core.state.layers import LayerForm

__all__ = ["FRAMEWORKS", "Upstream", "canonical_upstream", "compose_upstream", "read_upstream"]

Array = NDArray[Any]


class Upstream(NamedTuple):
    """A checkpoint of the reference implementation, in this package's terms.

    entries: every array of the model under its name here: of the reference's layers `weight`,
    `depthwise_weight` and `bias`, in the shapes that a DO-Conv layer's parameters have; the others
    as they were. state: the over-parameterized layers alone, canonical, each as it was trained or,
    where it is in `folded`, as an ordinary convolution; a DO-Conv layer takes either. carried: the
    paths of the layers whose W and D are as they were trained. folded: by path, why a layer's
    kernel alone could be kept; in `entries` its W is that kernel, and its D is zero.

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
) -> Upstream:
    """Return what a checkpoint of the reference implementation holds.

    source: a file of any format that `open_checkpoint` reads, of which the main copy of the model
    is read, or arrays by name: a state dict, also one in dicts as training writes them; tensors of
    any framework will do. framework: "PyTorch", "TensorFlow" or "Gluon", or None for what the
    names, shapes and format tell. kernel_sizes: as in `open_checkpoint`; a square number of taps is
    taken to be a square kernel.
    Raises CheckpointError where there is no layer of the reference implementation or a kernel size
    is not known, ValueError for another framework, and what `open_checkpoint` raises.

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
        if not any(layer.origin.startswith(ORIGIN) for layer in layers):
            raise CheckpointError(
                f"{checkpoint.path} has no layer of the reference implementation: no W (or weight) "
                "and D whose shapes agree."
            )
        return _converted(checkpoint, layers)


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
            entry(layer.path, key): checkpoint.read(name)
            for layer in checkpoint.layers
            if layer.part == part
            for key, name in _own_names(layer).items()
        }
    yield InMemory(arrays, framework, sizes)


def _own_names(layer: Layer) -> dict[str, str]:
    """Return the entries of a layer by their own names: what follows its path in the file's."""
    own = {}
    for name in layer.entries.values():
        end = max(name.rfind(layer.path), 0) + len(layer.path)
        own[name[end:].lstrip("./_").split(":")[0]] = name
    return own


def _converted(checkpoint: Checkpoint, layers: list[Layer]) -> Upstream:
    entries: dict[str, Array] = {}
    forms: dict[str, LayerForm] = {}
    arrays: dict[str, Array] = {}
    carried: list[str] = []
    folded: dict[str, str] = {}
    for layer in layers:
        if not layer.origin.startswith(ORIGIN):
            for key, name in _own_names(layer).items():
                entries[entry(layer.path, key)] = checkpoint.read(name)
            continue
        bias = layer.entries.get("bias")
        own = {} if bias is None else {"bias": checkpoint.read(bias)}
        if not layer.over_parameterized:
            entries |= _named(layer.path, {"weight": checkpoint.kernel(layer), **own})
            continue
        spec, weight, depthwise, reason = _trained(checkpoint, layer)
        kept = {"weight": weight.reshape(spec.parameter_shape), D: depthwise}
        entries |= _named(layer.path, {**kept, **own})
        if reason:
            folded[layer.path] = reason
            spec = ConvSpec(spec.in_channels, spec.out_channels, spec.kernel_size, spec.groups)
            own = {"weight": weight[..., : spec.taps], **own}
        else:
            carried.append(layer.path)
            own = {"weight": weight, D: depthwise, **own}
        forms[layer.path] = LayerForm(spec, not reason, bias is not None)
        arrays |= _named(layer.path, own)
    return Upstream(entries, State(forms, arrays), tuple(carried), folded)


def _trained(checkpoint: Checkpoint, layer: Layer) -> tuple[ConvSpec, Array, Array, str]:
    """Return a layer's sizes, W and D; and why they are not the trained ones, "" where they are."""
    kernel = checkpoint.kernel(layer)
    taps, inputs = kernel[0, 0].size, _inputs(checkpoint, layer)
    groups = inputs // kernel.shape[1]
    sizes = (inputs, kernel.shape[0], kernel.shape[2:], groups)
    multiplier = checkpoint.entries[layer.entries["weight"]].size // (kernel.size // taps)
    spec = ConvSpec(*sizes, max(multiplier, taps))
    try:
        weight, depthwise = checkpoint.pair(layer)
    except NotFoldable as error:
        reason = str(error).partition(": ")[2]
        weight, depthwise = from_kernel(kernel, spec)
    else:
        reason = ""
    assert depthwise is not None  # as the layer has a D
    return spec, weight, depthwise, reason


def _inputs(checkpoint: Checkpoint, layer: Layer) -> int:
    shape = checkpoint.entries[layer.entries[D]].shape
    return shape[0] if layer.origin == f"{ORIGIN}PyTorch" else shape[-1]


def _named(path: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {entry(path, name): array for name, array in arrays.items()}

"""An open checkpoint file: what every format gives, to be read, composed and folded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from doconv_core.files.entries import (
    BFLOAT16,
    Array,
    CheckpointError,
    D,
    Entry,
    Layer,
    from_storage,
    to_storage,
)
from doconv_core.files.reference import ORIGIN, canonical_upstream, compose_blocks, compose_upstream
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.layout import to_canonical
from doconv_core.state.layers import LayerForm


@dataclass
class Checkpoint(ABC):
    """An open file. Use as a context manager; arrays are read when they are asked for.

    format: what kind of file, in words. module: the format's own, of a file that was opened.
    framework: whose names and layouts it has, "PyTorch", "Keras" or "Gluon", or "doconv state".
    ordered: whether its layers are in the model's order, and not sorted by names. entries: by name,
    in the file's order. layers: in the order of their first entries. others: what else the file
    holds and a fold carries over as it is, such as "optimizer". unfolded: what of it may be a copy
    of the model nonetheless, and why that is not folded. parts: the copies of the model in it, the
    main one first; one is named "". forms: of a canonical state, what it tells of its layers, by
    path; origin: who wrote that. config: of a `.keras` file, the model's; nodes: of that, each
    layer's, by its group. None of another file.

    >>> write_state(State({}, {}), "empty.safetensors")
    >>> with open_checkpoint("empty.safetensors") as checkpoint:
    ...     len(checkpoint.entries), checkpoint.parts
    (0, ())
    """

    path: Path
    format: str = ""
    module: Any = None
    framework: str = ""
    ordered: bool = True
    entries: Mapping[str, Entry] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    others: tuple[str, ...] = ()
    unfolded: tuple[tuple[str, str], ...] = ()
    forms: Mapping[str, LayerForm] | None = None
    origin: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None
    nodes: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The copies of the model that the file holds."""
        return tuple(dict.fromkeys(layer.part for layer in self.layers))

    @abstractmethod
    def read(self, name: str) -> Array:
        """Return an entry's values; bfloat16 and 8-bit floats, which NumPy lacks, as float32.

        Raises KeyError for a name that is not in `entries`.
        """

    def read_stored(self, name: str) -> Array:
        """Return an entry's values as they are stored; bfloat16 as `arrays.BITS`.

        A format that can do so without the values of `read`, which need twice the memory, does.
        """
        is_bfloat16 = self.entries[name].dtype == BFLOAT16
        return to_storage(self.read(name), BFLOAT16) if is_bfloat16 else self.read(name)

    @abstractmethod
    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file with its over-parameterized layers folded. report: after each layer."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def pair(self, layer: Layer) -> tuple[Array, Array | None]:
        """Return a convolution's `(W, D)`, canonical: `(O, I/g, S)`, and `(I, M, S)` or None.

        Of an ordinary convolution W is its kernel, `(O, I/g, *kernel_size)`. Raises NotFoldable for
        a reference layer that composes as no canonical pair does; its `kernel` is there still.
        """
        weight = to_canonical(self.read(layer.entries["weight"]), layer.layout)
        if not layer.over_parameterized:
            if layer.kernel_shape is not None:
                weight = weight.reshape(layer.kernel_shape)
            return weight, None
        depthwise = self.read(layer.entries[D])
        if not layer.origin.startswith(ORIGIN):
            return weight.reshape(*weight.shape[:2], -1), depthwise
        name = layer.entries.get("identity")
        identity = None if name is None else self.read(name)
        try:
            framework = layer.origin.removeprefix(ORIGIN)
            return canonical_upstream(framework, weight, depthwise, identity)
        except NotFoldable as error:
            raise NotFoldable(f"layer {layer.name!r}: {error}") from None

    def kernel(self, layer: Layer, *, as_stored: bool = False) -> Array:
        """Return the kernel that a convolution convolves with, `(O, I/g, *kernel_size)`.

        Composed where the layer is over-parameterized, by the reference implementation's own
        arithmetic where it is one of its layers. Of a linear layer: `(out, in)`. In the dtype of
        `read`; as_stored: one of bfloat16 as `read_stored` has it, rounded once. Raises
        CheckpointError where the kernel size is not known.
        """
        if layer.kernel_shape is None:
            problem = layer.note or f"its kind, {layer.kind}, has no kernel"
            raise CheckpointError(f"{self.path}: layer {layer.name!r}: {problem}.")
        weight = to_canonical(self.read_stored(layer.entries["weight"]), layer.layout)
        if layer.over_parameterized:
            with np.errstate(all="ignore"):  # what overflows is in the result
                weight = self._composed(layer, weight, as_stored)
        elif not as_stored:
            weight = from_storage(weight)
        return weight.reshape(layer.kernel_shape)

    def _composed(self, layer: Layer, weight: Array, as_stored: bool) -> Array:
        """Return the kernel of a canonical W, as it is stored, with the layer's other weights."""
        kind = layer.composition
        if kind is not DO_CONV:
            shapes = kind.entries(layer.spec)
            weights = {r: self.read(layer.entries[r]) for r in kind.names[1:] if r in shapes}
            weights["weight"] = from_storage(weight).reshape(shapes["weight"])
            kernel = kind.compose(weights, layer.spec)
            stored = self.entries[layer.entries["weight"]].dtype
            return to_storage(kernel, stored) if as_stored else kernel
        depthwise = self.read_stored(layer.entries[D])
        if not layer.origin.startswith(ORIGIN):
            weight = weight.reshape(*weight.shape[:2], -1)
            return compose_blocks(weight, depthwise, as_stored=as_stored)
        name = layer.entries.get("identity")
        identity = None if name is None else self.read_stored(name)
        framework = layer.origin.removeprefix(ORIGIN)
        return compose_upstream(framework, weight, depthwise, identity, as_stored=as_stored)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

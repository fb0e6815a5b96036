"""Checkpoint files: opened by their format, composed and folded.

A format is one module, which the entry-point group `doconv.formats` names, and which has what
`Format` says; a file is of the format whose `sniff` knows its first bytes. No list of them stands
here.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

import numpy as np

from doconv_core.atomic import GROUP, check_absent, check_suffix, registered, replacing
from doconv_core.files import dynamic
from doconv_core.files.blocks import Block, EpsilonError
from doconv_core.files.branched import FAMILIES, with_blocks
from doconv_core.files.entries import (
    BFLOAT16,
    KERAS,
    PYTORCH,
    Allowed,
    AllowError,
    Array,
    CheckpointError,
    Entry,
    KernelSizes,
    Progress,
    compose_blocks,
    from_storage,
    opened,
    to_storage,
)
from doconv_core.files.folding import outputs, report_on
from doconv_core.files.foreign import foreign_archive, foreign_file
from doconv_core.files.layers import (
    IDENTITY,
    D,
    KernelSizeError,
    Layer,
    Sizes,
)
from doconv_core.files.paths import check_ordinary
from doconv_core.files.reference import ORIGIN, canonical_upstream, compose_upstream
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import Report
from doconv_core.state.layers import BatchNormSpec, LayerForm

UNTRAINED = {
    "running_mean", "running_var", "num_batches_tracked", IDENTITY, dynamic.INACTIVE,
    dynamic.COUNTER,
}  # fmt: skip


@dataclass
class Checkpoint(ABC):
    """An open file. Use as a context manager; arrays are read when they are asked for.

    format: what kind of file, in words. module: the format's own, of a file that was opened.
    framework: whose names and layouts it has, "PyTorch", "Keras" or "Gluon", or "doconv state".
    ordered: whether its layers are in the model's order; disorder: how they are otherwise.
    entries: by name, in the file's order. layers: in the order of their first entries. others: what
    else the file holds and a fold carries over as it is, such as "optimizer". unfolded: what of it
    may be a copy of the model nonetheless, and why that is not folded. parts: the copies of the
    model in it, the main one first; one is named "". forms: of a canonical state, what it tells of
    its layers, by path; origin: who wrote that. config: of a `.keras` file, the model's; nodes: of
    that, each layer's, by its group. epsilon: of the batch norms in blocks of which the file does
    not tell it; None for the usual one. None of another file.

    >>> write_state(State({}, {}), "empty.safetensors")
    >>> with open_checkpoint("empty.safetensors") as checkpoint:
    ...     len(checkpoint.entries), checkpoint.parts
    (0, ())
    """

    disorder: ClassVar[str] = "has its layers in the order of their names, not of the model"

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
    epsilon: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The copies of the model that the file holds."""
        return tuple(dict.fromkeys(layer.part for layer in self.layers))

    @property
    def in_order(self) -> tuple[Layer, ...]:
        """The layers in the model's order, as far as that is told."""
        return self.layers

    def with_blocks(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Return layers with those of each block of branches as one.

        This package's are told everywhere, those of others in PyTorch's files.
        """
        told: dict[str, Any] = {"epsilons": self.epsilons}
        if self.epsilon is not None or self.framework == KERAS:  # where networks have several
            told["epsilon"] = self.epsilon
        families = FAMILIES if self.framework == PYTORCH else ()
        found = with_blocks(layers, self.entries, families, self.forms or {})
        return tuple(replace(x, **told) if isinstance(x, Block) else x for x in found)

    @property
    def epsilons(self) -> Mapping[str, float]:
        """What the file tells of the epsilons of batch norms, by their paths."""
        forms = (self.forms or {}).items()
        return {path: x.spec.epsilon for path, x in forms if isinstance(x.spec, BatchNormSpec)}

    @property
    def needs_epsilon(self) -> bool:
        """Whether a block has batch norms of which the file does not tell the epsilon."""
        return any(isinstance(x, Block) and x.is_untold for x in self.with_blocks(self.layers))

    def use_epsilon(self, epsilon: float) -> None:
        """Take this for batch norms in blocks of which the file does not tell it.

        Raises EpsilonError where that is no number above 0, or there are no such batch norms.
        """
        if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
            raise EpsilonError(f"epsilon must be a number above 0; received epsilon={epsilon!r}.")
        if not self.needs_epsilon:
            raise EpsilonError(
                f"{self.path} has no block of branches whose epsilon it does not tell; received "
                f"epsilon={epsilon!r}."
            )
        self.epsilon = epsilon

    def group(self, layer: Layer) -> str:
        """Return the group by which `nodes` has a layer's config."""
        raise LookupError(f"{self.path} has no groups.")  # nor has it `nodes`

    def parameters(self, layer: Layer) -> int:
        """Return how many numbers of the layer are trained; not statistics and the identity."""
        own = ((role.rpartition(".")[2], name) for role, name in layer.entries.items())
        return sum(self.entries[name].size for role, name in own if role not in UNTRAINED)

    def folded_parameters(self, layer: Layer) -> int | None:
        """Return how many of its parameters remain when it is folded; None where M is not known."""
        if isinstance(layer, Block):
            return sum(map(prod, layer.shapes)) if layer.folded else None
        if not layer.over_parameterized or layer.kernel_shape is None:
            return None if layer.over_parameterized else self.parameters(layer)
        gone = {"weight", *layer.gone} - UNTRAINED
        composed = sum(self.entries[layer.entries[role]].size for role in gone)
        return self.parameters(layer) - composed + prod(layer.kernel_shape)

    def read(self, name: str) -> Array:
        """Return an entry's values; bfloat16 and 8-bit floats, which NumPy lacks, as float32.

        A format gives this or `read_stored`. Raises KeyError for a name that is not in `entries`.
        """
        return from_storage(self.read_stored(name))

    def read_stored(self, name: str) -> Array:
        """Return an entry's values as they are stored; bfloat16 as `entries.BITS`.

        A format that can do so without the values of `read`, which need twice the memory, does.
        """
        is_bfloat16 = self.entries[name].dtype == BFLOAT16
        return to_storage(self.read(name), BFLOAT16) if is_bfloat16 else self.read(name)

    @property
    def beside(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a file that is written like this one has of it beside the model, and what not."""
        return self.others, ()

    @abstractmethod
    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file with its over-parameterized layers folded. report: after each layer."""

    def fold(
        self,
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """Write the file, folded, to `target`: see `fold_checkpoint`."""
        if self.module is not None:
            check_suffix(target, self.module.NAME, self.module.SUFFIXES)
        report = report_on(self)
        done, total = 0, sum(output.layer is not None for output in outputs(self))

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        if progress is not None:
            progress(0, total)
        with replacing(target, overwrite=overwrite) as temporary:
            self.write_folded(temporary, count)
        return report

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def pair(self, layer: Layer) -> tuple[Array, Array | None]:
        """Return a convolution's `(W, D)`, canonical: `(O, I/g, S)`, and `(I, M, S)` or None.

        Of an ordinary convolution W is its kernel, `(O, I/g, *kernel_size)`. Raises NotFoldable for
        a reference layer that composes as no canonical pair does; its `kernel` is there still.
        """
        weight = layer.canonical(self.read(layer.entries["weight"]))
        if not layer.over_parameterized:
            if layer.kernel_shape is not None:
                weight = weight.reshape(layer.kernel_shape)
            return weight, None
        depthwise = self.read(layer.entries[D])
        if not layer.origin.startswith(ORIGIN):
            return weight.reshape(*weight.shape[:2], -1), depthwise
        name = layer.entries.get(IDENTITY)
        identity = None if name is None else self.read(name)
        try:
            framework = layer.origin.removeprefix(ORIGIN)
            return canonical_upstream(framework, weight, depthwise, identity)
        except NotFoldable as error:
            raise NotFoldable(f"layer {layer.name!r}: {error}") from None

    def heads(self, layer: Layer, name: str) -> Array:
        """Return one of the arrays of a dynamic group convolution's heads, canonical.

        name: in a state; the weight is `(O, C, *kernel_size)`. Bfloat16 is float32, as of `read`.
        """
        array = dynamic.read_heads(name, layer.entries, self.read)
        assert layer.kernel_shape is not None  # as of all heads
        return layer.canonical(array).reshape(layer.kernel_shape) if name == "weight" else array

    def kernel(self, layer: Layer, *, as_stored: bool = False, exact: bool = False) -> Array:
        """Return the kernel that a convolution convolves with, `(O, I/g, *kernel_size)`.

        Composed where the layer is over-parameterized, by the reference implementation's own
        arithmetic where it is one of its layers. Of a linear layer: `(out, in)`. In the dtype of
        `read`; as_stored: one of bfloat16 as `read_stored` has it, rounded once; exact: computed in
        float64, and left so. Raises CheckpointError where the kernel size is not known.
        """
        if layer.kernel_shape is None:
            problem = layer.note or f"its kind, {layer.kind}, has no kernel"
            raise CheckpointError(f"{self.path}: layer {layer.name!r}: {problem}.")
        weight = layer.canonical(self.read_stored(layer.entries["weight"]))
        weight = from_storage(weight).astype(np.float64) if exact else weight
        if layer.over_parameterized:
            with np.errstate(all="ignore"):  # what overflows is in the result
                weight = self._composed(layer, weight, as_stored)
        elif not as_stored:
            weight = from_storage(weight)
        return weight.reshape(layer.kernel_shape)

    def added_up(self, block: Block) -> tuple[Array, Array]:
        """Return the kernel and the bias that a block of branches adds up to, in float64."""
        with np.errstate(all="ignore"):  # what overflows is in the result
            return block.added_up(self.read, partial(self.kernel, exact=True))

    def _composed(self, layer: Layer, weight: Array, as_stored: bool) -> Array:
        """Return the kernel of a canonical W, as it is stored, with the layer's other weights."""
        kind = layer.composed or DO_CONV
        if kind is not DO_CONV:
            shapes = kind.entries(layer.spec)
            weights = {r: self.read(layer.entries[r]) for r in kind.names[1:] if r in shapes}
            weights["weight"] = from_storage(weight).reshape(shapes["weight"])
            if weight.dtype == np.float64:  # of all that it is composed with
                weights = {role: array.astype(np.float64) for role, array in weights.items()}
            kernel = kind.compose(weights, layer.spec)
            stored = self.entries[layer.entries["weight"]].dtype
            return to_storage(kernel, stored) if as_stored else kernel
        depthwise = self.read_stored(layer.entries[D])
        if not layer.origin.startswith(ORIGIN):
            weight = weight.reshape(*weight.shape[:2], -1)
            return compose_blocks(weight, depthwise, as_stored=as_stored)
        name = layer.entries.get(IDENTITY)
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


LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class Beginning:
    """What tells a file's format. head: its first bytes, at most 64 KiB."""

    path: Path
    head: bytes

    @cached_property
    def members(self) -> frozenset[str]:
        """The names in a zip archive; none in another file. CheckpointError for a damaged one."""
        if self.head[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
            return frozenset()
        with opened(self.path) as archive:
            return frozenset(archive.namelist())


class Format(Protocol):
    """What a format's module has.

    NAME: in words. SUFFIXES: by which a file to be written is told to be of it, and one to be read
    is tried first. FRAMEWORK: whose names and layouts its files have. TYPES: of the arrays that it
    can write.
    """

    NAME: str
    SUFFIXES: tuple[str, ...]
    FRAMEWORK: str
    TYPES: frozenset[str]

    def sniff(self, begin: Beginning) -> bool:
        """Return whether a file is of this format; nothing in it is believed yet."""

    def read(self, path: Path, kernel_sizes: KernelSizes) -> Checkpoint:
        """Return the open file; CheckpointError, of one line, for one damaged or hostile."""

    def write(
        self,
        path: Path,
        entries: Sequence[Entry],
        arrays: Mapping[str, Array],
        like: Checkpoint | None = None,
    ) -> None:
        """Write these entries, whose arrays are read in their order, each once.

        like: an open file of the same format whose form the new one is to have. Files beside `path`
        that belong to it are written there, too.
        """


def formats() -> dict[str, Format]:
    """Return the modules of all registered formats, by name. Raises ImportError where one fails."""
    found: dict[str, Format] = registered()
    if not found:
        raise ImportError(
            f"no installed package reads files: the entry-point group {GROUP} is empty; install "
            "doconv with pip."
        )
    return found


def format_of(path: Path) -> Format:
    """Return the format of the file at `path`, by its first bytes; CheckpointError for none."""
    with path.open("rb") as file:
        begin = Beginning(path, file.read(LOOKED_AT))
    if not begin.head:
        raise CheckpointError(f"{path} is empty.")
    name, known = path.name.lower(), list(formats().values())
    for each in sorted(known, key=lambda each: not name.endswith(each.SUFFIXES)):
        if each.sniff(begin):
            return each
    suffixes = tuple(suffix for each in known for suffix in each.SUFFIXES)
    what = foreign_archive(name, begin.members, suffixes) or foreign_file(path.name, begin.head)
    if what:
        raise CheckpointError(f"{path} is {what}.")
    if begin.members:
        raise CheckpointError(
            f"{path} is a zip archive, but neither a PyTorch nor a Keras file: it has no data.pkl "
            "and no config.json."
        )
    *most, last = [f"{each.NAME} ({', '.join(each.SUFFIXES)})" for each in known]
    raise CheckpointError(
        f"{path} is no checkpoint that is known here; {', '.join(most)} and {last} files are. A "
        "truncated file may look so."
    )


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    kernel_sizes: KernelSizes | None = None,
    allow: Allowed = (),
    epsilon: float | None = None,
) -> Checkpoint:
    """Return the checkpoint at `path`, open.

    kernel_sizes: for layers whose kernel size is not in the file, by glob pattern on `Layer.name`
    or `Layer.path`; the first that matches counts. allow: classes, or their names such as
    "package.module.Class", of which a PyTorch file may have objects beside the model; making one
    runs code of that class. Files of other formats have none. epsilon: of the batch norms in blocks
    of branches, where the file does not tell it; None for 1e-5, which most have.
    Raises CheckpointError for a file that is damaged, hostile or of no known format, or whose
    format needs a package that is missing; FileNotFoundError, IsADirectoryError; ValueError for a
    pattern that matches no over-parameterized layer, a kernel size that does not fit, a class to
    allow that is none, or an epsilon that is no number above 0 or that no block needs.

    >>> form, weight = LayerForm(LinearSpec(3, 2), bias=False), np.zeros((2, 3))
    >>> write_state(State({"fc": form}, {"fc.weight": weight}), "state.safetensors")
    >>> with open_checkpoint("state.safetensors") as checkpoint:
    ...     checkpoint.read("fc.weight").shape
    (2, 3)
    """
    file = Path(path)
    check_ordinary(file, tuple(suffix for each in formats().values() for suffix in each.SUFFIXES))
    sizes = dict(kernel_sizes or {})
    Sizes(sizes)  # what is wrong with them is no fault of the file's
    module = format_of(file)
    more = {"allow": allow} if allow and getattr(module, "ALLOWS", False) else {}
    try:
        checkpoint: Checkpoint = module.read(file, sizes, **more)
    except (CheckpointError, KernelSizeError, AllowError):
        raise
    except UNREADABLE as error:
        raise CheckpointError(
            f"{file} is damaged: what it tells cannot be ({type(error).__name__}: "
            f"{str(error)[:200].rstrip('.')})."
        ) from error
    checkpoint.module = module
    if epsilon is not None:
        try:
            checkpoint.use_epsilon(epsilon)
        except EpsilonError:
            checkpoint.close()
            raise
    return checkpoint


# What a reader meets where a file contradicts itself as no reader has foreseen.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


def fold_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kernel_sizes: KernelSizes | None = None,
    allow: Allowed = (),
    epsilon: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write to `target` the file at `source` with every over-parameterized layer folded.

    Names, order, metadata and everything that is no over-parameterized layer stay as they are; W's
    entry becomes the ordinary kernel, D's goes. A layer of the reference implementation becomes an
    ordinary one of the framework, and its `W` is named `weight`. A block of branches of a training
    checkpoint, such as RepVGG's, becomes the convolution that the deployed network has; a layer of
    branches of this package's becomes an ordinary one. Returns what was done; a layer's path there
    is its `Layer.name`. `target` is written whole or not at all, and may be `source`.

    kernel_sizes, allow, epsilon: as in `open_checkpoint`. overwrite: whether `target` may exist.
    progress: called with the number of arrays folded and of those to fold.
    Raises FileExistsError; ValueError for a suffix of `target` that says another format;
    NotFoldable, before anything is written, for a layer that cannot be folded exactly or whose
    kernel is not finite; CheckpointError for a block of branches whose entries make none; and what
    `open_checkpoint` raises.

    >>> form = LayerForm(ConvSpec(1, 1, (2,)), "doconv", bias=False)
    >>> arrays = {"conv.weight": np.ones((1, 1, 2)), "conv.depthwise_weight": np.zeros((1, 2, 2))}
    >>> write_state(State({"conv": form}, arrays), "trained.safetensors")
    >>> fold_checkpoint("trained.safetensors", "folded.safetensors").changed[0].path
    'conv'
    """
    check_absent(target, overwrite)
    with open_checkpoint(
        source, kernel_sizes=kernel_sizes, allow=allow, epsilon=epsilon
    ) as checkpoint:
        return checkpoint.fold(target, overwrite=overwrite, progress=progress)

"""Entries by the names of another framework, where the layers of both are named alike.

PyTorch and Gluon, channels first, keep every array in the same order of axes; Keras does not, and
neither does it say by names which array is which, but its files tell of most layers what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doconv_core.cli.checkpoints import literal
from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.flattening import Flattenings, takes_image
from doconv_core.cli.planning import Plan, Planned, weights_of
from doconv_core.cli.recognised import GLUON, NORM, PYTORCH, STATE, TRANSPOSED, weight_of
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import BATCH_NORM, CONVOLUTION, LINEAR, Layer

Array = NDArray[Any]

OF_W = ("weight", "depthwise_weight", "identity")
COUNT = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")
AFFINE = {
    PYTORCH: {"weight": "weight", "bias": "bias"},
    GLUON: {"weight": "gamma", "bias": "beta"},
}
SLOPE = {PYTORCH: "weight", GLUON: "alpha"}  # of a PReLU, as Gluon and a canonical state know it


@dataclass(frozen=True)
class Renaming:
    """How entries are renamed. source, target: the frameworks. fold: whether layers are folded.

    keep, drop: glob patterns on the names of entries that no rule is for: whether to carry them
    over under their names, or leave them out. flattenings: where the two order axes otherwise.
    """

    source: str
    target: str
    fold: bool = False
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    flattenings: Flattenings | None = None

    def plan(self, checkpoint: Checkpoint, layers: Sequence[Layer]) -> Plan:
        """Return what to write. Raises Failure for an entry of which nothing tells what it is."""
        plan, unknown = Plan(), []
        for layer in layers:
            for role, found in self._entries(checkpoint, layer):
                if found is not None:
                    plan.entries.append(found)
                elif self._is_dropped(checkpoint, layer, role):
                    plan.dropped.append(layer.entries[role])
                else:
                    unknown.append(layer.entries[role])
        if unknown:
            raise _no_counterpart(checkpoint, unknown)
        self._check(plan)
        return plan

    def _entries(
        self, checkpoint: Checkpoint, layer: Layer
    ) -> Iterator[tuple[str, Planned | None]]:
        """Yield each role of the layer, and the entry that it becomes, if any."""
        names = self._names(layer)
        for role in layer.entries:
            if matches(layer.entries[role], self.drop):
                yield role, None
            elif layer.kind == CONVOLUTION and role in OF_W:
                if role == "weight":
                    yield from ((role, e) for e in self._weights(checkpoint, layer))
            else:
                yield role, self._copied(checkpoint, layer, role, names.get(role))
        if layer.kind == BATCH_NORM and self.target == GLUON:
            for role, value in (("weight", 1.0), ("bias", 0.0)):
                if role not in layer.entries:  # Gluon's batch norm always has both
                    yield role, self._constant(checkpoint, layer, role, value)

    def _names(self, layer: Layer) -> dict[str, str]:
        """Return the name, within the layer, that each role has in the target, where it is told."""
        if self.source == self.target:
            return {role: own_name(layer, role) for role in layer.entries}
        if layer.kind == BATCH_NORM:
            names = {**AFFINE[self.target], **{name: name for name in STATISTICS}}
            return names if self.target == GLUON else {**names, COUNT: COUNT}
        if layer.kind == NORM:
            return AFFINE[self.target]
        if layer.kind in (CONVOLUTION, LINEAR, TRANSPOSED):
            return {"weight": "weight", "bias": "bias"}
        if [*layer.entries] == ["alpha"] and self.source in (GLUON, STATE):
            return {"alpha": SLOPE[self.target]}
        return {}

    def _weights(self, checkpoint: Checkpoint, layer: Layer) -> Iterator[Planned]:
        weights = weights_of(checkpoint, layer, self.fold)
        dtype = self._dtype(checkpoint, layer.entries["weight"])
        sources = tuple(layer.entries[role] for role in layer.entries if role in OF_W)
        name = self._full_name(layer, "weight")
        yield Planned(name, weights.shape, dtype, weights.weight, sources, weights.how)
        if weights.depthwise is not None:
            name = self._full_name(layer, "depthwise_weight")
            shape = weights.depthwise_shape
            yield Planned(name, shape, dtype, weights.depthwise, sources, weights.how)

    def _copied(
        self, checkpoint: Checkpoint, layer: Layer, role: str, name: str | None
    ) -> Planned | None:
        source = layer.entries[role]
        shape = checkpoint.entries[source].shape
        if layer.kind == LINEAR and role == "bias" and len(shape) != 1:
            name = None  # a layer norm over two axes looks like a linear layer, but for its bias
        if name is None:
            if not matches(source, self.keep):
                return None
            name = own_name(layer, role)
        matrix = role == "weight" and layer.kind in (LINEAR, TRANSPOSED)
        if matrix:
            shape = layer.kernel_shape or shape
        flattenings = self.flattenings if takes_image(layer, role) else None

        def values() -> Array:
            found = weight_of(checkpoint, layer).reshape(shape) if matrix else None
            found = checkpoint.read(source) if found is None else found
            return found if flattenings is None else flattenings.first(layer, found)

        how = "" if flattenings is None else flattenings.how(layer)
        dtype = self._dtype(checkpoint, source)
        return Planned(self._full_name(layer, name), shape, dtype, values, (source,), how)

    def _constant(self, checkpoint: Checkpoint, layer: Layer, role: str, value: float) -> Planned:
        source = layer.entries["running_mean"]
        shape, dtype = checkpoint.entries[source].shape, self._dtype(checkpoint, source)
        name = self._full_name(layer, AFFINE[GLUON][role])
        how = f"{value:g}, as the batch norm has none"
        return Planned(name, shape, dtype, lambda: np.full(shape, value, dtype), how=how)

    def _full_name(self, layer: Layer, name: str) -> str:
        """Return an entry's name in the target; Gluon's older files have their own separator."""
        first = next(iter(layer.entries.values())).removeprefix("arg:").removeprefix("aux:")
        if self.source == self.target == GLUON and first.startswith(f"{layer.path}_"):
            return f"{layer.path}_{name}"
        return f"{layer.path}.{name}" if layer.path else name

    def _dtype(self, checkpoint: Checkpoint, name: str) -> str:
        dtype = checkpoint.entries[name].dtype
        return "float32" if dtype == "bfloat16" and self.target == GLUON else dtype

    def _is_dropped(self, checkpoint: Checkpoint, layer: Layer, role: str) -> bool:
        name = layer.entries[role]
        if role == COUNT and layer.kind == BATCH_NORM:
            return True  # a count takes no part in what the layer computes
        return matches(name, self.drop)

    def _check(self, plan: Plan) -> None:
        seen: dict[str, Planned] = {}
        for entry in plan.entries:
            other = seen.setdefault(entry.name, entry)
            if other is not entry:
                raise Failure(
                    f"the entries {other.sources[0]!r} and {entry.sources[0]!r} would both be "
                    f"named {entry.name!r}.",
                    IMPOSSIBLE,
                )
            if self.target == GLUON and not entry.shape:
                raise Failure(
                    f"the entry {entry.name!r} has no dimension, which Gluon's files lack; --drop "
                    f"'{literal(entry.sources[0])}' leaves it out.",
                    IMPOSSIBLE,
                )


def own_name(layer: Layer, role: str) -> str:
    """Return an entry's name within its layer, as its file has it; the reference's W is renamed."""
    if layer.kind == CONVOLUTION and role == "weight":
        return "weight"
    name = layer.entries[role].removeprefix("arg:").removeprefix("aux:")
    start = name.rfind(layer.path) if layer.path else -1
    ending = name[start + len(layer.path) :] if start >= 0 else name.rpartition(".")[2]
    return ending.lstrip("._/")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches any of these glob patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _no_counterpart(checkpoint: Checkpoint, unknown: list[str]) -> Failure:
    name = unknown[0]
    entry = checkpoint.entries[name]
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return Failure(
        f"{checkpoint.path}: nothing tells what the entry {name!r}, {entry.dtype} {entry.shape},"
        f"{more} would be in the other framework; --keep '{literal(name)}' carries it over under "
        f"its name, --drop '{literal(name)}' leaves it out.",
        IMPOSSIBLE,
    )

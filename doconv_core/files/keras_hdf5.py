"""What Keras' files in HDF5 have in common: arrays read where they are, and copied with changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from doconv_core.files.blocks import Block
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import KERAS, Array, storage_dtype, to_storage
from doconv_core.files.folding import Output, folded_kernel, outputs
from doconv_core.files.hdf5 import Hdf5
from doconv_core.files.keras_layers import branches_of, group_of, is_kept, unknown_class
from doconv_core.files.layers import Layer
from doconv_core.maths.batchnorm import NotFoldable

AVERAGES = (
    "the moving averages that it keeps of the weights stay over-parameterized; "
    "optimizer.finalize_variable_values puts them into the model, which can be folded then"
)
KEPT = "of a {}, {}; fold the model in Python to be rid of it"
WHY = {"DGConv2D": "which chooses its channels for each image"}
FOLDED = ("SkippingDGConv2D",)  # what a fold in Python makes
ORDINARY = "whose parts are ordinary layers already"
EPSILON = 1e-3  # of Keras' batch norms, where a config has no other
ADVICE = "fold the model in Python and save that, or save it as .keras if it is not subclassed"


class KerasHdf5Checkpoint(Checkpoint):
    """An open file of Keras', whose arrays are in HDF5."""

    framework = KERAS
    _file: Hdf5

    @property
    def epsilons(self) -> Mapping[str, float]:
        """What configs of layers of branches tell of the epsilons of their batch norms."""
        configs = ((x.path, branches_of(self.nodes or {}, x)) for x in self.layers)
        told = ((path, config.get("bn_options") or {}) for path, config in configs if config)
        return {path: options.get("epsilon", EPSILON) for path, options in told}

    def group(self, layer: Layer) -> str:
        """Return the group by which `nodes` has a layer's config."""
        return group_of(layer)

    def _note_unfolded(self, training: Any, optimizer: str) -> None:
        """Note what stays as it is. training: the config of that. optimizer: its key there."""
        self.unfolded = tuple(
            (str(node["config"].get("name") or path), KEPT.format(name, WHY.get(name, ORDINARY)))
            for path, node in (self.nodes or {}).items()
            if is_kept(node) and (name := node["class_name"]) not in FOLDED
        )
        for key in (optimizer, "config", "use_ema"):
            training = training.get(key) if isinstance(training, dict) else None
        if training is True and any(layer.over_parameterized for layer in self.layers):
            self.unfolded += tuple((name, AVERAGES) for name in self.others)

    def _check_foldable(self) -> None:
        """Raise NotFoldable for a layer whose config cannot be a folded one's."""
        for path, node in (self.nodes or {}).items():
            for layer in self.layers if is_kept(node) else ():
                if layer.over_parameterized and self.group(layer).startswith(f"{path}/"):
                    raise NotFoldable(
                        f"{self.path}: layer {layer.name!r} is a part of a {node['class_name']}, "
                        "which is not folded in a Keras file; fold the model in Python and save "
                        "that."
                    )
        unknown = unknown_class(self.config)
        if any(unknown):
            raise NotFoldable(
                "{}: layer {!r} is a {} of this package's, which is not known here; a later "
                "version of the package may fold it.".format(self.path, *unknown[::-1])
            )

    def read_stored(self, name: str) -> Array:
        """Return an entry's values, as `Checkpoint.read_stored` says."""
        return self._file.read(name)

    def _write(
        self,
        target: Path,
        report: Callable[[], None],
        names: Mapping[str, str],
        told: Mapping[str, str] = {},  # never changed
    ) -> None:
        """Write the file, folded. names, told: as `Hdf5.copy` has them."""
        planned = outputs(self)
        dropped = set(self.entries) - {output.source for output in planned}
        blocks = [o.layer for o in planned if isinstance(o.layer, Block)]
        gone = {group_of(layer) for block in blocks for layer in block.layers}
        replaced, added = {}, {}
        for output in planned:
            if isinstance(output.layer, Block):
                added[output.name] = output.source, self._kernel(output, report)
            elif output.layer is not None:
                replaced[output.source] = self._kernel(output, report)
        size = sum(
            prod(o.shape) * storage_dtype(self.entries[o.source].dtype).itemsize for o in planned
        )
        self._file.copy(target, names, replaced, dropped, size, told, added, gone)

    def _kernel(self, output: Output, report: Callable[[], None]) -> Callable[[], Array]:
        def kernel() -> Array:
            assert output.layer is not None  # as the caller has checked
            values = folded_kernel(self, output.layer, output.shape)
            report()
            return to_storage(values, self.entries[output.source].dtype)

        return kernel

    def close(self) -> None:
        """Close the file."""
        self._file.close()

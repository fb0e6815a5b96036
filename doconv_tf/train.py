"""Training in Keras: its engine for a run, on one device, several, or machines."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from doconv_core.atomic import replacing
from doconv_core.maths.numeric import Array
from doconv_core.models.report import Converted
from doconv_core.state.file import State
from doconv_core.training import session
from doconv_core.training.engine import Batch, Engine, Step, Sums, Verified, verified
from doconv_core.training.recipe import Recipe
from doconv_core.training.session import Callback, Trained
from doconv_tf.devices import devices_for
from doconv_tf.dgc import DG_CONVS, DynamicHeads2D
from doconv_tf.fitted import Calling, Fitted, Part, blank, divided
from doconv_tf.lent import Lent
from doconv_tf.model import fold
from doconv_tf.ordinary import first_occurrences, require_built
from doconv_tf.private import output_layer
from doconv_tf.state import export_state, load_state

CHECKPOINT, FOLDED = "keras.npz", "folded.weights.h5"
SEED = "seed_generator_state"  # what Keras calls these variables


def train(
    model: keras.Layer,
    recipe: Recipe | str,
    data: Any = "digits",
    *,
    run: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    precision: str = "float32",
    devices: str | int | None = None,
    checkpoint_every: int | None = None,
    workers: int = 0,
    callback: Callback | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    quiet: bool = False,
    jit_compile: bool | str = "auto",
) -> Trained:
    """Train a model by a recipe, in a run that can be killed and gone on with; fold and verify it.

    model: built, from images `(B, H, W, C)` to logits `(B, classes)`, so without a softmax; it is
    trained itself. What it was compiled with is neither used nor changed, and so are its own
    `train_step` and `compute_loss`: optimizer, rates and loss are the recipe's, and so are the
    weights of the orthonormality loss and of the saliencies' lasso, in place of those of its
    layers. What else its layers add to the loss, such as regularizers, counts in training.
    recipe: or its name. data: the name of a data set, such as "cifar100" in `data_dir`; or your
    own, as `doconv_core.training.data.as_data` takes them.
    run: the folder that gets everything; None to write nothing. resume: go on with the run there.
    force: replace the one there. seed: of the batches, and of what layers draw, such as dropout.
    precision: what layers of float32 compute in: "float32", "bfloat16" or "float16", with scaling
    of the loss; weights stay in float32. devices: how many, or names such as "gpu:0,gpu:1", each of
    which has a part of each batch; None for one. A model that was made in the scope of a
    `tf.distribute` strategy is trained by that: of several machines, each with its own process and
    TF_CONFIG, by a `MultiWorkerMirroredStrategy`.
    checkpoint_every: steps; None for each epoch. workers: processes that read images. callback:
    called after each epoch with how many are done, its metrics and the model. notes: what else
    `run.json` is to keep. quiet: print nothing. jit_compile: as in `compile`; "auto" is on a GPU
    alone.
    Raises TypeError, ValueError or `doconv_core.training.run.RunError`, before anything is
    written, for what cannot be, such as another backend of Keras than TensorFlow;
    `doconv_core.training.session.RunEnded` where a run ends early.

    >>> trained = train(get_model("tutorial_tf"), "tutorial_tf", quiet=True)
    >>> len(trained.metrics), trained.verified.relative < 1e-5
    (5, True)
    """
    engines: list[KerasEngine] = []

    def make(recipe: Recipe) -> Engine:
        engine = KerasEngine(
            model, recipe, seed=seed, precision=precision, devices=devices, jit_compile=jit_compile
        )
        engines.append(engine)
        return engine

    try:
        return session.train(
            make, recipe, data, run=run, seed=seed, resume=resume, force=force,
            checkpoint_every=checkpoint_every, workers=workers, callback=callback,
            data_dir=data_dir, notes=notes, quiet=quiet,
        )  # fmt: skip
    finally:
        for engine in engines:
            engine.close()


def evaluate(
    model: keras.Layer,
    recipe: Recipe | str,
    data: Any = "digits",
    *,
    precision: str = "float32",
    devices: str | int | None = None,
    workers: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Return the loss, top-1, top-5, images and seconds of a model on evaluation images.

    The arguments are those of `train`; the recipe says how images are prepared, and how many are
    evaluated at once.

    >>> found = evaluate(get_model("tutorial_tf"), "tutorial_tf")
    >>> found["images"], 0 <= found["top1"] <= found["top5"] <= 1
    (360, True)
    """

    def make(recipe: Recipe) -> Engine:
        return KerasEngine(model, recipe, seed=None, precision=precision, devices=devices)

    return session.evaluate(make, recipe, data, workers=workers, data_dir=data_dir)


class Pending(NamedTuple):
    """What a call came to in each replica, which may still be computed; of how many images."""

    replicas: list[Any]
    total: int
    rows: int


class KerasEngine(Engine):
    """A Keras model with its optimizer, as `doconv_core.training.session` trains it.

    Takes what `train` does; seed: None to let layers draw on. `close` gives the model back: until
    then, its layers compute in the precision, and its variables belong to the devices, of the
    training.
    """

    framework, version, layout = "tf", keras.__version__, "NHWC"

    def __init__(
        self,
        model: keras.Layer,
        recipe: Recipe,
        *,
        seed: int | None = 0,
        precision: str = "float32",
        devices: str | int | None = None,
        jit_compile: bool | str = "auto",
    ) -> None:
        require_built("", model)
        _check_output(model)
        self.devices = devices_for(model, devices)
        self.process, self.processes = self.devices.process, self.devices.processes
        self.model, self.recipe = model, recipe
        self.described = {
            "precision": precision, "devices": self.devices.names, "jit_compile": jit_compile,
            "backend": self.devices.version,
        }  # fmt: skip
        layers = [layer for _, layer in first_occurrences(model)]
        self._heads: Any = [each for each in layers if isinstance(each, DynamicHeads2D)]
        self._seeds = [each for each in model.variables if each.name == SEED]
        self._lent = Lent(model, recipe, self.devices, precision)
        try:
            with self.devices.scope():
                self.fitted = Fitted(model, recipe, self._lent.is_scaled())
                self.fitted.compile(self.fitted.rules, jit_compile=jit_compile)
            for number, state in enumerate(self._seeds if seed is not None else ()):
                state.assign([zlib.crc32(f"{seed} {number}".encode()), 0])
        except BaseException:
            self.close()
            raise
        self._steps: list[list[Pending]] = []
        self._compiled: dict[Any, Any] = {}

    def close(self) -> None:
        """Give the model back as it was, with what was trained."""
        self._lent.back()

    def train_step(self, step: Step, batch: Batch) -> None:
        """Update the weights by one batch, in parts where the recipe accumulates."""
        rules, pending = self.fitted.rules, []
        rules.learning_rate = step.learning_rate
        if self._heads:
            DG_CONVS.set_progress(self._heads, step.progress, lambda e, n: e.inactive.assign(n))
        self.fitted.make_train_function()
        for part in divided(batch, self.devices, self.recipe):
            if rules.parts:
                rules.last.assign(float(part.is_last))
            pending.append(self._call(self.fitted.train_function, part))
        self._steps.append(pending)

    def _call(self, function: Any, part: Part) -> Pending:
        """Let Keras' function of a step take a part, by what is compiled for arrays like these."""
        arrays = keras.tree.flatten(part.pieces)
        key = (function, *((each.shape[1:], each.dtype) for each in arrays))
        if key not in self._compiled:
            self._compiled[key] = self.devices.compiled(function, part.pieces)
        self._compiled[key](*self.devices.placed(part.pieces))
        return Pending(self.devices.of_replicas(self.fitted.sums), part.total, part.rows)

    def taken(self) -> list[Sums]:
        """Return what each step since the last call came to, in this process; waits for them."""
        steps, self._steps = self._steps, []
        return [reduce(Sums.plus, map(_added, step)) for step in steps]

    def evaluate(self, batches: Iterable[Batch]) -> Sums:
        """Return what the model reaches in evaluation mode, averaged if the recipe averages."""
        drawn = (part for batch in batches for part in divided(batch, self.devices))
        found: list[Pending] = []
        held: Any = None
        self.fitted.make_test_function()
        with self._averaged():
            # Those that have no more go on with blank ones, as all of them compute together.
            while self.devices.any((part := next(drawn, None)) is not None):
                held = part or blank(held)
                found.append(self._call(self.fitted.test_function, held))
        return reduce(Sums.plus, map(_added, found), Sums())

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the model have the averages, if the recipe averages."""
        before = [] if self.fitted.average is None else self.fitted.average.give()
        try:
            yield
        finally:
            for variable, value in before:
                variable.assign(value)

    def total(self, sums: Sums) -> Sums:
        """Return the sums over all processes."""
        loss, *counts = self.devices.total(sums)
        return Sums(loss, *map(int, counts))

    def save(self, folder: Path | None) -> None:
        """Write weights, optimizer, averages and the states of random draws to a folder."""
        arrays = {name: ops.convert_to_numpy(each) for name, each in self._kept().items()}
        if folder is not None:
            written = io.BytesIO()  # as what is closed on a full disk would tell of it once more
            np.savez(written, **arrays)
            (folder / CHECKPOINT).write_bytes(written.getbuffer())

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote; ValueError for what was written of another model."""
        with np.load(folder / CHECKPOINT, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        kept = self._kept()
        shapes = [
            {name: tuple(each.shape) for name, each in which.items()} for which in (arrays, kept)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{folder / CHECKPOINT} is of another model or recipe: it has other arrays than "
                "the weights and the optimizer here."
            )
        for name, variable in kept.items():
            dtype = ops.convert_to_numpy(variable).dtype
            variable.assign(arrays[name].view(dtype))  # NumPy reads bfloat16 as mere bytes

    def _kept(self) -> dict[str, Any]:
        """Return all variables that a run goes on with, by names that a file has them by."""
        average = [] if self.fitted.average is None else self.fitted.average.values
        kinds = {
            "model": self.model.weights, "seed": self._seeds, "average": average,
            "optimizer": self.fitted.rules.variables,
        }  # fmt: skip
        return {f"{kind}.{n}": each for kind, all_ in kinds.items() for n, each in enumerate(all_)}

    def export_state(self) -> State:
        """Return the model's canonical state, of the averaged weights if the recipe averages.

        Of averaged kernels it has those as they are before they are trained on, with D = 0.
        """
        with self._averaged():
            return export_state(self.model)

    def load_state(self, state: State) -> None:
        """Take up a canonical state's weights, as at the beginning of a run."""
        load_state(self.model, state)

    def fold(self) -> Converted[Any]:
        """Return a folded copy of the model, in its own precision, and the report."""
        with self._lent.left(), self._averaged():
            return fold(self.model)

    def folded_state(self, folded: Any) -> State:
        """Return a folded model's canonical state."""
        return export_state(folded)

    def verify(self, folded: Any, batches: Iterable[Batch]) -> Verified:
        """Compare the model with the folded one on all of the batches, in their own precision."""
        with self._lent.left(), self._averaged():
            trained, other = _called(self.model), _called(folded)
            return verified((trained(b.images), other(b.images), b) for b in batches)

    def write_folded(self, folded: Any, folder: Path) -> Path:
        """Write a folded model's weights, as Keras does; return the file."""
        file = folder / FOLDED
        with replacing(file) as temporary:
            folded.save_weights(temporary)
        return file


def _added(call: Pending) -> Sums:
    """Return what a call came to, of what it came to in each replica; waits for it."""
    replicas = [np.asarray(each, np.float64) for each in call.replicas]
    loss, top1, top5 = np.sum(replicas, 0).tolist()
    return Sums(loss * call.total, round(top1), round(top5), call.rows)


def _called(model: keras.Layer) -> Callable[[Array], Array]:
    """Return a function of images that returns a model's logits, compiled without changing it."""
    calling = Calling(model)
    return lambda images: np.asarray(calling.predict_on_batch(images), np.float64)


def _check_output(model: keras.Layer) -> None:
    """Raise ValueError for a model that is seen to end in a softmax."""
    last = output_layer(model)
    ends = isinstance(last, keras.layers.Softmax)
    if ends or getattr(last, "activation", None) is keras.activations.softmax:
        raise ValueError(
            f"the model must give logits, as the loss takes their softmax itself; {last.name!r}, "
            "its last layer, is a softmax: leave it out, and put it behind the folded model."
        )

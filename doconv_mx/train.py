"""Training in Gluon: its engine for a run, on one device, several, or in several processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter, Trainer, nn
from mxnet.ndarray import NDArray

from doconv_core.atomic import replacing
from doconv_core.files.gluon import write_params
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.numeric import Array
from doconv_core.models.report import Converted
from doconv_core.state.file import State, entry
from doconv_core.training import session
from doconv_core.training.engine import Batch, Engine, Step, Sums, Verified, sums_of, verified
from doconv_core.training.fields import BIASES, DEPTHWISE, KERNELS, NORMS
from doconv_core.training.optimizer import TINY
from doconv_core.training.recipe import Recipe
from doconv_core.training.schedule import parts
from doconv_core.training.session import Callback, Trained
from doconv_mx.composed import ComposedConv
from doconv_mx.devices import contexts_of, join_processes, seed_of
from doconv_mx.dgc import DynamicHeads2D, WithLasso, add_saliency_lasso, set_progress
from doconv_mx.model import fold
from doconv_mx.optimizer import FORMER, RecipeOptimizer, average, squares
from doconv_mx.ordinary import require_values
from doconv_mx.orthonormal import has_orthonormal, orthonormality_loss
from doconv_mx.parameter import Entry, native
from doconv_mx.private import as_updated, begin_store, registered, saved_names
from doconv_mx.state import export_state, load_state
from doconv_mx.surgery import copied, forget_graphs
from doconv_mx.tree import check_model, own_parameters, parameters, walk

PRECISION = "float32"
MODEL, TRAINER, FOLDED = "model.params", "trainer.params", "folded.params"
STEPS, INSIDE = "steps", "rate"


def train(
    model: Block,
    recipe: Recipe | str,
    data: Any = "digits",
    *,
    run: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    precision: str = PRECISION,
    devices: str | int | None = None,
    checkpoint_every: int | None = None,
    workers: int = 0,
    callback: Callback | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    quiet: bool = False,
    hybridize: bool = True,
) -> Trained:
    """Train a model by a recipe, in a run that can be killed and gone on with; fold and verify it.

    model: with values, from images `(B, C, H, W)` to logits `(B, classes)`, so without a softmax;
    it is trained itself. recipe: or its name. Its orthonormality and lasso are in place of those of
    the layers; of a model that is no `HybridBlock`, the lasso is trained with, and is not in the
    loss that is told. data: the name of a data set, such as "cifar100" in `data_dir`; or your own,
    as `doconv_core.training.data.as_data` takes them.
    run: the folder that gets everything; None to write nothing. resume: go on with the run there.
    force: replace the one there. seed: of the batches, and of what layers draw, such as dropout:
    in a model that may draw some, MXNet's random numbers are begun anew by it at each step.
    precision: "float32", as MXNet's CPU trains in no other. devices: how many, or names such as
    "gpu:0,gpu:1", each of which has a part of each batch; None for a GPU if there is one. Started
    with the environment of MXNet's kvstore, such as DMLC_ROLE, each worker has a part of each
    batch.
    checkpoint_every: steps; None for each epoch. workers: processes that read images. callback:
    called after each epoch with how many are done, its metrics and the model. notes: what else
    `run.json` is to keep. quiet: print nothing.
    hybridize: whether the model is compiled, as `hybridize()` does; so it stays.
    Raises TypeError, ValueError or `doconv_core.training.run.RunError`, before anything is
    written, for what cannot be; `doconv_core.training.session.RunEnded` where a run ends early.

    >>> short = recipe("tutorial_gluon", epochs=1)
    >>> trained = train(get_model("tutorial_gluon_doconv"), short, quiet=True)
    >>> len(trained.metrics), trained.verified.relative < 1e-5
    (1, True)
    """
    with ExitStack() as stack:

        def make(recipe: Recipe) -> Engine:
            engine = GluonEngine(
                model, recipe, seed=seed, precision=precision, devices=devices, hybridize=hybridize
            )
            stack.callback(engine.close)
            return engine

        return session.train(
            make, recipe, data, run=run, seed=seed, resume=resume, force=force,
            checkpoint_every=checkpoint_every, workers=workers, callback=callback,
            data_dir=data_dir, notes=notes, quiet=quiet,
        )  # fmt: skip


def evaluate(
    model: Block,
    recipe: Recipe | str,
    data: Any = "digits",
    *,
    precision: str = PRECISION,
    devices: str | int | None = None,
    workers: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    hybridize: bool = True,
) -> dict[str, float]:
    """Return the loss, top-1, top-5, images and seconds of a model on evaluation images.

    The arguments are those of `train`; the recipe says how images are prepared, and how many are
    evaluated at once.

    >>> found = evaluate(get_model("tutorial_gluon"), "tutorial_gluon")
    >>> found["images"], 0 <= found["top1"] <= found["top5"] <= 1
    (360, True)
    """

    def make(recipe: Recipe) -> Engine:
        return GluonEngine(model, recipe, precision=precision, devices=devices, hybridize=hybridize)

    return session.evaluate(make, recipe, data, workers=workers, data_dir=data_dir)


class Pending(NamedTuple):
    """What a call of the model came to, which MXNet may still be computing.

    outputs: of each device that had images, in their order. targets, labels: of all of them. lasso:
    of each image, on each of these devices; empty where none is told.
    """

    outputs: list[NDArray]
    targets: Array
    labels: Array
    lasso: list[NDArray]


class PendingStep(NamedTuple):
    """What a step came to. weights: the loss of the weights alone, which counts for each image.

    squares: the sum of those of the weights after it, which is finite where they are.
    """

    calls: list[Pending]
    weights: NDArray | None
    squares: NDArray


class GluonEngine(Engine):
    """A Gluon model with its optimizer, as `doconv_core.training.session` trains it.

    Takes what `train` does. `close` gives the model back: until then, the weights of its lassos are
    the recipe's, and its gradients are written or added to as a batch has parts.
    """

    framework, version = "mx", mx.__version__
    model: Block

    def __init__(
        self,
        model: Block,
        recipe: Recipe,
        *,
        seed: int = 0,
        precision: str = PRECISION,
        devices: str | int | None = None,
        hybridize: bool = True,
    ) -> None:
        check_model(model)
        require_values(parameters(model), "train")
        self.contexts = contexts_of(devices)
        _check_precision(precision)
        self.store = join_processes()
        if self.store is not None:
            self.process, self.processes = self.store.rank, self.store.num_workers
        self.model, self.recipe, self.seed = model, recipe, seed
        self.described = {
            "precision": precision, "devices": list(map(str, self.contexts)),
            "hybridize": hybridize,
        }  # fmt: skip
        heads = (block for _, block in walk(model) if isinstance(block, DynamicHeads2D))
        self._own_lassos: dict[Any, float] = {block: block.lasso for block in heads}
        self.is_orthonormal = has_orthonormal(model) and recipe.orthonormality > 0
        self.named = named(model)
        self._may_draw = any(map(_may_draw, (block for _, block in walk(model))))
        self._place()
        self._called = self._compiled(hybridize)
        self._begin_trainer()
        self._steps: list[PendingStep] = []
        self._begin_average()

    def _place(self) -> None:
        """Put the parameters on the devices; let gradients add up where a batch has parts."""
        self._asked = {p: p.grad_req for p in self.named.values() if p.grad_req != "null"}
        for parameter in self.named.values():
            if parameter.list_ctx() != self.contexts:
                parameter.reset_ctx(self.contexts)
        request = "write" if self.recipe.accumulate == 1 else "add"
        for parameter in self._asked:
            parameter.grad_req = request

    def close(self) -> None:
        """Give the model back as it was, with what was trained."""
        for parameter, request in self._asked.items():
            parameter.grad_req = request
        for heads, lasso in self._own_lassos.items():
            heads.lasso = lasso
        if self._own_lassos:
            forget_graphs(self.model)

    def _compiled(self, hybridize: bool) -> Block:
        """Return what training calls: the model, or what returns its saliencies' lasso as well."""
        called = self.model
        if self._own_lassos:
            add_saliency_lasso(self.model, self.recipe.lasso)
            if self.recipe.lasso and isinstance(self.model, HybridBlock):
                called = WithLasso(self.model)
        called.hybridize(hybridize)
        return called

    def _begin_trainer(self) -> None:
        """Make Gluon's trainer, and let all processes have the first one's weights."""
        everything = list(self.named.values())
        numbers = {id(parameter): number for number, parameter in enumerate(everything)}
        exempt = {
            numbers[id(parameter)]
            for parameter, role in roles(self.model)
            if role in self.recipe.decay_exempt
        }
        self.optimizer = RecipeOptimizer(self.recipe, exempt)
        several = "device" if len(self.contexts) > 1 else None
        self.trainer = Trainer(
            everything, self.optimizer, kvstore=self.store or several, update_on_kvstore=False
        )
        if self.store is not None:
            begin_store(self.trainer, self.store)
            self.store.init(len(everything), mx.nd.zeros(len(Sums()), dtype="float64"))

    def _begin_average(self) -> None:
        """Let the averages, if there are any, begin with the weights of now."""
        self.average: dict[str, NDArray] = {}
        if self.recipe.average is not None:
            self.average = {name: array.copy() for name, array in self._averaged_now().items()}

    def _averaged_now(self) -> dict[str, NDArray]:
        """Return what is averaged as it is now, by its name in the model that is evaluated."""
        first = self.contexts[0]
        trained = {name: p for name, p in self.named.items() if p.grad_req != "null"}
        if self.recipe.average_of != KERNELS:
            return {name: _data(p, first) for name, p in trained.items()}
        composed = self._composed()
        entries = {id(p) for layer in composed.values() for p in layer.entries().values()}
        found = {name: _data(p, first) for name, p in trained.items() if id(p) not in entries}
        for path, layer in composed.items():
            found[entry(path, "weight")] = layer.composed_kernel(first).as_nd_ndarray()
        return found

    def _composed(self) -> dict[str, ComposedConv[Any]]:
        """Return the layers that compose kernels, one of those that share a weight, by path."""
        found: dict[int, tuple[str, ComposedConv[Any]]] = {}
        for path, layer in walk(self.model):
            if isinstance(layer, ComposedConv):
                found.setdefault(id(layer.weight), (path, layer))
        return dict(found.values())

    def train_step(self, step: Step, batch: Batch) -> None:
        """Update the weights by one batch, in parts where the recipe accumulates."""
        if self._steps:  # so that no more than one step waits to be computed
            self._steps[-1].squares.wait_to_read()
        if self._may_draw:
            mx.random.seed(seed_of(self.seed, step.number, self.process))
        if self._own_lassos:
            set_progress(self.model, step.progress)
        slices = list(parts(self.recipe, len(batch.images)))
        self._begin_gradients(len(batch.labels[slices[0]]) if slices else 0)
        calls, weights = [], None
        for rows in slices:
            images, targets, labels = (array[rows] for array in batch[:3])
            part = Batch(images, targets, labels, batch.total)
            call, weights = self._backward(part, rows is slices[-1])
            calls.append(call)
        self._update(step.learning_rate, batch.total)
        self._steps.append(PendingStep(calls, weights, squares(self._on(0, Parameter.data))))

    def _begin_gradients(self, images: int) -> None:
        """Set those to zero that are added to, and those of a device that gets no image.

        images: of the batch's first part, which has the most.
        """
        idle = self.contexts[images:]
        for parameter in self._asked if idle or self.recipe.accumulate > 1 else ():
            parameter.zero_grad()
            for context in idle:
                as_updated(parameter.data(context))

    def _backward(self, part: Batch, last: bool) -> tuple[Pending, NDArray | None]:
        """Compute the gradient of a part of the batch; return what it came to.

        That is the gradient of the sum over images, which the trainer adds up over devices and
        processes, and divides by their number. last: whether the loss of the weights alone is to be
        added, which one device has for all.
        """
        outputs, lasso, losses, weights = [], [], [], None
        with autograd.record():
            for images, targets in zip(*map(self._spread, part[:2]), strict=True):
                found = self._called(native(images))
                if isinstance(self._called, WithLasso):
                    found, told = found
                    lasso.append(told.as_nd_ndarray())
                outputs.append(_logits(found, targets.shape))
                losses.append(-(mx.nd.log_softmax(outputs[-1]) * targets).sum())
            if last and self.is_orthonormal:
                alpha = self.recipe.orthonormality
                weights = orthonormality_loss(self.model, alpha, ctx=self.contexts[0])
                weights = weights.as_nd_ndarray()
                if self.process == 0:
                    losses[0] = losses[0] + weights * part.total
        for loss in losses:
            loss.backward()
        return Pending(outputs, part.targets, part.labels, lasso), weights

    def _update(self, learning_rate: float, images: int) -> None:
        """Change the weights by the gradients of so many images, and let the averages follow."""
        self.trainer.allreduce_grads()
        divisor = float(images)
        if self.recipe.clip_norm is not None:
            norm = squares(self._on(0, Parameter.grad)).sqrt().asscalar() / divisor
            if math.isfinite(norm):  # else weights are to tell of it
                divisor *= max(1.0, (norm + TINY) / self.recipe.clip_norm)
        self.optimizer.begin(learning_rate)
        self.trainer.update(divisor)
        if self.recipe.average is not None:
            now = self._averaged_now()
            names = list(self.average)
            average(
                [self.average[name] for name in names], [now[name] for name in names],
                self.recipe.average,
            )  # fmt: skip

    def _on(self, number: int, kept: Callable[[Parameter, mx.Context], Any]) -> list[NDArray]:
        """Return the arrays of what is trained on a device: their values, or their gradients."""
        context = self.contexts[number]
        return [kept(parameter, context).as_nd_ndarray() for parameter in self._asked]

    def _spread(self, array: Array) -> list[NDArray]:
        """Return the rows of an array on the devices, as evenly as can be; none that is empty."""
        rows = np.array_split(array, len(self.contexts))
        pairs = zip(rows, self.contexts, strict=True)
        return [mx.nd.array(part, ctx=context) for part, context in pairs if len(part)]

    def taken(self) -> list[Sums]:
        """Return what each step since the last call came to, in this process; waits for them.

        The loss of a step after which a weight is not finite is NaN: MXNet's ReLU makes zeros of
        NaN, so that losses may look well for ever.
        """
        steps, self._steps = self._steps, []
        return list(map(_step_sums, steps))

    def evaluate(self, batches: Iterable[Batch]) -> Sums:
        """Return what the model reaches in evaluation mode, averaged if the recipe averages."""
        model, sums = self._evaluated(), Sums()
        pending = None
        for batch in batches:
            call = self._call(model, batch)
            sums, pending = (sums if pending is None else sums.plus(_sums(pending))), call
        return sums if pending is None else sums.plus(_sums(pending))

    def _call(self, model: Block, batch: Batch) -> Pending:
        """Let a model compute a batch, in evaluation mode."""
        with autograd.pause(train_mode=False):
            found = [
                _logits(model(native(images)), (len(images), *batch.targets.shape[1:]))
                for images in self._spread(batch.images)
            ]
        return Pending(found, batch.targets, batch.labels, [])

    def _evaluated(self) -> Block:
        """Return the model that is evaluated: itself, or a copy that has the averages."""
        self._share_statistics()
        if self.recipe.average is None:
            return self.model
        other, arrays = copied(self.model), dict(self.average)
        parameters_of = named(other)
        with autograd.pause():
            if self.recipe.average_of == KERNELS:
                for path, layer in self._composed().items():
                    kernel = arrays[entry(path, "weight")]
                    started = layer.start(kernel)
                    arrays |= {entry(path, name): array for name, array in started.items()}
            for name, array in arrays.items():
                parameters_of[name].set_data(native(array))
        return other

    def _share_statistics(self) -> None:
        """Let all devices and processes have those of the first, as each has seen other images."""
        if self.processes == 1 and len(self.contexts) == 1:
            return
        with autograd.pause():
            for number, parameter in enumerate(self.named.values()):
                if parameter.grad_req == "null":
                    array = _data(parameter, self.contexts[0])
                    if self.store is not None:
                        array = array if self.process == 0 else mx.nd.zeros_like(array)
                        self.store.pushpull(number, array, out=array)
                    parameter.set_data(native(array))
        mx.nd.waitall()  # what a process that ends has not sent, others would wait for

    def total(self, sums: Sums) -> Sums:
        """Return the sums over all processes."""
        if self.store is None:
            return sums
        added = mx.nd.array(np.array(sums, np.float64), dtype="float64")
        self.store.pushpull(len(self.named), added)
        loss, *counts = added.asnumpy().tolist()
        return Sums(loss, *map(int, counts))

    def save(self, folder: Path | None) -> None:
        """Write the weights as `load_parameters` takes them; and optimizer and averages.

        Random states are those of the seed at each step.
        """
        self._share_statistics()
        if folder is not None:
            write_params(folder / MODEL, {name: _array(p) for name, p in self.named.items()})
            kept = {name: array.asnumpy() for name, array in self._kept(self.contexts[0]).items()}
            steps = np.array([self.optimizer.steps], np.int64)
            inside = np.array([self.optimizer.inside], np.float64)
            write_params(folder / TRAINER, {**kept, STEPS: steps, INSIDE: inside})

    def _kept(self, context: mx.Context) -> dict[str, NDArray]:
        """Return what the optimizer has on a device, and the averages."""
        found = {f"average.{name}": array for name, array in self.average.items()}
        for number, (name, parameter) in enumerate(self.named.items()):
            if parameter in self._asked:
                state = self.optimizer.create_state(number, _data(parameter, context))
                found |= {f"optimizer{n}.{name}": array for n, array in enumerate(state)}
        return found

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote; ValueError for what was written of another model."""
        weights, rest = (mx.nd.load(str(folder / name)) for name in (MODEL, TRAINER))
        steps, inside = rest.pop(STEPS), rest.pop(INSIDE, None)
        own = [{n: p.data() for n, p in self.named.items()}, self._kept(self.contexts[0])]
        for name, here, there in zip((MODEL, TRAINER), own, (weights, rest), strict=True):
            if _shapes(here) != _shapes(there):
                raise ValueError(
                    f"{folder / name} is of another model or recipe: it has other arrays than the "
                    "weights and the optimizer here."
                )
        with autograd.pause():
            for name, parameter in self.named.items():
                parameter.set_data(native(weights[name]))
            for context in self.contexts:
                for name, array in self._kept(context).items():
                    array[:] = rest[name].as_in_context(array.context)
        self.optimizer.steps = int(steps.asscalar())
        self.optimizer.inside = FORMER if inside is None else float(inside.asscalar())

    def export_state(self) -> State:
        """Return the model's canonical state, of the averaged weights if the recipe averages."""
        return export_state(self._evaluated())

    def load_state(self, state: State) -> None:
        """Take up a canonical state's weights, as at the beginning of a run."""
        load_state(self.model, state)
        self._begin_average()

    def fold(self) -> Converted[Any]:
        """Return a folded copy of the model, and the report."""
        return fold(self._evaluated())

    def folded_state(self, folded: Any) -> State:
        """Return a folded model's canonical state."""
        return export_state(folded)

    def verify(self, folded: Any, batches: Iterable[Batch]) -> Verified:
        """Compare the model with the folded one on all of the batches."""
        model = self._evaluated()

        def called(of: Block, batch: Batch) -> Array:
            return _outputs(self._call(of, batch))

        return verified((called(model, each), called(folded, each), each) for each in batches)

    def write_folded(self, folded: Any, folder: Path) -> Path:
        """Write a folded model's weights as `save_parameters` does; return the file."""
        file = folder / FOLDED
        with replacing(file) as temporary:
            write_params(temporary, {n: _array(p) for n, p in saved_names(folded).items()})
        return file


def named(model: Block) -> dict[str, Parameter]:
    """Return all parameters, each once, by the names that `save_parameters` gives them."""
    found: dict[int, tuple[str, Parameter]] = {}
    for path, block in walk(model):
        names = {id(p): name for name, p in registered(block).items()}
        for p in own_parameters(block):
            found.setdefault(id(p), (entry(path, names.get(id(p), p.name)), p))
    return dict(found.values())


def roles(model: Block) -> Iterator[tuple[Parameter, str | None]]:
    """Yield each parameter with its role in recipes; None for a weight."""
    for name, parameter in named(model).items():
        last = name.rpartition(".")[2]
        if last.endswith(("gamma", "beta")):  # in a graph of symbols behind the layer's name
            yield parameter, NORMS
        elif last.endswith("bias"):
            yield parameter, BIASES
        else:
            is_depthwise = isinstance(parameter, Entry) and last.endswith(DO_CONV.names[1])
            yield parameter, DEPTHWISE if is_depthwise else None


def _may_draw(block: Block) -> bool:
    """Return whether a block may draw random numbers, as code that is not known may."""
    known = type(block).__module__.startswith(("mxnet.gluon.nn.", "doconv_mx."))
    return not known or isinstance(block, (nn.Dropout, nn.HybridLambda, nn.Lambda))


def _check_precision(precision: str) -> None:
    if precision != PRECISION:
        raise ValueError(
            f"precision must be {PRECISION}, as MXNet's CPU multiplies no half precision, and what "
            f"it has for GPUs cannot be undone in a process; received precision={precision!r}."
        )


def _data(parameter: Parameter, context: mx.Context) -> NDArray:
    return parameter.data(context).as_nd_ndarray()


def _array(parameter: Parameter) -> Array:
    array: Array = parameter.list_data()[0].asnumpy()
    return array


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _logits(output: Any, expected: tuple[int, ...]) -> NDArray:
    """Return a model's output; ValueError for one that does not fit the targets."""
    if not isinstance(output, NDArray) or tuple(output.shape) != expected:
        got = tuple(output.shape) if isinstance(output, NDArray) else type(output).__name__
        raise ValueError(
            f"the model must give logits of shape (B, classes), {expected} for these data; it "
            f"gave {got}."
        )
    return output.as_nd_ndarray()


def _outputs(call: Pending) -> Array:
    """Return the outputs of all devices as one array; waits for them."""
    arrays = [output.asnumpy() for output in call.outputs]
    return np.concatenate([np.empty((0, *call.targets.shape[1:]), np.float32), *arrays])


def _sums(call: Pending) -> Sums:
    """Return what a call came to."""
    sums = sums_of(_outputs(call), call.targets, call.labels)
    return sums._replace(loss=sums.loss + sum(float(x.asnumpy().sum()) for x in call.lasso))


def _step_sums(step: PendingStep) -> Sums:
    sums = reduce(Sums.plus, map(_sums, step.calls), Sums())
    loss = sums.loss
    if step.weights is not None:
        loss += sums.images * float(step.weights.asscalar())
    return sums._replace(loss=loss if math.isfinite(step.squares.asscalar()) else math.nan)

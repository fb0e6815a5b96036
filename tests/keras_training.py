"""What the tests of Keras' training share: a small network with all that a step is made of.

Also a program: `python keras_training.py FILE devices` trains it on two devices, and `worker` as
one of the processes of TF_CONFIG, which must be known before TensorFlow begins. What it comes to
is written to FILE.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import numpy as np

from doconv_core import State, recipe
from doconv_core.kinds.base import recipe as kind
from doconv_core.networks.evaluate import evaluate
from doconv_core.networks.initialize import initialize
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    Dropout,
    DynamicHeads,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    sequence,
)
from doconv_core.training import reference
from doconv_core.training.engine import Batch, Step
from doconv_core.training.loss import cross_entropy, targets
from doconv_core.training.optimizer import trained

CLASSES, SHAPE = 7, (2, 7, 6)
ROWS = (6, 5, 3, 1)  # of each step's batch: the last ones are not to be divided evenly
RATES = (0.02, 0.01, 0.04, 0.002)
# As the weights are, in each step a half of them is dropped; all that is added to the loss.
LOSSES = {"orthonormality": 0.1, "lasso": 0.05}
DOCONV, BSCONVS = kind("doconv"), kind("bsconvs", 0.5)


def network(*more):
    """Return a network whose layers are of every kind, without norms but for those given."""
    return Network(
        "small",
        sequence(
            ("stem", Conv(8, (3, 3), kind=DOCONV, bias=True)), ("act", Activation("tanh")), *more,
            ("s", Conv(8, (3, 3), kind=BSCONVS)),
            ("heads", DynamicHeads(8, (3, 3), heads=2, squeeze_rate=4, gate_factor=0.5)),
            ("pool", GlobalPool()), ("flatten", Flatten()), ("fc", Linear(CLASSES)),
        ),
        SHAPE,
    )  # fmt: skip


def tiny(*more):
    """Return a network of few layers, where it does not matter of which."""
    return Network(
        "tiny",
        sequence(
            ("conv", Conv(4, (3, 3), kind=DOCONV)), *more, ("pool", GlobalPool()),
            ("flatten", Flatten()), ("fc", Linear(CLASSES)),
        ),
        SHAPE,
    )  # fmt: skip


NORM, DROPOUT = ("bn", BatchNorm()), ("dropout", Dropout(0.25))


def state_of(net):
    """Return a state of which nothing is at its special first value."""
    first, rng = initialize(net), np.random.default_rng(1)
    moved = {
        name: a + (0.3 * rng.standard_normal(a.shape) if trained(name) else 1)
        for name, a in sorted(first.arrays.items())
    }
    return State(first.layers, {n: np.asarray(a, np.float32) for n, a in moved.items()})


def batch(rows, seed, process=0, processes=1):
    """Return a batch for Keras, or the part of it that one of several processes has."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=rows)
    images = rng.standard_normal((rows, *SHAPE[1:], SHAPE[0])).astype(np.float32)
    own = [images, targets(labels, CLASSES, 0.1), labels]
    return Batch(*(np.array_split(each, processes)[process] for each in own), rows)


def steps(rows=ROWS, first=0, **part):
    """Yield the steps from the first on."""
    for number in range(first, len(rows)):
        progress = (number + 1) / (2 * len(rows))
        yield Step(number, 0, RATES[number], progress), batch(rows[number], number, **part)


def recipe_of(optimizer="sgd", **changes):
    given = {"weight_decay": 0.01, "epsilon": 1e-3, **LOSSES, **changes}
    return recipe("digits", optimizer=optimizer, **given)


def model_of(net):
    import doconv_tf

    model = doconv_tf.build(net)
    doconv_tf.load_state(model, state_of(net))
    return model


def engine_of(net, given, model=None, **options):
    from doconv_tf.train import KerasEngine

    return KerasEngine(model_of(net) if model is None else model, given, **options)


def train(engine, **part):
    """Train for all steps; return what each came to, in this process."""
    for step, made in steps(**part):
        engine.train_step(step, made)
    return engine.taken()


EVALUATED = (5, 1)  # rows of the batches
GIVEN = {"clip_norm": 0.5, "accumulate": 2, "average": 0.5, "decay_exempt": ("biases",)}


def channels_first(given):
    for step, made in given:
        yield step, made._replace(images=np.moveaxis(made.images, -1, 1))


def expected():
    """Return what `results` returns, by the core; of sums, those of the losses."""
    net = network()
    found = reference.train(net, state_of(net), recipe_of(**GIVEN), channels_first(steps()))
    logits = [
        evaluate(net, found.averaged, made.images.astype(np.float64))
        for _, made in channels_first((None, batch(rows, rows)) for rows in EVALUATED)
    ]
    loss = sum(
        cross_entropy(each, batch(rows, rows).targets).sum()
        for each, rows in zip(logits, EVALUATED, strict=True)
    )
    states = {"averaged": found.averaged, "weights": found.state}
    return {
        "losses": found.losses * ROWS, "images": np.array(ROWS),
        "evaluated": np.array([loss, sum(EVALUATED)]),
        **{f"{name}.{n}": a for name, s in states.items() for n, a in s.arrays.items()},
    }  # fmt: skip


def results(scope=nullcontext, devices=None):
    """Return what a training of all of it comes to: sums of all processes, weights, averages."""
    import doconv_tf

    net, given = network(), recipe_of(**GIVEN)
    with scope():
        model = model_of(net)
    engine = engine_of(net, given, model, devices=devices)
    part = {"process": engine.process, "processes": engine.processes}
    taken = [engine.total(sums) for sums in train(engine, **part)]
    batches = (batch(rows, rows, **part) for rows in EVALUATED)
    evaluated = engine.total(engine.evaluate(each for each in batches if len(each.images)))
    states = {"averaged": engine.export_state()}
    engine.close()
    states["weights"] = doconv_tf.export_state(model)
    return {
        "losses": np.array([sums.loss for sums in taken]),
        "images": np.array([sums.images for sums in taken]),
        "evaluated": np.array([evaluated.loss, evaluated.images]),
        **{f"{name}.{n}": a for name, s in states.items() for n, a in s.arrays.items()},
    }  # fmt: skip


def main(file, how):
    import tensorflow as tf

    from doconv_tf.devices import cluster_scope

    if how == "worker":
        found = results(cluster_scope)
    else:
        (cpu,) = tf.config.list_physical_devices("CPU")
        logical = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, logical)
        found = results(devices=2)
    np.savez(file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

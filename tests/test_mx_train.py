"""Training in Gluon: the updates, devices and processes, and what goes on as if never ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from equal import assert_close, assert_same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
import doconv_mx as package  # noqa: E402, I001
import mxnet as mx  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import Block, HybridBlock, nn  # noqa: E402

from doconv_core.training.engine import Batch, Step, Sums  # noqa: E402
from doconv_core.training.loss import cross_entropy, targets  # noqa: E402
from doconv_core.training.optimizer import Moments, averaged, clipped, update  # noqa: E402
from doconv_core.training.recipe import Recipe  # noqa: E402
from doconv_mx.optimizer import squares  # noqa: E402
from doconv_mx.train import GluonEngine  # noqa: E402

CLASSES, LASSO, ALPHA = 4, 0.1, 0.05
RATES = (0.0, 0.1, 0.02, 0.02, 0.3)  # the first is that of a warm-up
# Sums of float32 numbers that are added in another order.
ADDED = 1e-6


def recipe(**changes):
    given = {"name": "mine", "epochs": 1, "batch_size": 8, "optimizer": "nesterov"}
    return Recipe(**{**given, "learning_rate": 0.1, **changes})


def network(*, norm=True, dynamic=False, dropout=0.0, seed=0):
    """Return a network with all roles of parameters; D is not zero."""
    net = nn.HybridSequential()
    net.add(package.DOConv2D(3, 8, 3, padding=1))
    if norm:
        net.add(nn.BatchNorm(in_channels=8))
    net.add(nn.Activation("relu"), package.BSConvS2D(8, 8, 3, p=0.5, use_bias=True))
    if dynamic:
        net.add(package.DGConv2D(8, 8, 1, heads=2))
    net.add(nn.GlobalAvgPool2D(), nn.Flatten(), nn.Dropout(dropout), nn.Dense(CLASSES, in_units=8))
    net.initialize()
    rng = np.random.default_rng(seed)
    for name, parameter in sorted(net.collect_params().items()):
        if parameter.grad_req != "null":
            values = rng.standard_normal(parameter.shape) * 0.3
            parameter.set_data(mx.nd.array(values + name.endswith(("gamma", "saliency_bias"))))
    return net


def batch(rows=8, seed=1, total=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    images = rng.standard_normal((rows, 3, 6, 6)).astype("f4")
    return Batch(images, targets(labels, CLASSES, 0.1), labels, total or rows)


def step(number, rate=0.1, progress=0.0):
    return Step(number, 0, rate, progress)


def weights(engine):
    return {
        name: parameter.data().asnumpy()
        for name, parameter in engine.named.items()
        if parameter.grad_req != "null"
    }


def gradients(engine, images):
    """Return the gradients of the last step, of the mean over so many images."""
    return {name: engine.named[name].grad().asnumpy() / images for name in weights(engine)}


def after(engine, *batches):
    """Return the weights after a step with each of the batches."""
    for number, each in enumerate(batches):
        engine.train_step(step(number), each)
    return weights(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "decay_exempt": ("norms", "biases", "depthwise")},
        {"optimizer": "nesterov", "decay_exempt": ("depthwise",)},
        {"optimizer": "nesterov", "clip_norm": 0.5},
        {"optimizer": "adamw", "decay_exempt": ("norms", "biases")},
        {"optimizer": "adamw", "epsilon": 0.1, "clip_norm": 0.5},
    ],
)
def test_updates_are_those_of_the_core(changes):
    mine = recipe(weight_decay=0.1, **changes)
    engine, moments = GluonEngine(network(), mine), Moments()
    for number, rate in enumerate(RATES):
        before = weights(engine)
        engine.train_step(step(number, rate), batch(seed=number))
        found = clipped(gradients(engine, 8), mine.clip_norm)
        expected, moments = update(mine, before, found, moments, rate)
        assert_close(weights(engine), expected, ADDED, f"step {number}")
        engine.evaluate([batch()])  # after which MXNet keeps weights in an order of its own


def test_multipliers_of_parameters_count():
    net = network()
    net[0].weight.lr_mult, net[0].bias.wd_mult = 0.0, 0.0
    engine = GluonEngine(net, recipe(optimizer="sgd", weight_decay=0.5))
    before = weights(engine)
    found = after(engine, batch())
    assert_same(found["0.weight"], before["0.weight"])
    bias = before["0.bias"] - np.float32(0.1) * gradients(engine, 8)["0.bias"]
    assert_close(found["0.bias"], bias, ADDED)


@pytest.mark.parametrize("hybridize", [True, False])
@pytest.mark.parametrize("changes", [{}, {"lasso": LASSO, "orthonormality": ALPHA}])
def test_a_batch_in_parts_trains_as_one(changes, hybridize):
    """The last part has fewer images than the others, and gradients of before are forgotten."""
    found = []
    for accumulate in (1, 3):
        mine = recipe(accumulate=accumulate, **changes)
        engine = GluonEngine(network(norm=False, dynamic=False), mine, hybridize=hybridize)
        found.append((after(engine, batch(), batch(7, seed=2)), engine.taken()))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("rows", [8, 5, 1])
def test_two_devices_train_as_one(rows):
    found = []
    for devices in ("cpu", "cpu:0,cpu:1"):
        mine = recipe(orthonormality=ALPHA, weight_decay=0.1, clip_norm=0.5, average=0.5)
        engine = GluonEngine(network(norm=False), mine, devices=devices)
        trained = after(engine, batch(), batch(rows, seed=2), batch(seed=3))
        evaluated = engine.evaluate([batch(rows)])
        found.append((trained, engine.taken(), evaluated, engine.export_state().arrays))
        for parameter in engine.named.values():
            assert_same(*(parameter.list_data()[number] for number in (0, -1)))
    assert_close(found[1], found[0])


def test_devices_evaluate_with_the_statistics_of_the_first():
    engine = GluonEngine(network(), recipe(), devices="cpu:0,cpu:1")
    after(engine, batch())
    evaluated = engine.evaluate([batch()])
    alone = engine.fold().model
    alone.collect_params().reset_ctx(mx.cpu())
    with autograd.pause():
        logits = alone(mx.nd.array(batch().images)).asnumpy()
    assert_close(evaluated.loss, cross_entropy(logits, batch().targets).sum())


def told(net, changes, each):
    """Return the loss of a step, as it is told, and the gradients, both of the sum over images."""
    engine = GluonEngine(net, recipe(optimizer="sgd", **changes))
    engine.train_step(step(0, rate=0.0), each)
    return engine.taken()[0].loss, gradients(engine, 1)


def test_the_loss_has_what_kinds_add_to_it():
    """The weights of what they add are the recipe's, in place of the layers' own."""
    net, each = network(dynamic=True), batch()
    changes = {"lasso": LASSO, "orthonormality": ALPHA}
    loss, found = told(net, changes, each)
    plain, _ = told(net, {}, each)
    with autograd.train_mode():
        z = net[4].relu(net[4].norm(net[:4](mx.nd.array(each.images))))
        names = ("squeeze_weight", "saliency_weight", "saliency_bias")
        saliency = net[4].heads.saliency(
            mx.nd, z, *(getattr(net[4].heads, n).data() for n in names)
        )
    lasso = saliency.mean(axis=2).sum().asscalar()
    rows = package.orthonormality_loss(net, ALPHA).asscalar()
    assert_close(loss - plain, LASSO * lasso + 8 * rows)
    for name in ("4.heads.saliency_bias", "3.pointwise1.weight"):
        parameter = dict(net._collect_params_with_prefix())[name]
        values, losses = parameter.data().asnumpy(), []
        for by in (0.005, -0.005):
            moved = values.copy()
            moved.flat[0] += by
            parameter.set_data(mx.nd.array(moved))
            losses.append(told(net, changes, each)[0])
        parameter.set_data(mx.nd.array(values))
        # By the loss at two points 0.01 apart, between which it bends.
        assert_close((losses[0] - losses[1]) / 0.01, found[name].flat[0], 1e-2, name)


class Plain(Block):
    """A model that cannot be hybridized."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def test_a_block_of_python_code_trains_as_its_hybrid_one():
    found = []
    for make in (lambda net: net, Plain):
        engine = GluonEngine(make(network(dynamic=True)), recipe(lasso=LASSO))
        found.append(list(after(engine, batch(), batch(seed=2)).values()))
        assert engine.fold().report.changed
    assert_close(found[1], found[0])


@pytest.mark.parametrize("average_of", ["weights", "kernels"])
def test_averages(average_of):
    mine = recipe(average=0.75, average_of=average_of)
    engine = GluonEngine(network(), mine)

    def now():
        net = package.fold(engine.model).model if average_of == "kernels" else engine.model
        return {
            name: parameter.data().asnumpy()
            for name, parameter in net._collect_params_with_prefix().items()
            if parameter.grad_req != "null"
        }

    expected = now()
    for number in range(3):
        engine.train_step(step(number), batch(seed=number))
        expected = averaged(expected, now(), 0.75)
    state = engine.export_state().arrays
    assert_close(state["7.weight"], expected["7.weight"], ADDED)
    kernel = engine.fold().model[0].weight.data()
    if average_of == "kernels":
        assert_close(kernel, expected["0.weight"], ADDED)
    else:
        assert_close(state["0.depthwise_weight"], expected["0.depthwise_weight"], ADDED)
    assert_same(state["1.running_var"], engine.model[1].running_var.data())
    assert engine.verify(engine.fold().model, [batch()]).relative < 1e-6


def test_the_model_asks_for_gradients_and_lassos_as_before_when_it_is_closed():
    net = network(dynamic=True)
    engine = GluonEngine(net, recipe(accumulate=2, lasso=LASSO))
    assert (net[0].weight.grad_req, net[4].heads.lasso) == ("add", LASSO)
    engine.close()
    assert (net[0].weight.grad_req, net[4].heads.lasso) == ("write", 1e-5)


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adamw"}, {"average": 0.5}, {"average": 0.5, "average_of": "kernels"}]
)
def test_what_is_loaded_goes_on_with_the_same_bits(changes, tmp_path):
    """Dropout too, whose random numbers are of the seed and the step."""
    mine = recipe(lasso=LASSO, orthonormality=ALPHA, **changes)
    steps = [step(number, 0.1 / (number + 1), number / 8) for number in range(6)]

    def run(engine, which):
        for each in which:
            engine.train_step(each, batch(seed=each.number))
            if each.number % 2:
                engine.evaluate([batch()])
        return weights(engine), engine.taken(), engine.export_state().arrays

    made = [network(dynamic=True, dropout=0.5, seed=seed) for seed in (0, 5)]
    first, second = (GluonEngine(net, mine, seed=3) for net in made)
    run(first, steps[:3])
    first.save(tmp_path)
    expected = run(first, steps[3:])
    second.load(tmp_path)
    assert_same(run(second, steps[3:]), expected)
    made[1].load_parameters(str(tmp_path / "model.params"))
    other = GluonEngine(network(dynamic=True, dropout=0.5), mine, seed=4)
    other.load(tmp_path)
    assert run(other, steps[3:])[1][0].loss != expected[1][0].loss


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
def test_a_checkpoint_whose_velocities_are_without_a_rate_goes_on(optimizer, tmp_path):
    mine = recipe(optimizer=optimizer, weight_decay=0.1)
    engine, other = (GluonEngine(network(seed=seed), mine) for seed in (0, 5))
    for number in (1, 2):  # the rates before and after are not the same
        engine.train_step(step(number, RATES[number]), batch(seed=number))
    engine.save(tmp_path)
    file = str(tmp_path / "trainer.params")
    stored = mx.nd.load(file)
    rate = stored.pop("rate").asscalar()
    assert rate == RATES[2]
    velocities = [name for name in stored if name.startswith("optimizer0.")]
    mx.nd.save(file, {**stored, **{name: stored[name] / -rate for name in velocities}})
    other.load(tmp_path)
    for each in (engine, other):
        each.train_step(step(3, 0.3), batch(seed=3))
    assert_close(weights(other), weights(engine), ADDED)


def test_squares_of_large_arrays_are_added_up():
    array = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    found = squares([mx.nd.array(array), mx.nd.array([3, 4])]).asnumpy()
    np.testing.assert_allclose(found, (array.astype(np.float64) ** 2).sum() + 25, rtol=1e-4)


class Drawing(HybridBlock):
    """Code of a user's, of which nothing tells that it draws random numbers."""

    def hybrid_forward(self, F, x):
        return F.Dropout(x, p=0.5)


def test_own_code_draws_by_the_seed_too():
    found = []
    for _ in range(2):
        net = network()
        net.add(Drawing())
        found.append(after(GluonEngine(net, recipe()), batch(), batch(seed=2)))
    assert_same(*found)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    GluonEngine(network(), recipe()).save(tmp_path)
    engine = GluonEngine(network(norm=False), recipe())
    before = weights(engine)
    with pytest.raises(ValueError, match=r"model\.params is of another model or recipe: it has"):
        engine.load(tmp_path)
    assert_same(weights(engine), before)
    engine = GluonEngine(network(), recipe(optimizer="adamw"))
    with pytest.raises(ValueError, match=r"trainer\.params is of another model or recipe"):
        engine.load(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_weights_that_are_not_finite_are_told_by_the_loss(optimizer, clip_norm):
    """MXNet's ReLU makes zeros of NaN, so that the outputs stay finite."""
    engine = GluonEngine(network(), recipe(optimizer=optimizer, clip_norm=clip_norm))
    images = batch().images.copy()
    images[0, 0, 0, 0] = np.inf
    after(engine, batch(), batch()._replace(images=images))
    sound, unsound = engine.taken()
    assert np.isfinite(sound.loss)
    assert np.isnan(unsound.loss)


def test_what_is_right_is_counted():
    engine = GluonEngine(network(), recipe())
    first, second = batch(5), batch(3, seed=2)
    found = engine.evaluate([first, second])
    with autograd.predict_mode():
        images = np.concatenate([first.images, second.images])
        logits = engine.model(mx.nd.array(images)).asnumpy()
    labels = np.concatenate([first.labels, second.labels])
    assert found.correct == (logits.argmax(1) == labels).sum()
    assert (found.top5, found.images) == (8, 8)  # of four classes
    assert engine.evaluate([]) == Sums()


def test_a_batch_without_images_is_a_step_and_nothing_to_evaluate():
    """As of a short batch, of which other processes have the images."""
    mine = recipe(weight_decay=0.1)
    engine, moments, none = GluonEngine(network(), mine), Moments(), batch(0, total=8)
    expected = weights(engine)
    for number, each in enumerate((batch(), none)):
        engine.train_step(step(number), each)
        found = gradients(engine, 8)
        assert any(array.any() for array in found.values()) == bool(len(each.images))
        expected, moments = update(mine, expected, found, moments, 0.1)
    assert_close(weights(engine), expected, ADDED)
    assert engine.taken()[1] == Sums()
    assert engine.evaluate([none, batch(3), none]) == engine.evaluate([batch(3)])
    assert engine.verify(engine.fold().model, [none, batch(3)]).before.images == 3


def test_folded_weights_load_as_parameters_do(tmp_path):
    engine = GluonEngine(network(), recipe())
    folded = engine.fold().model
    file = engine.write_folded(folded, tmp_path)
    assert file == tmp_path / "folded.params"
    expected = {n: p.data().asnumpy() for n, p in folded._collect_params_with_prefix().items()}
    folded.initialize(mx.init.Zero(), force_reinit=True)
    folded.load_parameters(str(file))
    found = {n: p.data().asnumpy() for n, p in folded._collect_params_with_prefix().items()}
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat16"}, r"must be float32, as MXNet's CPU .* precision='bfloat16'\."),
        ({"devices": "gpu:7"}, r"there is no device 'gpu:7' here; there is cpu:0 and so on"),
        ({"devices": "tpu"}, r"there is no device 'tpu' here"),
        ({"devices": 0}, r"devices must be at least 1, and there are 0 GPUs .* devices=0\."),
        ({"devices": "cpu,cpu:0"}, r"devices must be named once each; received devices='cpu,cpu"),
    ],
)
def test_what_is_not_here_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GluonEngine(network(), recipe(), **options)


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(TypeError, match=r"expected a mxnet\.gluon\.Block|Block"):
        GluonEngine(lambda x: x, recipe())
    with pytest.raises(ValueError, match=r"train needs the values of 'dense\d+_weight', which has"):
        GluonEngine(nn.Dense(4), recipe())
    net = network()
    net.add(nn.Dense(5, in_units=4))
    net[-1].initialize()
    engine = GluonEngine(net, recipe())
    message = r"the model must give logits of shape \(B, classes\), \(8, 4\) .* gave \(8, 5\)"
    with pytest.raises(ValueError, match=message):
        engine.evaluate([batch()])
    with pytest.raises(ValueError, match=message):
        engine.train_step(step(0), batch())


def test_a_run_begins_trains_and_is_gone_on_with(tmp_path):
    """`train` itself; what it does in every framework is in the contract of training."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
    data = images, np.arange(24) % CLASSES
    net = nn.HybridSequential()
    net.add(package.DOConv2D(1, 4, 3), nn.BatchNorm(in_channels=4), nn.Flatten())
    net.add(nn.Dense(CLASSES, in_units=144))
    net.initialize(mx.init.Xavier())
    trained = package.train(net, recipe(epochs=2), data, run=tmp_path / "run", quiet=True)
    assert trained.model is net
    assert [each["epoch"] for each in trained.metrics] == [1, 2]
    assert type(trained.folded[0]) is nn.Conv2D
    assert trained.verified.relative < 1e-6
    again = package.train(
        net, recipe(epochs=2), data, run=tmp_path / "run", resume=True, quiet=True
    )
    assert again.metrics == trained.metrics


# Two processes have the same images, so that batch norms see in each what one sees of both; the
# second step has an image for the first process alone.
TWICE = [Batch(*(np.concatenate([a, a]) for a in batch(4, seed)[:3]), 8) for seed in (1, 2)]
SHARED = [TWICE[0], batch(1), TWICE[1]]


def come_to(seed):
    """Return an engine and what it comes to. seed: of its weights, which the first one's replace.

    Of each batch it takes the part of its process.
    """
    mine = recipe(weight_decay=0.1, clip_norm=0.5, average=0.5, orthonormality=ALPHA, lasso=LASSO)
    engine = GluonEngine(network(dynamic=True, seed=seed), mine)
    for number, whole in enumerate(SHARED):
        own = np.array_split(np.arange(whole.total), engine.processes)[engine.process]
        part = Batch(*(array[own] for array in whole[:3]), whole.total)
        engine.train_step(step(number), part)
    sums = [engine.total(each) for each in engine.taken()]
    trained = {f"trained {name}": array for name, array in weights(engine).items()}
    return engine, {**trained, "sums": np.array(sums), **engine.export_state().arrays}


def work(folder, seed):
    """Be one of two processes, and write what came of it."""
    engine, found = come_to(seed)
    with pytest.raises(RuntimeError, match="MXNet's workers join once: begin the scheduler, the"):
        GluonEngine(network(), recipe())
    folder = Path(folder) / str(engine.process)
    folder.mkdir()
    engine.save(folder if engine.process == 0 else None)
    np.savez(folder / "found.npz", seed=seed, **found)


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "DMLC_PS_ROOT_URI": "127.0.0.1", "DMLC_PS_ROOT_PORT": str(port), "DMLC_NUM_SERVER": "1",
        "DMLC_NUM_WORKER": "2", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip

    def begun(role, code):
        environment = {**os.environ, **variables, "DMLC_ROLE": role}
        return subprocess.Popen([sys.executable, "-c", code], env=environment)

    others = [begun(role, "import doconv_mx") for role in ("scheduler", "server")]
    code = "import test_mx_train; test_mx_train.work({!r}, {})"
    workers = [begun("worker", code.format(str(tmp_path), seed)) for seed in (1, 2)]
    try:
        assert [each.wait(200) for each in (*workers, *others)] == [0, 0, 0, 0]
    finally:
        for each in (*workers, *others):
            each.kill()
            each.wait()
    first, second = (dict(np.load(tmp_path / f"{n}" / "found.npz")) for n in range(2))
    seed = int(first.pop("seed"))
    assert int(second.pop("seed")) != seed
    assert_same(second, first)
    engine, expected = come_to(seed)
    assert_close(first, expected)
    assert [int(each) for each in first["sums"][:, 3]] == [8, 1, 8]
    engine.load(tmp_path / "0")
    for name, array in weights(engine).items():
        assert_same(array, first[f"trained {name}"])

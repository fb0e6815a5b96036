"""Handwritten digits in MXNet Gluon, with ordinary and with over-parameterized convolutions.

The network and its training are those of MXNet's tutorial "Hand-written digit recognition on
MNIST". Whether `Conv2D` below is `mxnet.gluon.nn.Conv2D` or `DOConv2D` is the only difference
between the two.
"""

from importlib import metadata

from doconv_mx import DOConv2D, export_state, import_gluoncv  # first: says what is missing

# isort: split
import harness
import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.nn import Conv2D

gluoncv = import_gluoncv()

LAYERS = {"conv": Conv2D, "doconv": DOConv2D}


class Network(gluon.HybridBlock):
    """The tutorial's network: `(B, 1, 28, 28)` images to `(B, 10)` logits."""

    def __init__(self, Conv2D):
        super().__init__()
        with self.name_scope():
            # By keyword: the ordinary layer takes its input channels last, DO-Conv's takes them
            # first. Both could also be left to find them out.
            self.conv1 = Conv2D(in_channels=1, channels=20, kernel_size=(5, 5), activation="tanh")
            self.pool1 = nn.MaxPool2D(pool_size=(2, 2), strides=(2, 2))
            self.conv2 = Conv2D(in_channels=20, channels=50, kernel_size=(5, 5), activation="tanh")
            self.pool2 = nn.MaxPool2D(pool_size=(2, 2), strides=(2, 2))
            self.fc1 = nn.Dense(500, activation="tanh")
            self.fc2 = nn.Dense(10)

    def hybrid_forward(self, F, x):
        """Return the logits."""
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = self.fc1(x)
        return self.fc2(x)


def build(layer, seed, device):
    """Return a new network. Both layers draw the same weights from the same seed, and D is zero."""
    gluoncv.utils.random.seed(seed)  # of Python, NumPy, which shuffles the batches, and MXNet
    model = Network(LAYERS[layer])
    model.initialize(mx.init.Xavier(magnitude=2.24), ctx=device)
    model.hybridize()
    model(mx.nd.zeros((1, 1, 28, 28), ctx=device))  # shows the dense layers their input's size
    return model


def train(model, data, options, seed, device, epochs):
    """Train with stochastic gradient descent, as the tutorial does."""
    batches = mx.io.NDArrayIter(
        data.train_images[:, None], data.train_labels, options.batch_size, shuffle=True
    )
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": options.lr})
    for _ in epochs:
        batches.reset()
        for batch in batches:
            x, y = batch.data[0].as_in_context(device), batch.label[0].as_in_context(device)
            with autograd.record():
                loss = cross_entropy(model(x), y)
            loss.backward()
            trainer.step(len(x))
        mx.nd.waitall()  # MXNet only queues work: let the progress be real, and errors show here


def outputs(model, images, device):
    """Return the logits of `(N, 28, 28)` images, `(N, 10)`."""
    return model(mx.nd.array(images[:, None], ctx=device)).asnumpy()


def fold(model, device):
    """Return the same network with ordinary convolutions in place of the over-parameterized."""
    folded = Network(Conv2D)
    folded.conv1, folded.conv2 = model.conv1.fold(), model.conv2.fold()
    folded.fc1, folded.fc2 = model.fc1, model.fc2
    return folded


def parameters(model):
    """Return the number of trainable numbers in a model."""
    return sum(p.data().size for p in model.collect_params().values())


def devices():
    """Return MXNet's CPU, and its GPU where it finds one."""
    found = {"cpu": mx.cpu()}
    if mx.context.num_gpus():
        found["gpu"] = mx.gpu()
    return found


SAMPLE = harness.Sample(
    name="sample_gluoncv",
    description=__doc__,
    versions={"mxnet": mx.__version__, "gluoncv": metadata.version("gluoncv")},
    epochs={"digits": 20, "mnist": 10},
    lr={"digits": 0.1, "mnist": 0.03},
    why="10 epochs and the learning rate 0.03 are the tutorial's, for MNIST: 6,000 steps. With 0.1 "
    "the baseline converges on the digits within 20 epochs, 260 steps; with 0.03 it takes three "
    "times as many.",
    batch_size=100,
    devices=devices(),
    build=build,
    train=train,
    outputs=outputs,
    fold=fold,
    parameters=parameters,
    export_state=export_state,
)

if __name__ == "__main__":
    harness.main(SAMPLE)

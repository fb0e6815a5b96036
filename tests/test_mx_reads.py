"""Weights of Gluon's convolutions that blocks read other than by calling the layer."""

from __future__ import annotations

import pytest
from equal import same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, fold, over_parameterize, to_bsconv  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_models import built, outputs, square  # noqa: E402
from mxnet.gluon import Block, HybridBlock, nn  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.report import READ  # noqa: E402


def over():
    return DOConv2D(4, 4, 3, padding=1)


def model_of(use, base, conv=square):
    """Return a block whose code does something with a convolution beside calling it."""

    class Reading(base):
        def __init__(self):
            super().__init__()
            self.conv, self.other, self.called = conv(), square(), []

        def forward(self, x):
            self.called.append(type(x))
            if base is Block:
                return use(mx.nd, self.conv, self.other(self.conv(x)))
            return super().forward(x)

        def hybrid_forward(self, F, x):
            return use(F, self.conv, self.other(self.conv(x)))

    return built(Reading(), run=False)


def up(F, y, weight):
    return F.Deconvolution(y, weight, kernel=(3, 3), num_filter=4)


@pytest.mark.parametrize(
    ("base", "use"),
    [
        (HybridBlock, lambda F, conv, y: up(F, y, conv.weight.var())),
        (HybridBlock, lambda F, conv, y: up(F, F.relu(y), conv.weight.data())),
        (HybridBlock, lambda F, conv, y: [y, conv.weight.list_data()[0]]),
        (Block, lambda F, conv, y: up(F, y.relu(), conv.weight.data())),
        (Block, lambda F, conv, y: y * conv.weight.data().asnumpy().sum()),
        (Block, lambda F, conv, y: y + sum(p.data().sum() for p in conv.params.values())),
        (Block, lambda F, conv, y: y if conv.weight.data().sum() > 0 else 2 * y),
    ],
)
def test_a_weight_that_is_read_elsewhere_is_left_and_not_folded(base, use):
    model = model_of(use, base)
    _, report = over_parameterize(model)
    assert [change.path for change in report.changed] == ["other"]
    assert [(left.path, left.reason) for left in report.left] == [("conv", READ)]
    _, report = to_bsconv(model)
    assert [(left.path, left.reason) for left in report.left] == [("conv", READ)]
    assert model.called == []  # a copy was
    with pytest.raises(NotFoldable, match="layer 'conv': the model's forward reads its weight"):
        fold(model_of(use, base, over))


@pytest.mark.parametrize(
    "use",
    [
        lambda F, conv, y: y.as_in_context(conv.weight.data().context),
        lambda F, conv, y: y.astype(conv.weight.data().dtype) / conv.weight.list_data()[0].shape[1],
        lambda F, conv, y: y / conv.weight.shape[0] * conv.weight.data().ndim,
        lambda F, conv, y: y + conv.bias.data().sum(),
        lambda F, conv, y: y + conv.composed_kernel().sum() if type(conv) is DOConv2D else y,
        lambda F, conv, y: conv.forward(y),
    ],
)
def test_other_uses_of_a_layer_are_none_of_its_weight(use):
    model = model_of(use, Block)
    assert len(over_parameterize(model).report.changed) == 2
    model = model_of(use, Block, over)
    folded, report = fold(model)
    assert len(report.changed) == 1
    if "composed_kernel" not in use.__code__.co_names:
        assert same(outputs(folded), outputs(model))


def test_a_function_that_reads_is_seen_in_a_model_that_is_not():
    conv = nn.Conv2D(4, 3, padding=1)
    model = nn.Sequential()
    model.add(nn.Lambda(lambda x: x.asnumpy()), conv, nn.Lambda(lambda x: x + conv.weight.data()))
    model.initialize()  # and not run: the shapes are not known
    assert [left.reason for left in over_parameterize(model).report.left] == [READ]

"""Deploying a Gluon model: everything at once, with the methods that its own blocks have."""

from __future__ import annotations

import pytest
from equal import same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import deploy, over_parameterize, verify  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from gluon_layers import image  # noqa: E402
from gluon_models import HYBRIDIZED, built, moved, outputs  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import Block, HybridBlock, nn  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402


def conv(size=3, channels=4):
    return nn.Conv2D(channels, size, padding=size // 2)


class Branches(HybridBlock):
    """Two branches that become one convolution, as RepVGG's and MobileOne's do."""

    fused = True  # no method

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.conv, self.point = conv(), conv(1)
        self.alone = False

    def hybrid_forward(self, F, x):
        return self.conv(x) if self.alone else self.conv(x) + self.point(x)

    def switch_to_deploy(self):
        for name in ("weight", "bias"):
            own, other = (getattr(block, name).data() for block in (self.conv, self.point))
            if name == "weight":
                own[:, :, 1:2, 1:2] += other
            else:
                own[:] += other
        self.alone = True
        del self._children["point"], self.point


class Returning(Branches):
    """One whose method returns what takes its place."""

    def fuse(self):
        self.switch_to_deploy()
        self.conv(mx.nd.ones((1, 4, 3, 3)))  # a graph by itself, where it is hybridized
        return self.conv

    def reparameterize(self, how):
        """Is not called: it takes something."""


class Fusible(nn.HybridSequential):
    """A model that fuses its own parts."""

    def fuse(self):
        """Do so."""


def sequence(*parts, cls=nn.HybridSequential):
    model = cls()
    model.add(*parts)
    return model


def test_methods_that_make_other_layers_are_named():
    model = built(sequence(Branches(), Returning(), cls=Fusible))
    _, report = over_parameterize(model, where="0.*")
    assert report.fusing == (("", "Fusible", "fuse"), ("0", "Branches", "switch_to_deploy"))
    assert over_parameterize(built(sequence(conv()))).report.fusing == ()


@HYBRIDIZED
def test_deploying_does_everything_in_the_right_order(hybridized):
    parts = Branches(), nn.BatchNorm(), Returning(), conv(), nn.BatchNorm()
    model = over_parameterize(built(sequence(sequence(*parts)), hybridized)).model
    before = outputs(moved(model))
    with autograd.record():  # of what deploying does, nothing is recorded
        deployed, report = deploy(model, image())
    assert report.difference == verify(model, deployed, image())
    assert report.difference.relative < 1e-5
    assert [(c.path, c.after) for c in report.changed] == [
        ("0.0.conv", "Conv2D"), ("0.2.conv", "Conv2D"), ("0.3", "Conv2D"),
        ("0.0", "what its switch_to_deploy() makes"), ("0.2", "what its fuse() makes"),
        ("0.1", "fused into Conv2D"), ("0.4", "fused into Conv2D"),
    ]  # fmt: skip
    assert report.left == ()
    assert [type(layer) for layer in deployed[0]][2:] == [nn.Conv2D, nn.Conv2D, nn.Dropout]
    assert all(block._active == hybridized for block in deployed[0])
    assert len(list(deployed.collect_params())) == 3 * 2
    assert str(deploy(model).report).endswith("not verified, as no inputs were given")
    assert same(outputs(model), before)
    alone, report = deploy(built(Returning()), image())
    assert type(alone) is nn.Conv2D
    assert report.difference.relative < 1e-5
    again = deploy(alone, image()).report
    assert (again.changed, again.difference) == ((), (0, 0))


class Wrong(Branches):
    def switch_to_deploy(self):
        self.alone = True


class Failing(Branches):
    def switch_to_deploy(self):
        self.point = None


class Empty(Branches):
    def fuse(self):
        return nn.Conv2D(4, 3, in_channels=4, prefix="new_")


class Plain(Branches):
    def fuse(self):
        return nn.Lambda(lambda x: x)


def test_what_deploying_cannot_do_right_is_said():
    message = "deploy needs the values of '.*weight', which has none yet: initialize the model"
    with pytest.raises(ValueError, match=message):
        deploy(Branches())
    for cls, message in {
        Failing: r"Failing\.switch_to_deploy\(\) raised TypeError: Changing attribute type",
        Empty: r"Empty\.fuse\(\) returned a Conv2D without values for 'new_weight'; it is to give",
        Plain: r"Plain\.fuse\(\) returned a Lambda, which is no HybridBlock as the one before",
    }.items():
        with pytest.raises(NotFoldable, match=f"layer '0': {message}"):
            deploy(built(sequence(cls())))
    with pytest.warns(UserWarning, match="the deployed model differs by .* of the largest output"):
        report = deploy(built(Wrong()), image()).report
    assert report.difference.relative > 0.02


def test_a_plain_block_may_return_any_block():
    class Unhybrid(Block):
        def __init__(self):
            super().__init__()
            self.body = conv()

        def forward(self, x):
            return self.body(x)

        def fuse(self):
            return sequence(self.body, cls=nn.Sequential)

    deployed, report = deploy(built(sequence(Unhybrid(), cls=nn.Sequential)), image())
    assert type(deployed[0]) is nn.Sequential
    assert report.difference == (0, 0)

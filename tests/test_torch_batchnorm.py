"""PyTorch: batch norms are folded where that is exact, and left with the reason elsewhere."""

from __future__ import annotations

import pickle
import threading

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch_models import images, network, output, trained  # noqa: E402

from doconv_core import Left  # noqa: E402
from doconv_core.models.report import (  # noqa: E402
    HOOKED,
    NOT_DIRECT,
    OUTPUT,
    SHARED,
    SUBCLASS,
    behind,
    read_elsewhere,
)
from doconv_torch import DOConv2d, fold, over_parameterize, verify  # noqa: E402


def pair(**options):
    return [nn.Conv2d(3, 3, 3, padding=1, **options), nn.BatchNorm2d(3)]


def fused(model):
    """Return the folded model and the paths of its fused batch norms; check that it is equal."""
    folded, report = fold(model, fuse_batchnorm=True)
    assert verify(model, folded, images()).relative < 1e-6
    return folded, [change.path for change in report.changed if "BatchNorm" in change.before]


def left(model):
    """Return why batch norms are left; check that the output is the same bit for bit."""
    folded, report = fold(model, fuse_batchnorm=True)
    assert verify(model, folded, images()).absolute == 0
    return {entry.path: entry.reason for entry in report.left}


def test_what_a_batch_norm_and_its_convolution_have_become():
    model = trained(over_parameterize(network().eval())[0])
    folded, paths = fused(model)
    assert paths == ["stem.1", *(f"stages.{n}.{bn}" for n in (0, 1) for bn in ("bn1", "bn2"))]
    assert type(folded.stem[1]) is nn.Identity
    assert vars(folded.stem[1]).keys() == vars(nn.Identity()).keys()
    conv = folded.stages[0].conv1
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert conv.bias.requires_grad
    assert repr(conv) == repr(nn.Conv2d(8, 8, 3, padding=1))


class Callable(nn.Module):
    """A model with a forward of one's own."""

    def __init__(self, modules, forward):
        super().__init__()
        self.body = nn.ModuleList(modules)
        self.function = forward

    def forward(self, x):
        return self.function(self, self.body, x)


def build(modules, forward=None):
    model = nn.Sequential(*modules) if forward is None else Callable(modules, forward)
    return network(lambda: model).eval()


def loops(self, body, x):
    """Control flow that depends on data cannot be traced."""
    while x.abs().sum() > 1e6:
        x = x / 2
    return body[0](x)


def keeps(self, body, x):
    self.kept = body[0](x)
    return body[1](self.kept)


def appends(self, body, x):
    features = [body[0](x)]
    self.features = {"all": features}
    return body[1](features[0])


def reads_parameters(self, body, x):
    return body[1](body[0](x)) + body[0].weight.sum()


def reads(name):
    """Return a forward that reads an attribute of the norm, whatever it makes of it."""

    def forward(self, body, x):
        value = getattr(body[1], name)
        return body[1](body[0](x)) + (value.detach().reshape(-1)[0] if name != "eps" else value)

    return forward


def asks_for_attribute(self, body, x):
    return body[1](body[0](x)) if hasattr(body[1], "num_features") else body[0](x)


def asks_for_dtype(self, body, x):
    return body[1](body[0](x.to(body[0].weight.dtype)))


def with_hook(index, register, hook):
    modules = pair()
    getattr(modules[index], register)(hook)
    return modules


def changed(index, change):
    modules = pair()
    change(modules[index])
    return modules


LEFT = {
    "training": (lambda: build(changed(1, lambda n: None)), "in training mode"),
    "no statistics": (
        lambda: build([nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)]),
        "it has no running statistics",
    ),
    "output kept": (lambda: build(pair(), keeps), OUTPUT),
    "output listed": (lambda: build(pair(), appends), OUTPUT),
    "changed in place": (
        lambda: build(pair(), lambda self, body, x: body[1](body[0](x).mul_(2))),
        NOT_DIRECT,
    ),
    "parameters read": (lambda: build(pair(), reads_parameters), SHARED),
    "statistics read": (
        lambda: build(pair(), reads("running_var")),
        read_elsewhere(["running_var"]),
    ),
    "statistics read by what cannot be traced": (
        lambda: build(
            [nn.Sequential(*pair())],
            lambda self, body, x: loops(self, body, x + body[0][1].running_mean.sum()),
        ),
        read_elsewhere(["running_mean"]),
    ),
    "statistics listed": (
        lambda: build(
            pair(),
            lambda self, body, x: (
                body[1](body[0](x)) + dict(body[1].named_buffers())["running_var"].sum()
            ),
        ),
        read_elsewhere(["named_buffers"]),
    ),
    "epsilon read": (lambda: build(pair(), reads("eps")), read_elsewhere(["eps"])),
    "attribute asked for": (
        lambda: build(pair(), asks_for_attribute),
        read_elsewhere(["num_features"]),
    ),
    "hook on conv": (
        lambda: build(with_hook(0, "register_forward_hook", lambda m, x, y: 2 * y)),
        HOOKED,
    ),
    "backward hook": (
        lambda: build(with_hook(1, "register_full_backward_hook", lambda m, x, y: None)),
        HOOKED,
    ),
    "state hook": (
        lambda: build(with_hook(1, "register_state_dict_post_hook", lambda m, d, p, k: None)),
        HOOKED,
    ),
    "not called": (
        lambda: build(pair(), lambda self, body, x: body[0](x)),
        "the model's forward pass does not call it",
    ),
    "parametrized": (
        lambda: build([parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3)]),
        behind("parametrized: its weight is computed from other parameters"),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_fused_exactly_is_left_and_named(name):
    make, reason = LEFT[name]
    model = make()
    path = next(p for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    if name == "training":
        model[1].train()
        with pytest.warns(UserWarning, match="in training mode, where layer '1'"):
            _, report = fold(model, fuse_batchnorm=True)
        assert report.left == (Left(path, "BatchNorm2d", reason),)
        return
    assert left(model) == {path: reason}


def test_what_is_asked_of_a_weight_without_its_values_is_no_use_of_it():
    assert fused(build(pair(), asks_for_dtype))[1] == ["body.1"]


class NormAct(nn.BatchNorm2d):
    """A batch norm with layers behind it, built as timm's BatchNormAct2d is."""

    def __init__(self, channels, act=nn.ReLU, drop=nn.Identity):
        super().__init__(channels)
        self.drop, self.act = drop(), act()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class Calling(NormAct):
    """The same by way of its parent's forward."""

    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x))


class Frozen(nn.Module):
    """A batch norm of constants, built as torchvision's FrozenBatchNorm2d is."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean, variance = (t.reshape(1, -1, 1, 1) for t in (self.running_mean, self.running_var))
        scale = w * (variance + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


@pytest.mark.parametrize(
    ("norm", "becomes"),
    [
        (lambda: NormAct(3), nn.Sequential),
        (lambda: NormAct(3, nn.PReLU, nn.Dropout), nn.Sequential),
        (lambda: NormAct(3, nn.Identity), nn.Identity),
        (lambda: Calling(3, nn.SiLU), nn.Sequential),
        (lambda: Frozen(3), nn.Identity),
    ],
)
def test_norms_of_other_packages_are_fused_and_their_activations_kept(norm, becomes):
    model = build([nn.Conv2d(3, 3, 3), norm(), nn.Conv2d(3, 3, 3)])
    own = {name: type(m) for name, m in model[1].named_children() if becomes is nn.Sequential}
    names = [name for name in model.state_dict() if name.startswith("1.act")]
    folded, report = fold(model, fuse_batchnorm=True)
    assert verify(model, folded, images()).relative < 1e-6
    assert [c.after for c in report.changed] == ["fused into Conv2d"]
    assert report.left == ()
    assert type(folded[1]) is becomes
    found = {name: type(m) for name, m in folded[1].named_children()}
    assert found.items() <= own.items()
    assert bool(found) == bool(own)
    assert [name for name in folded.state_dict() if name.startswith("1.")] == names
    assert not fold(folded, fuse_batchnorm=True).report.changed


class Scaled(NormAct):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardizing(NormAct):
    def forward(self, x):
        return super().forward(x - x.mean((2, 3), keepdim=True))


class ByValue(NormAct):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("cls", [Scaled, Standardizing, ByValue])
def test_norms_that_compute_something_else_are_left(cls):
    assert left(build([nn.Conv2d(3, 3, 3), cls(3)])) == {"1": SUBCLASS}


def with_padding(conv, padding):
    """Return the layer with a number assigned, which an ordinary convolution takes."""
    conv.padding = padding
    return conv


@pytest.mark.parametrize(
    ("modules", "x", "expected"),
    [
        ([nn.Linear(12, 5), nn.BatchNorm1d(5)], (4, 12), "fused into Linear"),
        ([nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)], (4, 3, 4), "fused into Linear"),
        ([nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6)], (2, 4, 5),
         "fused into ConvTranspose1d"),
        ([nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)], (2, 4, 5, 5),
         "fused into ConvTranspose2d"),
        ([nn.Conv2d(3, 4, 3), nn.Identity(), nn.Identity(), nn.BatchNorm2d(4)], (2, 3, 5, 5),
         "fused into Conv2d"),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], (2, 4, 5, 5), "fused into Conv2d"),
        ([nn.BatchNorm2d(4), nn.Identity(), nn.Conv2d(4, 6, 3, padding="valid", bias=False)],
         (2, 4, 5, 5), "fused into Conv2d"),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")], (2, 4, 5, 5),
         "fused into Conv2d"),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding="same")], (2, 4, 5, 5),
         "fused into Conv2d"),
        ([nn.BatchNorm2d(4), with_padding(nn.Conv2d(4, 6, 3), 0)], (2, 4, 5, 5),
         "fused into Conv2d"),
        ([nn.BatchNorm2d(4), with_padding(nn.Conv2d(4, 6, 3), 1)], (2, 4, 5, 5), NOT_DIRECT),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)], (2, 4, 5, 5), NOT_DIRECT),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")], (2, 4, 5, 5), NOT_DIRECT),
        ([nn.Embedding(9, 5), nn.Linear(5, 4), nn.BatchNorm1d(4)], None,
         "it may normalize another axis than the linear layer's features"),
        ([nn.Linear(5, 4), nn.BatchNorm2d(4)], (2, 4, 3, 5),
         "it may normalize another axis than the linear layer's features"),
    ],
)  # fmt: skip
def test_norms_behind_and_before_other_layers(modules, x, expected):
    model = network(lambda: nn.Sequential(*modules)).eval()
    x = torch.randn(x) if x else torch.randint(9, (2, 4))
    folded, report = fold(model, fuse_batchnorm=True)
    found = [change.after for change in report.changed] + [each.reason for each in report.left]
    assert found == [expected]
    difference = verify(model, folded, x)
    assert difference.relative < 1e-6
    assert report.changed or difference.absolute == 0


def test_two_norms_in_a_row_are_both_fused():
    model = build([*pair(), nn.BatchNorm2d(3)])
    assert fused(model)[1] == ["1", "2"]


def test_what_cannot_be_traced_is_named_and_its_parts_are_fused():
    blocks = nn.Sequential(*pair(), nn.ReLU(), *pair())
    model = build([Callable([blocks], loops), *pair()])
    folded, paths = fused(model)
    assert paths == ["0.body.0.1", "0.body.0.4", "2"]
    assert type(folded[2]) is nn.Identity
    alone = build(pair(), lambda self, body, x: loops(self, body, x) + body[1](body[0](x)))
    assert left(alone) == {
        "body.1": "the model itself cannot be traced (TraceError: symbolically traced variables "
        "cannot be used as inputs to control flow)"
    }


def test_arguments_with_defaults_may_decide():
    def forward(self, body, x, early=None):
        y = body[0](x)
        return body[1](y) if early is None else body[1](y + early)

    class Optional(Callable):
        def forward(self, x, early=None):
            return self.function(self, self.body, x, early)

    model = network(lambda: Optional(pair(), forward)).eval()
    assert left(model) == {"body.1": NOT_DIRECT}

    class Flagged(Callable):
        def forward(self, x, features=False):
            y = self.body[1](self.body[0](x))
            return (y, x) if features else y

    model = network(lambda: Flagged(pair(), None)).eval()
    assert fused(model)[1] == ["body.1"]


def test_hooks_of_blocks_stand_between_their_outputs_and_what_follows():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    block.register_forward_hook(lambda m, x, y: 2 * y)
    inner = nn.Sequential(*pair())
    seen = []
    inner.register_forward_hook(lambda m, x, y: seen.append(y))
    model = build([block, nn.BatchNorm2d(3), inner])
    folded, paths = fused(model)
    assert paths == ["2.1"]
    assert type(folded[1]) is nn.BatchNorm2d
    assert all(isinstance(y, torch.Tensor) for y in seen)


def test_tracing_leaves_no_trace():
    model = build(pair(), keeps)
    output(model)
    kept, state = model.kept, torch.get_rng_state()
    fold(model, fuse_batchnorm=True, inplace=True)
    assert model.kept is kept
    assert torch.equal(torch.get_rng_state(), state)
    assert b"Proxy" not in pickle.dumps(fold(build(pair()), fuse_batchnorm=True)[0])


def test_a_model_that_cannot_be_copied_is_folded_in_place_without_fusing():
    model = build(pair())
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="the model cannot be copied"):
        fold(model, fuse_batchnorm=True)
    _, report = fold(model, fuse_batchnorm=True, inplace=True)
    assert report.left[0].reason.startswith(
        "the model itself cannot be traced (TypeError: cannot pickle"
    )


def test_pruned_biases_and_frozen_layers():
    model = build([nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)])
    model.requires_grad_(False)
    folded, _ = fused(model)
    assert not folded[0].bias.requires_grad
    pruned = build(pair())
    prune.l1_unstructured(pruned[0], "bias", 0.5)
    _, report = fold(pruned, fuse_batchnorm=True, inplace=True)
    reason = "the bias of the convolution before it is computed before each call"
    assert report.left == (Left("1", "BatchNorm2d", reason),)


def test_synchronised_batch_norm_and_data_parallel():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build([DOConv2d(3, 4, 3), nn.BatchNorm2d(4)]))
    wrapped = nn.Sequential(nn.DataParallel(trained(model)))
    folded, paths = fused(wrapped)
    assert paths == ["0.module.1"]
    assert type(folded[0].module[0]) is nn.Conv2d


def test_graph_modules_and_compiled_models():
    assert fused(torch.fx.symbolic_trace(build(pair())))[1] == ["1"]
    torch._dynamo.reset()
    assert fused(torch.compile(build(pair()), backend="eager"))[1] == ["_orig_mod.1"]


def test_meta_and_lazy_models():
    model = build([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]).to("meta")
    folded, report = fold(model, fuse_batchnorm=True)
    assert [c.path for c in report.changed] == ["1"]
    assert folded[0].weight.is_meta
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    _, report = fold(lazy, fuse_batchnorm=True, inplace=True)
    assert report.left[0].kind == "LazyBatchNorm2d"
    assert (report.parameters_before, report.parameters_after) == (0, 0)


def test_two_norms_behind_one_convolution_without_a_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    for norm in model[1:]:
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.weight)
    fused, report = fold(model.eval(), fuse_batchnorm=True)
    assert [change.path for change in report.changed] == ["1", "2"]
    assert verify(fused, model, torch.randn(2, 3, 6, 6)).relative < 1e-6
